"""Learnable weight clipping: the ends of each group's range as trainable fractions.

Shao et al., "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models", ICLR 2024,
arXiv:2308.13137, Equation 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qbench.quant.grid import QParams
from qbench.quant.mixed import choose_mixed, quantize_mixed
from qbench.quant.spec import QuantSpec

START = 4.0  # of the logits in the paper: sigmoid(4) = 0.982 of the range


@dataclass(frozen=True)
class Clip:
    """The grid of one weight: of its groups' ranges, the fractions `sigmoid(logits)` are kept.

    Attributes:
        lower, upper: Logits of the fractions of both ends, `(…, n_groups, 1)`. A symmetric grid has one fraction, and
            then they are one tensor. Rows of one block share theirs.
        kept: What stays in floating point of the weight, and has no part in the ranges.
        group_bits: The width of each group, `(n_groups,)`, where they differ; the levels of one bit are not clipped.
    """

    spec: QuantSpec
    lower: Tensor
    upper: Tensor
    kept: Tensor | None
    group_bits: Tensor | None = None

    @classmethod
    def of(
        cls,
        weight: Tensor,
        spec: QuantSpec,
        grid: QParams | None,
        kept: Tensor | None,
        most: float = START,
        group_bits: Tensor | None = None,
    ) -> "Clip":
        """Start from the logits `most`, or from the share of the whole range that `grid` spans, if that is less."""
        whole = choose_mixed(_ranged(weight, kept), spec, group_bits).scale
        start = torch.full_like(whole, most)
        if grid is not None:
            start = (grid.scale / whole).clamp(min=0.01).minimum(start.sigmoid()).logit()
        if spec.granularity == "block":
            start = start[:: spec.group_size]
        return cls(spec, start, start if spec.symmetric else start.clone(), kept, group_bits)

    @property
    def logits(self) -> list[Tensor]:
        return [self.lower] if self.spec.symmetric else [self.lower, self.upper]

    def grid(self, weight: Tensor) -> QParams:
        """The grid of `weight`, `(out, in)`; differentiable, straight through the rounding of zero-points."""
        lower, upper = (self._of_rows(x.sigmoid(), len(weight)) for x in (self.lower, self.upper))
        return choose_mixed(_ranged(weight, self.kept), self.spec, self.group_bits, (lower, upper))

    def quantize(self, weight: Tensor) -> Tensor:
        """`weight` on its grid, save what is kept; differentiable, straight through rounding."""
        quantized = quantize_mixed(weight, self.spec, self.group_bits, self.grid(weight))
        return quantized if self.kept is None else torch.where(self.kept, weight, quantized)

    def _of_rows(self, fraction: Tensor, rows: int) -> Tensor:
        if self.spec.granularity != "block":
            return fraction
        return fraction.repeat_interleave(self.spec.group_size or 1, 0)[:rows]


def _ranged(weight: Tensor, kept: Tensor | None) -> Tensor:
    return weight if kept is None else weight.masked_fill(kept, 0.0)
