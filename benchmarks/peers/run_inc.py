"""Intel Neural Compressor's GPTQ and AWQ. Run by the Python that has it, with the path of a request (see measure.py).

Asymmetric groups of 128. GPTQ with act-order; without static groups, which this release computes but cannot pack. Blocks
of 128 columns as in the paper, not its 2048, so that a group's grid follows earlier errors. The layers of a decoder block
together, its default: one after another takes three times as long. AWQ with its defaults: a scale that no layer before
can take over becomes a product in front of the layer, then clipping. The calls that are timed also pack the weights.
"""

from typing import Any

from measure import answer, load_model, measured, read_request
from neural_compressor.torch.algorithms.weight_only.modules import INCWeightOnlyLinear, MulLinear
from neural_compressor.torch.quantization import AWQConfig, GPTQConfig, convert, prepare
from torch import Tensor

GRID = {"bits": 4, "group_size": 128, "use_sym": False}


def weights(model: Any) -> dict[str, Tensor]:
    """The weights as the quantized model uses them: unpacked, with the product in front of a layer inside it."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, INCWeightOnlyLinear):
            state[f"{name}.weight"] = module.recover()
    for name, module in model.named_modules():
        if isinstance(module, MulLinear):
            state[f"{name}.weight"] = state[f"{name}.linear.weight"] * module.input_scale
    return state


def main() -> None:
    request = read_request()
    model = load_model(request["model"], request["dtype"])
    settings: dict[str, Any] = {}
    if request["method"] == "gptq":
        settings = {"act_order": True, "static_groups": False, "block_size": 128}
    config = (GPTQConfig if request["method"] == "gptq" else AWQConfig)(**GRID, **settings)
    batches = request["tokens"].split(request["batch_size"])

    def quantize() -> Any:
        prepared = prepare(model, config, example_inputs=batches[0][:1])
        for batch in batches:
            prepared(batch, use_cache=False)
        return convert(prepared)

    quantized, figures = measured(quantize, request["core"])
    answer(request, figures, weights(quantized), ["neural-compressor-pt"], **GRID, **settings)


if __name__ == "__main__":
    main()
