"""Choosing a range that is narrower than min–max: a few values saturate, and all others get finer steps.

Search by p-norm error, with the constants of GPTQ's and LLMC's code (`maxshrink` 0.8, `grid` 100, `norm` 2.4);
percentiles, and error search on a histogram, for static activation ranges (Migacz, "8-bit Inference with TensorRT",
GTC 2017; Wu et al., "Integer Quantization for Deep Learning Inference", arXiv:2004.09602, section 5).
"""

import math
from dataclasses import replace
from itertools import product

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
    wide,
)
from qbench.quant.spec import QuantSpec

CHUNK = 2**22  # elements whose error is computed at a time


@torch.no_grad()
def search_range(
    w: Tensor,
    spec: QuantSpec,
    weight: Tensor | None = None,
    n_grid: int | None = None,
    max_shrink: float = 0.8,
    p: float = 2.4,
    *,
    asymmetric: bool = False,
) -> QParams:
    """The grid of each group, of its min–max range shrunk by 1 − i / n_grid, that minimizes Σ |ŵ − w|^p.

    Ties go to the wider range, so the error never exceeds that of min–max. The range of one bit is not searched. Scales
    that are quantized in their turn (`scale_bits`) are so after the search.

    Args:
        weight: Importance of each element's error, broadcast against `w`: `(in,)` for one per column.
        n_grid: Steps from the whole range to none; 100, or 20 with `asymmetric`.
        max_shrink: Share of those steps tried.
        asymmetric: Shrink both ends independently, which tries the square of that number of ranges.

    Raises:
        ValueError: If no range would be tried, or a symmetric grid is to be shrunk asymmetrically.
    """
    n_grid = (20 if asymmetric else 100) if n_grid is None else n_grid
    fractions = _fractions(n_grid, max_shrink)
    if asymmetric and spec.symmetric:
        raise ValueError("a symmetric grid has one range, not two ends; unset asymmetric, or spec.symmetric")
    if spec.bits == 1:
        return choose_qparams(w, spec)
    g, outer, plain = grouped(w, spec), outer_scale(w, spec), replace(spec, scale_bits=16)
    importance = None if weight is None else grouped(wide(weight).to(w.device).expand_as(w), spec)
    lo, hi = extremes(g, spec)
    best = torch.full_like(lo, torch.inf)
    keep_lo, keep_hi = torch.ones_like(lo), torch.ones_like(hi)
    for low, high in product(fractions, repeat=2) if asymmetric else zip(fractions, fractions, strict=True):
        error = _error(g, importance, qparams_of_range(lo * low, hi * high, plain, outer), plain, p)
        better = error < best
        best = torch.where(better, error, best)
        keep_lo, keep_hi = torch.where(better, low, keep_lo), torch.where(better, high, keep_hi)
    return choose_qparams(w, spec, (keep_lo, keep_hi), outer)


def percentile_range(x: Tensor, q: float) -> tuple[Tensor, Tensor]:
    """The values that `q` per cent of the last axis do not exceed, and do not fall below; each `(..., 1)`.

    Both are elements of `x` (the nearest rank); NaN where `x` holds infinities or NaN.

    Raises:
        ValueError: If `q` is not in (50, 100].
    """
    _check_percentile(q)
    rank = max(1, math.ceil(q / 100 * x.shape[-1]))
    unfit = (x * 0).sum(-1, keepdim=True)  # zero, but NaN where something is not finite
    hi = x.kthvalue(rank, -1, keepdim=True).values
    lo = x.kthvalue(x.shape[-1] + 1 - rank, -1, keepdim=True).values
    return lo + unfit, hi + unfit


