"""Fake quantization: real numbers, rounded to the grid of a few bits, kept as real numbers.

    integers    q = clamp(round(x / s) + z, qmin, qmax)        x̂ = s · (q − z)
    formats     q = the nearest number of the format to x / s  x̂ = s · q

`s` is the scale and `z` the zero-point. Both are computed in float32 at least, whatever the input's dtype, and have the
shape of the grouped input with a last axis of one. A group that holds infinities or NaN comes out as NaN.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qbench.errors import Unsuitable
from qbench.quant.minifloat import (
    largest,
    largest_exponent,
    power_of_two_below,
    round_to_format,
    straight_through,
)
from qbench.quant.spec import QuantSpec

TINY = torch.finfo(torch.float32).tiny
E4M3_LEAST = 2.0**-9  # the smallest positive number of e4m3


class QParams(NamedTuple):
    """Scale and zero-point, each `(..., n_groups, 1)`; rows of a block each have theirs."""

    scale: Tensor
    zero: Tensor


def grouped(x: Tensor, spec: QuantSpec) -> Tensor:
    """View `x` as `(..., n_groups, group_size)`: the elements of a row that share a scale lie along the last axis.

    Raises:
        ValueError: If the last axis does not divide into groups, or `x` has no rows to make blocks of.
    """
    if spec.granularity == "tensor":
        return x.reshape(1, -1)
    if spec.granularity == "block" and x.dim() < 2:
        raise ValueError(f"blocks have rows and columns, the tensor has shape {tuple(x.shape)}; use groups")
    size = spec.group_size or x.shape[-1]
    if x.shape[-1] % size:
        raise ValueError(
            f"the last axis ({x.shape[-1]}) is not a multiple of group_size ({size}); "
            "choose a group_size that divides it, or -1 for one group per row"
        )
    return x.reshape(*x.shape[:-1], -1, size)


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is so already."""
    return x if x.dtype == torch.float64 else x.float()


def group_sum(g: Tensor, spec: QuantSpec) -> Tensor:
    """Sums over what shares a scale, `(..., n_groups, 1)`; `g` as from `grouped`."""
    return _over_blocks(g.sum(-1, keepdim=True), spec, "sum")


