"""llmcompressor's GPTQ and AWQ. Run by the Python that has it, with the path of a request (see measure.py).

Asymmetric groups of 128. Its defaults otherwise: GPTQ orders columns by activation with static groups, AWQ
searches scales against the output of the module around the layers and does not clip.
"""

from typing import Any

from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from measure import answer, load_model, measured, read_request
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

WHERE = {"targets": ["Linear"], "ignore": ["lm_head"], "scheme": "W4A16_ASYM"}  # groups of 128


# Its AWQ pins memory for copies to an accelerator, which raises where there is none.
IntermediatesCache.pin_memory = lambda *_, **__: None  # type: ignore[method-assign]


def weights(model: Any) -> dict[str, Tensor]:
    """The weights as the quantized model uses them: on their grids."""
    state = {key: value for key, value in model.state_dict().items() if "weight_" not in key}
    for name, module in model.named_modules():
        if scheme := getattr(module, "quantization_scheme", None):
            state[f"{name}.weight"] = fake_quantize(
                module.weight, module.weight_scale, module.weight_zero_point, scheme.weights
            )  # fmt: skip
    return state


def main() -> None:
    request = read_request()
    model, tokenizer = (
        load_model(request["model"], request["dtype"]),
        AutoTokenizer.from_pretrained(request["model"]),
    )
    n_samples, seq_len = request["tokens"].shape
    samples = [{"input_ids": row} for row in request["tokens"]]
    data = DataLoader(samples, batch_size=request["batch_size"])
    recipe, settings = [AWQModifier(), QuantizationModifier(**WHERE)], {"clip": False}
    if request["method"] == "gptq":
        recipe, settings = [GPTQModifier(**WHERE)], {"act_order": True, "static_groups": True}
    length = {"num_calibration_samples": n_samples, "max_seq_length": seq_len}
    quantized, figures = measured(
        lambda: oneshot(model=model, processor=tokenizer, recipe=recipe, dataset=data, **length),
        request["core"],
    )
    answer(request, figures, weights(quantized), ["llmcompressor"], symmetric=False, **settings)


if __name__ == "__main__":
    main()
