"""HQQ: choose zero-points by half-quadratic splitting; no calibration data.

Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", Mobius Labs, 2023. With the scale fixed,
the p-norm (p < 1) of the rounding error is minimized over the zero-point, in turns with an auxiliary error E:

    E ← shrink(w − ŵ)        shrink(e) = sign(e) · relu(|e| − |e|^(p−1) / β)
    z ← mean(q − (w − E) / s) = z + mean(E − (w − ŵ)) / s        β ← κ β

Few large errors cost less than many small ones under such a norm, so outliers are given up for the rest of a group.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.algorithms.base import Algorithm, Choice, Kind
from qbench.calib.block import Block
from qbench.errors import Unsuitable
from qbench.quant.grid import QParams, choose_qparams, group_sum, grouped, round_to_grid, wide
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec


@dataclass(frozen=True)
class HQQ(Algorithm):
    """Choose each group's zero-point, a real number; the scale is that of min–max, or that a step before has chosen.

    A rounder follows: to nearest (the paper), or any other that honours chosen grids.

    Attributes:
        p: Of the norm (`lp_norm`).
        beta, kappa: The penalty on E − (w − ŵ), and its growth at each step.
        steps: At most so many (`iters`). A layer ends earlier when its mean magnitude of error no longer falls.
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    steps: int = 20

    kind: ClassVar[Kind] = "clip"
    chooses: ClassVar[frozenset[Choice]] = frozenset({"zeros"})
    uses: ClassVar[frozenset[Choice]] = frozenset({"scales"})
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1 or self.beta <= 0 or self.kappa < 1 or self.steps < 1:
            raise ValueError(
                f"HQQ has p={self.p}, beta={self.beta}, kappa={self.kappa}, steps={self.steps}; p must be in (0, 1], "
                "beta positive, kappa and steps at least 1"
            )

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)
        for spec in scheme.weights:
            if not spec.real_zero or spec.scale_bits < 16:
                raise Unsuitable(
                    "HQQ chooses zero-points that are real numbers",
                    f"the scheme is {scheme}; set real_zero=true, scale_bits=16 and weight_symmetric=false",
                )

    @torch.no_grad()
    def process(self, block: Block) -> None:
        for name, linear in block.linears.items():
            if (spec := block.weight_spec(name)) is not None:
                start = block.grids.get(name)
                block.grids[name] = self.grid(linear.weight, spec, block.kept_mask((name,)), start)

    def grid(
        self, w: Tensor, spec: QuantSpec, kept: Tensor | None = None, start: QParams | None = None
    ) -> QParams:
        """A grid for `w`, `(out, in)`, with the zero-points of the least mean |w − ŵ| that were met.

        Args:
            kept: Mask of the weights that stay in floating point.
            start: Scales and first zero-points; those of min–max if not given.
        """
        w = wide(w) if kept is None else wide(w).masked_fill(kept, 0.0)
        share = grouped(torch.ones_like(w) if kept is None else (~kept).to(w), spec)
        count = group_sum(share, spec).clamp(min=1)
        g, beta, least = grouped(w, spec), self.beta, torch.inf
        scale, zero = start or choose_qparams(w, spec)
        best = zero
        for _ in range(self.steps):
            error = (g - round_to_grid(g, scale, zero, spec)) * share
            mean = float(error.abs().mean())
            if mean >= least:
                break
            best, least = zero, mean
            zero = zero + group_sum(self._shrink(error, beta) - error, spec) / count / scale
            beta *= self.kappa
        return QParams(scale, best)

    def _shrink(self, error: Tensor, beta: float) -> Tensor:
        size = error.abs()
        return error.sign() * (size - size ** (self.p - 1) / beta).relu()