def extremes(g: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The lowest and the highest element of what shares a scale, each `(..., n_groups, 1)`; `g` as from `grouped`."""
    lo, hi = wide(g.amin(-1, keepdim=True)), wide(g.amax(-1, keepdim=True))
    return -_over_blocks(-lo, spec, "amax"), _over_blocks(hi, spec, "amax")


def choose_qparams(
    x: Tensor,
    spec: QuantSpec,
    keep: tuple[Tensor | float, Tensor | float] = (1.0, 1.0),
    outer: Tensor | None = None,
) -> QParams:
    """Min–max range of each group, of which `keep` = (lower, upper) fractions are kept.

    One bit is another matter: the levels are the mean plus and minus the mean absolute deviation (SliM-LLM,
    arXiv:2405.14917), and `keep` is not looked at.

    Args:
        outer: What `outer_scale` says of a larger tensor that `x` is a part of.
    """
    g = grouped(x, spec)
    if spec.bits == 1:
        return qparams_of_range(*_two_levels(wide(g), spec), spec)
    lo, hi = extremes(g, spec)
    if outer is None and spec.scale_format == "e4m3":
        outer = _outer(torch.maximum(lo.abs(), hi.abs()), spec)
    return qparams_of_range(lo * keep[0], hi * keep[1], spec, outer)


def qparams_of_range(lo: Tensor, hi: Tensor, spec: QuantSpec, outer: Tensor | None = None) -> QParams:
    """The grid that spans `lo` … `hi`, each `(..., n_groups, 1)`.

    A symmetric grid spans as far as the end that is further from zero. An asymmetric one is widened to contain zero,
    unless `zero_in_range` is unset; an empty range always is. Real zero-points are not clamped. The two levels of one
    bit are `lo` and `hi`.

    Args:
        outer: The second scale where scales are in e4m3; that of `lo` and `hi` if not given.
    """
    if spec.zero_in_range and spec.bits > 1:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    else:
        empty = hi <= lo
        lo, hi = torch.where(empty, lo.clamp(max=0), lo), torch.where(empty, hi.clamp(min=0), hi)
    span = torch.maximum(lo.abs(), hi.abs()) if spec.symmetric else hi - lo
    if outer is None and spec.scale_format == "e4m3":
        outer = _outer(span, spec)
    scale = _stored_scale(span / _top(spec), spec, outer)
    return QParams(scale, _zero(lo, scale, spec))


def outer_scale(x: Tensor, spec: QuantSpec) -> Tensor | None:
    """The second scale of NVFP4, of each row or of the whole tensor: the largest group's scale has code 448.

    None where scales are not in e4m3. Needed where the grids of a tensor's parts are chosen one at a time.
    """
    if spec.scale_format != "e4m3":
        return None
    lo, hi = extremes(grouped(x, spec), spec)
    return _outer(torch.maximum(lo.abs(), hi.abs()), spec)


def round_to_grid(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """Snap `x` to the nearest grid point. `scale` and `zero` broadcast against `x`.

    What lies beyond the grid becomes its end. Gradients pass through rounding as if it were not there, and reach
    `scale` and `zero` through the formula.
    """
    y = wide(x) / scale
    if spec.format != "int":
        top = largest(spec.format)
        q = straight_through(y.clamp(-top, top), partial(round_to_format, name=spec.format))
        return (scale * q).to(x.dtype)
    q = _round(y + zero) if _zero_is_real(spec) else _round(y) + zero
    return (scale * (q.clamp(spec.qmin, spec.qmax) - zero)).to(x.dtype)


def fake_quantize(x: Tensor, spec: QuantSpec, qparams: QParams | None = None) -> Tensor:
    """Snap `x` to its own min–max grid, or to the grid given by `qparams`."""
    qparams = qparams or choose_qparams(x, spec)
    return round_to_grid(grouped(x, spec), *qparams, spec).reshape(x.shape)


def _over_runs(x: Tensor, size: int, operation: str) -> Tensor:
    """Replace each row's entry by the `"sum"` or `"amax"` of its run of `size` rows; the last run may be short.

    `x` is `(..., rows, n_groups, 1)`, and so is what is returned.
    """
    rows = x.shape[-3]
    padding = 0.0 if operation == "sum" else -torch.inf
    runs = F.pad(x, (0, 0, 0, 0, 0, -rows % size), value=padding).unflatten(-3, (-1, size))
    reduced = (runs.sum if operation == "sum" else runs.amax)(-3, keepdim=True)
    return reduced.expand_as(runs).flatten(-4, -3)[..., :rows, :, :]


def _over_blocks(x: Tensor, spec: QuantSpec, operation: str) -> Tensor:
    return _over_runs(x, spec.group_size or 1, operation) if spec.granularity == "block" else x


def _round(x: Tensor) -> Tensor:
    return straight_through(x, torch.round)


def _zero_is_real(spec: QuantSpec) -> bool:
    return not spec.symmetric and (spec.real_zero or spec.bits == 1)


def _two_levels(g: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    count = group_sum(torch.ones_like(g[..., :1]), spec) * g.shape[-1]
    mean = group_sum(g, spec) / count
    deviation = group_sum((g - mean).abs(), spec) / count
    return mean - deviation, mean + deviation


def _top(spec: QuantSpec) -> float:
    """The number, in units of the scale, that the end of the range is mapped to."""
    if spec.format != "int":
        top = largest(spec.format)
    elif spec.symmetric and spec.symmetric_mode == "gptq":
        top = spec.qmax / 2
    else:
        top = float(spec.qmax)
    # OCP MX 1.0, section 6.3: the scale's exponent is the range's less the element type's largest, so that numbers
    # between the type's largest and the next power of two saturate.
    return 2.0 ** largest_exponent(top) if spec.scale_format == "e8m0" else top


def _stored_scale(scale: Tensor, spec: QuantSpec, outer: Tensor | None) -> Tensor:
    """The scale as it is stored, always positive.

    Groups of zeros have no range, and any scale serves; nor may it be subnormal, where x / scale would overflow.
    """
    if spec.scale_format == "e4m3":
        assert outer is not None
        outer = torch.where(outer <= TINY / E4M3_LEAST, 1.0, outer)
        code = straight_through(scale / outer, partial(round_to_format, name="e4m3"))
        # A code of zero would lose groups below 2^-10 / 448 of the largest; the least code keeps what it can.
        return torch.where(code <= 0, E4M3_LEAST, code) * outer
    if spec.scale_bits < 16:
        scale = _requantized(scale, spec, unused=scale <= TINY)
    scale = torch.where(scale <= TINY, 1.0, scale)
    if spec.scale_format == "e8m0":
        return straight_through(scale, power_of_two_below).clamp(max=2.0**127)
    return scale


def _outer(reach: Tensor, spec: QuantSpec) -> Tensor:
    """The second scale, from the largest magnitude of each group, `(..., n_groups, 1)`."""
    reach = reach.amax(-2, keepdim=True) if spec.outer_row else reach.amax()
    return reach / (largest("e4m3") * _top(spec))


def _zero(lo: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    if spec.symmetric:
        shifted = spec.format == "int" and spec.symmetric_mode == "gptq"
        return torch.full_like(scale, 2.0 ** (spec.bits - 1) if shifted else 0.0)
    zero = -lo / scale
    if not _zero_is_real(spec):
        return _round(zero).clamp(0, spec.qmax)
    return _requantized(zero, spec, torch.zeros_like(zero).bool()) if spec.scale_bits < 16 else zero


def _requantized(values: Tensor, spec: QuantSpec, unused: Tensor) -> Tensor:
    """Snap scales, or zero-points, to a min–max grid of `scale_bits` in each run of `scale_group` rows.

    The grid starts at the least value of the run, so scales stay positive. Dettmers et al., "SpQR", arXiv:2306.03078:
    bilevel quantization. Values that are not used are left out of the range, and brought into it.
    """
    if values.dim() < 3:
        raise Unsuitable("scales are quantized in runs of rows", "a single scale has none; set scale_bits=16")
    lo = -_over_runs(-values.masked_fill(unused, torch.inf), spec.scale_group, "amax")
    hi = _over_runs(values.masked_fill(unused, -torch.inf), spec.scale_group, "amax")
    lo, hi = torch.where(lo > hi, 0.0, lo), torch.where(lo > hi, 0.0, hi)  # no value of the run is used
    step = (hi - lo) / (2**spec.scale_bits - 1)
    step = torch.where(step <= 0, 1.0, step)
    return lo + step * _round((values.clamp(lo, hi) - lo) / step)
