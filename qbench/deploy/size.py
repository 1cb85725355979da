"""Honest size: every parameter counts, and so do scales and zero-points."""

from typing import Any

from qbench.models.family import family_of
from qbench.quant.scheme import Scheme

FLOAT_BITS = 16  # what stays in floating point is stored in half precision, whatever it was evaluated in


def size_metrics(model: Any, scheme: Scheme) -> dict[str, float]:
    """Size of `model` (a skeleton will do) stored under `scheme`.

    Returns:
        `bits_per_weight`: stored bits per parameter of the whole model, embeddings, norms and head
        included; `bits_per_linear_weight`: the same for the quantized layers alone; `model_mb`: stored
        size in units of 10^6 bytes.
    """
    family = family_of(model)
    n_linear, linear_bits = 0, 0.0
    for layer in model.get_submodule(family.blocks):
        for name in family.linears:
            rows, columns = layer.get_submodule(name).weight.shape
            bits = scheme.weight.bits_per_element(rows, columns) if scheme.weight else FLOAT_BITS
            n_linear += rows * columns
            linear_bits += bits * rows * columns
    n_all = sum(p.numel() for p in model.parameters())  # tied parameters are listed once
    all_bits = linear_bits + FLOAT_BITS * (n_all - n_linear)
    return {
        "bits_per_weight": all_bits / n_all,
        "bits_per_linear_weight": linear_bits / n_linear,
        "model_mb": all_bits / 8e6,
    }
