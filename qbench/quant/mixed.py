"""Groups of several widths in one weight: mixed precision inside a layer.

A weight whose groups of columns differ in width is several weights of one width each. These functions take it apart,
leave the parts to `qbench.quant.grid`, and put the results together. `group_bits`, `(n_groups,)`, says how many bits a
group has, in all rows; `None` stands for those of the spec everywhere.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qbench.quant.grid import QParams, choose_qparams, fake_quantize, grouped, round_to_grid
from qbench.quant.spec import QuantSpec

Keep = tuple[Tensor | float, Tensor | float]


def of_width(spec: QuantSpec, bits: int) -> QuantSpec:
    """The same grid with another width. One bit is never symmetric: its two levels lie where they fit best."""
    if bits == 1:
        return replace(spec, bits=1, symmetric=False, symmetric_mode="full")
    return replace(spec, bits=bits)


def by_width(spec: QuantSpec, group_bits: Tensor) -> Iterator[tuple[QuantSpec, Tensor]]:
    """The widths that occur, narrow ones first: each one's grid, and which groups have it."""
    for bits in group_bits.unique().tolist():
        yield of_width(spec, bits), (group_bits == bits).nonzero().flatten()


def specs_by_group(spec: QuantSpec, group_bits: Tensor | None, n_groups: int) -> list[QuantSpec]:
    """The grid of each group."""
    if group_bits is None:
        return [spec] * n_groups
    return [of_width(spec, bits) for bits in group_bits.tolist()]


def choose_mixed(w: Tensor, spec: QuantSpec, group_bits: Tensor | None, keep: Keep = (1.0, 1.0)) -> QParams:
    """As `choose_qparams`, for a weight `(out, in)` whose groups differ in width."""
    if group_bits is None:
        return choose_qparams(w, spec, keep)
    g, chosen = grouped(w, spec), []
    for part, groups in by_width(spec, group_bits):
        kept = tuple(k[:, groups] if isinstance(k, Tensor) else k for k in keep)
        chosen.append(choose_qparams(g[:, groups].flatten(1), part, (kept[0], kept[1])))
    order = torch.cat([groups for _, groups in by_width(spec, group_bits)]).argsort()
    return QParams(*(torch.cat(parts, 1)[:, order] for parts in zip(*chosen, strict=True)))


def quantize_mixed(
    w: Tensor, spec: QuantSpec, group_bits: Tensor | None, grid: QParams | None = None
) -> Tensor:
    """As `fake_quantize`, for a weight `(out, in)` whose groups differ in width."""
    if group_bits is None:
        return fake_quantize(w, spec, grid)
    scale, zero = grid or choose_mixed(w, spec, group_bits)
    g = result = grouped(w, spec)
    for part, groups in by_width(spec, group_bits):
        rounded = round_to_grid(g[:, groups], scale[:, groups], zero[:, groups], part)
        result = result.index_copy(1, groups, rounded)
    return result.reshape(w.shape)
