"""What the rounding of a weight does to its layer's output, without the layer's inputs.

    ‖X Δᵀ‖² / n = tr(Δ G Δᵀ)        Δ = ŵ − w,  G = Xᵀ X / n

`Δ` has the rows of the weight, and `G` is the Gram matrix of the n inputs: one product tells what a forward pass would.
The error of a row is exact. That of a group is the group's own share: what other groups make up for is not in it.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from qbench.quant.grid import (
    QParams,
    choose_qparams,
    extremes,
    group_sum,
    grouped,
    outer_scale,
    qparams_of_range,
    round_to_grid,
)
from qbench.quant.spec import QuantSpec

CHUNK = 2**22  # elements of a weight that are looked at together
_PANELS, _NARROWEST = 4, 64

Ends = tuple[Tensor, Tensor]
Range = Callable[[Tensor, Tensor], Ends]


def output_error(delta: Tensor, gram: Tensor) -> Tensor:
    """`δ G δᵀ` of each row δ of `delta`; `(..., rows, n)` and `(..., n, n)` give `(..., rows)`."""
    # The matrix is symmetric: its upper half, doubled, is enough, five eighths of the arithmetic in four panels.
    upper = gram.triu() + gram.triu(1)
    n = gram.shape[-1]
    width = max(-(-n // _PANELS), _NARROWEST)
    error = delta.new_zeros(delta.shape[:-1])
    for start in range(0, n, width):
        stop = min(start + width, n)
        error += ((delta[..., :stop] @ upper[..., :stop, start:stop]) * delta[..., start:stop]).sum(-1)
    return error


def gram_blocks(gram: Tensor, size: int) -> Tensor:
    """The Gram matrices of runs of `size` channels, `(n_groups, size, size)`."""
    n_groups = len(gram) // size
    blocks = gram.view(n_groups, size, n_groups, size).diagonal(dim1=0, dim2=2)
    return blocks.permute(2, 0, 1).contiguous()


def group_error(delta: Tensor, blocks: Tensor, spec: QuantSpec) -> Tensor:
    """The error of each group's share of the output, summed over what has one scale, `(..., n_groups, 1)`.

    Args:
        delta: As `grouped` gives it.
        blocks: From `gram_blocks`; runs of the group size, or all channels.
    """
    by_group = delta.reshape(-1, *blocks.shape[:2]).transpose(0, 1)
    errors = output_error(by_group, blocks).T[..., None]
    return errors.sum((0, 1), keepdim=True)[0] if spec.granularity == "tensor" else group_sum(errors, spec)


def row_chunks(w: Tensor, spec: QuantSpec) -> list[slice]:
    """Runs of rows of `w`, `(out, in)`, of about `CHUNK` elements, none of which shares a scale with another run."""
    if spec.granularity == "tensor" or spec.scale_format == "e4m3":
        return [slice(None)]
    together = (spec.group_size or 1) if spec.granularity == "block" else 1
    together *= spec.scale_group if spec.scale_bits < 16 else 1
    rows = -(-CHUNK // (w.shape[1] * together)) * together
    return [slice(start, start + rows) for start in range(0, len(w), rows)]


@torch.no_grad()
def search_range_by_output(w: Tensor, gram: Tensor, spec: QuantSpec, ranges: Iterable[Range]) -> QParams:
    """Of some ranges for each group of `w`, `(out, in)`, the grid that hurts the group's share of the output least.

    Ties go to the range that is named first. The range of one bit is not searched. Scales that are quantized in their
    turn (`scale_bits`) are so after the search.

    Args:
        gram: Of the layer's input, `(in, in)`.
        ranges: Each makes one from the lowest and the highest weight of each group, `(out, n_groups, 1)`.
    """
    if spec.bits == 1:
        return choose_qparams(w, spec)
    ranges, outer = list(ranges), outer_scale(w, spec)
    blocks = gram_blocks(gram, spec.group_size or w.shape[1])
    plain = replace(spec, scale_bits=16)
    chosen = [_best(w[rows], blocks, plain, outer, ranges) for rows in row_chunks(w, spec)]
    low, high = (torch.cat(ends) for ends in zip(*chosen, strict=True))
    return qparams_of_range(low, high, spec, outer)


def _best(w: Tensor, blocks: Tensor, spec: QuantSpec, outer: Tensor | None, ranges: list[Range]) -> Ends:
    g = grouped(w, spec)
    whole = extremes(g, spec)
    best, least = whole, torch.full_like(whole[0], torch.inf)
    for made in ranges:
        tried = made(*whole)
        delta = round_to_grid(g, *qparams_of_range(*tried, spec, outer), spec) - g
        error = group_error(delta, blocks, spec)
        better = error < least
        least = torch.where(better, error, least)
        best = (torch.where(better, tried[0], best[0]), torch.where(better, tried[1], best[1]))
    return best
