"""Honest size: every parameter counts, and so do scales, zero-points, outliers and adapters."""

from collections.abc import Mapping
from typing import Any

from qbench.models.family import family_of
from qbench.quant.storage import FLOAT_BITS


def size_metrics(
    model: Any, n_parameters: int, stored_bits: Mapping[str, float], extra_bits: float = 0.0
) -> dict[str, float]:
    """Size of a model as stored.

    Args:
        n_parameters: Of the model before quantization, which may have untied the head or added adapters; both count
            as stored, at 16 bits.
        stored_bits: Bits of each linear layer's weight by `<block>.<name>`; what is missing is in floating point.
        extra_bits: Of what is stored beside the model's own parameters.

    Returns:
        `bits_per_weight`: stored bits per parameter of the whole model, embeddings, norms and head
        included; `bits_per_linear_weight`: the same for the layers that can be quantized; `model_mb`: stored
        size in units of 10^6 bytes.
    """
    family = family_of(model)
    n_linear, linear_bits = 0, 0.0
    for index, layer in enumerate(model.get_submodule(family.blocks)):
        for name in family.linears(layer):
            n = layer.get_submodule(name).weight.numel()
            n_linear += n
            linear_bits += stored_bits.get(f"{index}.{name}", float(FLOAT_BITS * n))
    n_now = sum(p.numel() for p in model.parameters())  # tied parameters are listed once
    linear_bits += extra_bits
    all_bits = linear_bits + FLOAT_BITS * (n_now - n_linear)
    return {
        "bits_per_weight": all_bits / n_parameters,
        "bits_per_linear_weight": linear_bits / n_linear,
        "model_mb": all_bits / 8e6,
    }