class Histogram:
    """Counts of values in bins of equal width, filled a batch at a time.

    Bins lie on both sides of zero and their width is a power of two, doubled when a value lies beyond. Doubling merges
    pairs of bins, so the counts are those of all the data at once, in whatever batches and order it came.

    Attributes:
        counts: `(2 bins,)`, float64; the first half counts negative values.
    """

    def __init__(self, bins: int = 2048) -> None:
        if bins < 2 or bins % 2:
            raise ValueError(
                f"a histogram merges pairs of bins, {bins} were asked for; choose an even number"
            )
        self.bins = bins
        self.counts = torch.zeros(2 * bins, dtype=torch.float64)
        self._exponent = -100  # the bins reach to 2^exponent
        self._lo = self._hi = torch.zeros(0)

    @property
    def width(self) -> float:
        return 2.0**self._exponent / self.bins

    def add(self, x: Tensor) -> None:
        """Count the elements of `x`.

        Raises:
            FloatingPointError: If `x` holds infinities or NaN, which lie in no bin.
        """
        x = wide(x.detach()).flatten()
        lo, hi = x.amin().view(1, 1), x.amax().view(1, 1)
        reach = max(-lo.item(), hi.item())
        if not math.isfinite(lo.item() - hi.item()):
            raise FloatingPointError(
                f"a histogram cannot count values from {lo.item()} to {hi.item()}; "
                "use model.dtype=float32, or look for what overflows"
            )
        if self._lo.numel():
            lo, hi = torch.minimum(lo, self._lo), torch.maximum(hi, self._hi)
        self._lo, self._hi = lo, hi
        self.counts = self.counts.to(x.device)
        while reach >= 2.0**self._exponent:
            middle = self.bins // 2
            self.counts = torch.nn.functional.pad(self.counts.view(-1, 2).sum(-1), (middle, middle))
            self._exponent += 1
        index = (x / self.width).floor().long() + self.bins
        self.counts += torch.bincount(index, minlength=len(self.counts))

    def percentile(self, q: float) -> tuple[Tensor, Tensor]:
        """As `percentile_range`, to within the width of a bin, outwards; each `(1, 1)`.

        Raises:
            ValueError: If `q` is not in (50, 100], or nothing was counted.
        """
        _check_percentile(q)
        lo, hi = self._range()
        target = self.counts.sum() * (q / 100)
        above = torch.searchsorted(self.counts.cumsum(0), target) + 1 - self.bins
        below = torch.searchsorted(self.counts.flip(0).cumsum(0), target) + 1 - self.bins
        return torch.maximum(lo, -below * self.width), torch.minimum(hi, above * self.width)

    @torch.no_grad()
    def mse_range(self, spec: QuantSpec, n_grid: int = 100, max_shrink: float = 0.8) -> tuple[Tensor, Tensor]:
        """The range, of those shrunk by 1 − i / n_grid, with the least mean squared error; each `(1, 1)`.

        A bin's values count as its middle. The ends of an asymmetric grid's range shrink independently.

        Raises:
            ValueError: If nothing was counted, or no range would be tried.
        """
        lo, hi = self._range()
        kept = self.counts > 0
        middle = (torch.arange(len(self.counts), device=kept.device)[kept] + 0.5 - self.bins) * self.width
        middle, counts = middle.to(lo).clamp(lo[0], hi[0]), self.counts[kept]
        fractions = lo.new_tensor(_fractions(n_grid, max_shrink)).view(-1, 1, 1)
        own = replace(spec, granularity="row", group_size=None, outer_row=True, scale_bits=16)
        best, found = math.inf, (lo, hi)
        for low in [fractions] if spec.symmetric else fractions.unbind(0):
            lows, highs = (lo * low).expand_as(fractions), hi * fractions
            q = round_to_grid(middle, *qparams_of_range(lows, highs, own), own)
            errors = ((q - middle).double().square() * counts).sum((-2, -1))
            least = int(errors.argmin())
            if errors[least] < best:
                best, found = float(errors[least]), (lows[least], highs[least])
        return found

    def _range(self) -> tuple[Tensor, Tensor]:
        if not self._lo.numel():
            raise ValueError("nothing was counted in this histogram; call add first")
        return self._lo, self._hi


def _fractions(n_grid: int, max_shrink: float) -> list[float]:
    if not 0 < max_shrink < 1 or max_shrink * n_grid < 1:
        raise ValueError(
            f"n_grid * max_shrink = {n_grid} * {max_shrink} ranges would be tried; "
            "max_shrink must be between 0 and 1, and their product at least 1"
        )
    return [1 - i / n_grid for i in range(int(max_shrink * n_grid))]


def _check_percentile(q: float) -> None:
    if not 50 < q <= 100:
        raise ValueError(f"the percentile is {q}, it must be above 50 and at most 100, e.g. 99.99")


def _error(g: Tensor, importance: Tensor | None, qparams: QParams, spec: QuantSpec, p: float) -> Tensor:
    """Σ importance · |ĝ − g|^p over what shares a scale, `(..., n_groups, 1)`, a chunk at a time."""
    whole = spec.granularity == "tensor"
    axis, step = (-1, CHUNK) if whole else (0, max(1, CHUNK // g[0].numel()))
    if spec.granularity == "block" and g.dim() == 3:
        assert spec.group_size is not None
        step = -(-step // spec.group_size) * spec.group_size  # blocks stay whole
    errors = []
    for start in range(0, g.shape[axis], step):
        n = min(step, g.shape[axis] - start)
        part = g.narrow(axis, start, n)
        own = qparams if whole else QParams(*(q.narrow(0, start, n) for q in qparams))
        error = (round_to_grid(wide(part), *own, spec) - part).abs().pow_(p)
        if importance is not None:
            error.mul_(importance.narrow(axis, start, n))
        errors.append(group_sum(error, spec))
    return torch.stack(errors).sum(0) if whole else torch.cat(errors)
