"""From a weight that lies on a grid to what is stored of it, and back, to the bit.

A checkpoint holds codes; the model that was evaluated holds real numbers. `codes_of` finds the codes from the grid
that the rounder left, and refuses a weight of which they are not all: what is exported is what was evaluated.
"""

import torch
from torch import Tensor

from qbench.quant.grid import QParams, grouped, round_to_grid, wide
from qbench.quant.minifloat import code_table, round_to_format
from qbench.quant.spec import QuantSpec


def codes_of(weight: Tensor, grid: QParams, spec: QuantSpec) -> Tensor:
    """The integer codes of a weight `(out, in)`, int32 of the same shape, from `qmin` to `qmax`.

    Of a small floating-point format they are the bit patterns, sign first; of nf4 the places in its table.

    Args:
        grid: `(out, n_groups, 1)` each, or what broadcasts to it.

    Raises:
        ValueError: If a weight is not on the grid.
    """
    g, (scale, zero) = grouped(weight, spec), grid
    if spec.format == "int":
        codes = (wide(g) / scale + zero).round().clamp(spec.qmin, spec.qmax).int()
        for step in (-1, 1):  # bfloat16 moves numbers of 128 steps and more by up to one
            near = (codes + step).clamp(spec.qmin, spec.qmax)
            codes, near = codes.reshape(weight.shape), near.reshape(weight.shape)
            right = decoded(near, grid, spec, weight.dtype) == weight
            codes = torch.where(right & (decoded(codes, grid, spec, weight.dtype) != weight), near, codes)
    else:
        codes = _patterns(wide(g) / scale, spec)
    codes = codes.reshape(weight.shape)
    off = decoded(codes, grid, spec, weight.dtype) != weight
    if off.any():
        raise ValueError(
            f"{int(off.sum())} of {off.numel()} weights are not on the grid of {spec.bits} bits that was left for them; "
            "what changed them after rounding cannot be stored in codes"
        )
    return codes


def decoded(codes: Tensor, grid: QParams, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """The weight that codes `(out, in)` stand for, as fake quantization computes it."""
    scale, zero = grid
    numbers = codes if spec.format == "int" else code_table(spec.format).to(codes.device)[codes.long()]
    numbers = grouped(numbers.to(scale.dtype), spec)
    return (scale * (numbers - zero)).to(dtype).reshape(codes.shape)


def outer_of(scale: Tensor) -> Tensor:
    """The second scale of a grid whose scales are in e4m3, a float32 scalar: each scale is a number of the format times it.

    Raises:
        ValueError: If there is none.
    """
    # The largest scale is 448 times it, or less where ranges were clipped; a product is rounded, so its neighbours are
    # tried as well. A part of the scales tells most that are wrong.
    numbers = code_table("e4m3").to(scale)
    numbers = numbers[numbers > 0].sort(descending=True).values
    near = (scale.max() / numbers).float()
    up, down = near.new_tensor(torch.inf), near.new_tensor(0.0)
    part = scale.flatten()[:: max(1, scale.numel() // 4096)]
    for outer in torch.stack([near, near.nextafter(up), near.nextafter(down)], 1).flatten():
        if all(torch.equal(round_to_format(s / outer, "e4m3") * outer, s) for s in (part, scale)):
            return outer
    raise ValueError("the scales of a grid are not numbers of e4m3 times one second scale")


def _patterns(y: Tensor, spec: QuantSpec) -> Tensor:
    """The codes of the nearest numbers of a format, found in its table."""
    one = torch.ones((), dtype=y.dtype, device=y.device)
    numbers = round_to_grid(y, one, 0 * one, spec)
    table = code_table(spec.format).to(y)
    known = torch.arange(len(table), device=y.device)[~table.isnan()]
    ascending, order = table[known].sort(stable=True)
    codes = known[order][torch.searchsorted(ascending, numbers.contiguous())]
    if spec.format != "nf4":
        codes = codes.masked_fill(numbers == 0, 0)  # of zero's two codes, the one without a sign
    return codes.int()
