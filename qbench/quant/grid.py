"""Affine fake quantization: real numbers, rounded to an integer grid, kept as real numbers.

    q = clamp(round(x / s) + z, qmin, qmax)        x̂ = s · (q − z)

`s` is the scale and `z` the zero-point. Both are computed in float32 at least, whatever the input's
dtype, and have the shape of the grouped input with a last axis of one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qbench.quant.scheme import QuantSpec


class QParams(NamedTuple):
    """Scale and zero-point, each `(..., n_groups, 1)`."""

    scale: Tensor
    zero: Tensor


def grouped(x: Tensor, spec: QuantSpec) -> Tensor:
    """View `x` as `(..., n_groups, group_size)`, one scale per group.

    Raises:
        ValueError: If the last axis does not divide into groups.
    """
    if spec.granularity == "tensor":
        return x.reshape(1, -1)
    size = spec.group_size or x.shape[-1]
    if x.shape[-1] % size:
        raise ValueError(
            f"the last axis ({x.shape[-1]}) is not a multiple of group_size ({size}); "
            "choose a group_size that divides it, or -1 for one group per row"
        )
    return x.reshape(*x.shape[:-1], -1, size)


class _Round(torch.autograd.Function):
    """Nearest integer, with the gradient of the identity (straight-through estimator)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override, no-untyped-def]
        return x.round()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[override, no-untyped-def]
        return gradient


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def choose_qparams(
    x: Tensor, spec: QuantSpec, keep: tuple[Tensor | float, Tensor | float] = (1.0, 1.0)
) -> QParams:
    """Min–max range of each group, of which `keep` = (lower, upper) fractions are kept.

    The range always contains zero, so zero is exactly representable. Symmetric grids have scale
    `max|x| / (2^(b−1) − 1)`, so that both ends of the range are on the grid.
    """
    g = grouped(_wide(x), spec)
    lo = g.amin(-1, keepdim=True).clamp(max=0) * keep[0]
    hi = g.amax(-1, keepdim=True).clamp(min=0) * keep[1]
    scale = torch.maximum(-lo, hi) / spec.qmax if spec.symmetric else (hi - lo) / (spec.qmax - spec.qmin)
    # A group of zeros has no range; any scale serves, but a subnormal one would make x / scale overflow.
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
    zero = torch.zeros_like(scale) if spec.symmetric else _Round.apply(-lo / scale)
    return QParams(scale, zero)


def round_to_grid(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """Snap `x` to the nearest grid point. `scale` and `zero` broadcast against `x`."""
    q = (_Round.apply(_wide(x) / scale) + zero).clamp(spec.qmin, spec.qmax)
    return (scale * (q - zero)).to(x.dtype)


def fake_quantize(x: Tensor, spec: QuantSpec, qparams: QParams | None = None) -> Tensor:
    """Snap `x` to its own min–max grid, or to the grid given by `qparams`."""
    qparams = qparams or choose_qparams(x, spec)
    return round_to_grid(grouped(x, spec), *qparams, spec).reshape(x.shape)
