"""Make what all systems are given: a model's folder and calibration tokens. Run by the Python that has qbench.

    python inputs.py MODEL FOLDER N_SAMPLES SEQ_LEN

Leaves `model/` (micro-llama is copied, random-llama made from a seed) and `tokens-<n>x<length>.npy` in FOLDER.
"""

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy
import torch

from qbench.data.calibration import CalibrationSet
from qbench.models.load import ModelRef
from qbench.zoo import WEIGHTS

OUTLIERS, FACTOR = 6, 20.0  # channels, and how much larger than the others their activations are


def random_llama(folder: Path, layers: int = 24, seed: int = 0) -> None:
    """A Llama of 315 million random weights, with micro-llama's vocabulary, in bfloat16 like a real checkpoint.

    Weights keep the size of what passes through them. A few channels are made larger in every RMSNorm and the
    layers behind it make up for that: activations have the outliers of a trained model, and the function of
    the model is what it was.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = ModelRef("zoo/micro-llama").tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=512, rms_norm_eps=1e-6,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").to(torch.float32)
    outliers = torch.randperm(config.hidden_size, generator=generator)[:OUTLIERS]
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            torch.nn.init.ones_(weight)
        else:
            std = 1.0 if "embed" in name else 1 / math.sqrt(weight.shape[1])
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * layers)  # what a block adds to the residual stream
            torch.nn.init.normal_(weight, std=std, generator=generator)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        plant(block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), outliers)
        plant(block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), outliers)
    model.lm_head.weight.data.mul_(2.0)  # logits whose softmax is neither flat nor a single peak
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def plant(norm: Any, sinks: tuple[Any, ...], channels: torch.Tensor) -> None:
    norm.weight.data[channels] *= FACTOR
    for sink in sinks:
        sink.weight.data[:, channels] /= FACTOR


def main() -> None:
    name, folder, n_samples, seq_len = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    model = folder / "model"
    if not model.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if name == "micro-llama":
            shutil.copytree(WEIGHTS / name, model)
        else:
            random_llama(model, layers=int(name.removeprefix("random-llama-")) if name[-1].isdigit() else 24)
    tokenizer = ModelRef("zoo/micro-llama").tokenizer()
    tokens = CalibrationSet("stdlib_docs", n_samples, seq_len).tokens(tokenizer)
    numpy.save(folder / f"tokens-{n_samples}x{seq_len}.npy", tokens.numpy())


if __name__ == "__main__":
    main()
