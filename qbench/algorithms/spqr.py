"""SpQR: GPTQ in small groups, with the weights that cannot be rounded well left in floating point.

Dettmers et al., "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression", ICLR 2024,
arXiv:2306.03078, Algorithm 1. The scheme brings the rest of it, the quantized scales and zero-points (`scheme=spqr`).

A weight's error weighs `(w − ŵ)² / U_jj²`, where `U` is the factor of the inverse Hessian in GPTQ's order. A group's
range is chosen without the weights whose absence would lower the group's error by more than a threshold; whatever
meets the threshold when its column is rounded is kept.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qbench.algorithms.base import Algorithm, Choice, Kind
from qbench.calib.block import Block
from qbench.calib.observers import Gram
from qbench.errors import Unsuitable
from qbench.quant.factor import inverse_factor
from qbench.quant.grid import QParams, grouped, qparams_of_range, round_to_grid
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec


@dataclass(frozen=True)
class SpQR(Algorithm):
    """Second-order weight rounding with outliers.

    Groups are of neighbouring columns and their ranges those of the unrounded weight, whatever the order; in the
    authors' code they follow the order, which a deployment must then store, and see the errors of the groups before.

    Attributes:
        relative_threshold: Error from which a weight is kept, in units of the layer's mean of `var(W_j) / U_jj²`.
        simplified: Leave nothing out of the ranges, which saves two roundings of the weight.
        damp: Added to the Hessian's diagonal, as a fraction of its mean (`percdamp`).
        act_order: Round columns by decreasing Hessian diagonal.
        block_size: Columns updated lazily together; affects speed only.
        true_sequential: Refresh statistics after each group of layers.
    """

    relative_threshold: float = 0.2
    simplified: bool = False
    damp: float = 1.0
    act_order: bool = True
    block_size: int = 128
    true_sequential: bool = True

    kind: ClassVar[Kind] = "round"
    revision: ClassVar[int] = 2
    uses: ClassVar[frozenset[Choice]] = frozenset()
    uses_kept: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if min(self.relative_threshold, self.damp) <= 0 or self.block_size < 1:
            raise ValueError(
                f"SpQR's relative_threshold, damp and block_size are {self.relative_threshold}, {self.damp} and "
                f"{self.block_size}; they must be positive"
            )

    @property
    def mixes(self) -> str:
        return "single weights that stay in floating point"

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)
        for spec in scheme.weights:
            if spec.granularity in ("tensor", "block") or spec.scale_format == "e4m3" or spec.bits == 1:
                raise Unsuitable(
                    "SpQR leaves weights out of the min-max range of one row's group",
                    f"in {scheme} a scale depends on other weights too; set wbits >= 2 and a group_size",
                )

    @torch.no_grad()
    def process(self, block: Block) -> None:
        passes = block.sequential(Gram) if self.true_sequential else block.observe(Gram).items()
        for link, (gram,) in passes:
            specs = {name: spec for name in link.sinks if (spec := block.weight_spec(name)) is not None}
            if not specs:
                continue
            order, factor = self.factor(gram)
            for name, spec in specs.items():
                weight = block.linear(name).weight
                # Channels that are never active: any weight serves, zero is on the grid.
                w = weight.to(gram).masked_fill(gram.diagonal() == 0, 0.0)
                rounded, block.kept[name], block.grids[name] = self.round(w, order, factor, spec)
                weight.copy_(rounded)
                block.report.setdefault("kept_weights", {})[name] = int(block.kept[name].sum())

    def factor(self, gram: Tensor) -> tuple[Tensor, Tensor]:
        """The order of the columns, and the factor of the inverse Hessian in that order, in float64."""
        diagonal = gram.diagonal()
        order = torch.arange(len(gram), device=gram.device)
        if self.act_order:
            order = torch.argsort(diagonal, descending=True, stable=True)
        return order, inverse_factor(gram, order, self.damp)

    def round(
        self, w: Tensor, order: Tensor, factor: Tensor, spec: QuantSpec
    ) -> tuple[Tensor, Tensor, QParams]:
        """Round `w`, `(out, in)`; returns it with a mask of what is kept, and the grid of the rest.

        `order` and `factor` are as from `factor`.
        """
        n, back = w.shape[1], torch.argsort(order)
        importance = factor.diagonal().to(w).square().reciprocal()[back]
        threshold = self.relative_threshold * (w.var(0) * importance).mean()
        grid = self.grids(w, importance, threshold, spec)
        # From here on a column of the weight is a row, which lies together in memory.
        wt = w.T[order].contiguous()
        scale, zero = (part.to(w).squeeze(-1).T.contiguous() for part in grid)
        groups = (order // (spec.group_size or n)).tolist()
        kept = torch.zeros_like(wt, dtype=torch.bool)
        for start in range(0, n, self.block_size):
            stop = min(start + self.block_size, n)
            # A block's rows in the weight's precision, so that there is no second matrix beside the factor.
            rows, errors = factor[start:stop].to(wt), torch.empty_like(wt[start:stop])
            for j in range(start, stop):
                snapped = round_to_grid(wt[j], scale[groups[j]], zero[groups[j]], spec)
                error = (wt[j] - snapped) / rows[j - start, j]
                kept[j] = error.square() > threshold
                q = torch.where(kept[j], wt[j], snapped)
                errors[j - start] = error.masked_fill(kept[j], 0.0)
                wt[j:stop].addr_(rows[j - start, j:stop], errors[j - start], alpha=-1)
                wt[j] = q
            wt[stop:].addmm_(rows[:, stop:].T, errors, alpha=-1)
        return wt[back].T, kept[back].T, grid

    def grids(self, w: Tensor, importance: Tensor, threshold: Tensor, spec: QuantSpec) -> QParams:
        """Each group's grid, of the range of what is no likely outlier; `importance` is `(in,)`."""
        g = grouped(w, spec)
        outlier = torch.zeros_like(g, dtype=torch.bool)
        if not self.simplified:
            plain = replace(spec, scale_bits=16)
            outlier = leave_one_out(g, grouped(importance.expand_as(w), spec), plain) > threshold
        return grid_without(outlier, g, spec)


def leave_one_out(g: Tensor, importance: Tensor, spec: QuantSpec) -> Tensor:
    """By how much a group's error falls if one weight is kept and has no part in the range, for each weight.

    All are `(..., n_groups, group_size)`. Only without one of its two extremes has a group another range: for all other
    weights the error falls by their own.
    """

    def errors(outlier: Tensor) -> Tensor:
        q = round_to_grid(g, *grid_without(outlier, g, spec), spec)
        return ((q - g).square() * importance).masked_fill(outlier, 0.0)

    own = errors(torch.zeros_like(g, dtype=torch.bool))
    fall = own.clone()
    for extreme in (g.argmin(-1, keepdim=True), g.argmax(-1, keepdim=True)):
        alone = torch.zeros_like(g, dtype=torch.bool).scatter_(-1, extreme, True)
        gain = own.sum(-1, keepdim=True) - errors(alone).sum(-1, keepdim=True)
        fall = torch.where(alone, gain, fall)
    return fall


def grid_without(outlier: Tensor, g: Tensor, spec: QuantSpec) -> QParams:
    """The min-max grid of the weights of each group that are no outliers."""
    lo = g.masked_fill(outlier, torch.inf).amin(-1, keepdim=True)
    hi = g.masked_fill(outlier, -torch.inf).amax(-1, keepdim=True)
    return qparams_of_range(lo, hi, spec)
