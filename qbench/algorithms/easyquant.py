"""EasyQuant: leave outlying weights in floating point and shrink the range of the others by gradient; no data.

Tang et al., "EasyQuant: An Efficient Data-free Quantization Algorithm for LLMs", EMNLP 2023, arXiv:2403.02775:
Equation 3 for the outliers, Equation 2 for the gradient of the reconstruction error, Algorithm 1.

`Q(w) = s (q − z)`, where codes and zero-point do not change under a small change of the scale, so
`∂‖Q(w) − w‖² / ∂s = 2 Σ (Q(w) − w) Q(w) / s`, for a scale of a channel (the paper's), a group, or a tensor.
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
class EasyQuant(Algorithm):
    """Keep each weight that is far from the layer's mean, then descend on the scales of the rest.

    Attributes:
        n_sigma: How far, in standard deviations of the layer's weights (the paper's `n`).
        lr: Adam's learning rate, as a fraction of the range at the start. In the paper it is absolute: 1e-3 for BLOOM,
            whose ranges begin near 0.08 (Table 9), and 1e-4 for LLaMA.
        steps: Of Adam. Each scale is the best of those that it has met; none exceeds the first, which saturates nothing.
    """

    n_sigma: float = 3.0
    lr: float = 1e-2
    steps: int = 100

    kind: ClassVar[Kind] = "clip"
    uses: ClassVar[frozenset[Choice]] = frozenset()
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if min(self.n_sigma, self.lr) <= 0 or self.steps < 0:
            raise ValueError(
                f"EasyQuant's n_sigma, lr and steps are {self.n_sigma}, {self.lr} and {self.steps}; the first two must "
                "be positive, and the last not negative"
            )

    @property
    def mixes(self) -> str:
        return "single weights that stay in floating point"

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)
        for spec in scheme.weights:
            if spec.scale_format != "float16" or spec.scale_bits < 16 or spec.bits == 1:
                raise Unsuitable(
                    "EasyQuant learns scales that are real numbers, of two bits or more",
                    f"in {scheme} they are on a grid of their own, or levels are not of a range",
                )

    @torch.no_grad()
    def process(self, block: Block) -> None:
        """Raises ValueError if channels are kept already: a layer keeps channels, or single weights."""
        for name, linear in block.linears.items():
            if (spec := block.weight_spec(name)) is None:
                continue
            if name in block.kept:
                raise ValueError(
                    f"EasyQuant is to keep weights of {name}, of which channels are kept; choose one"
                )
            weight = wide(linear.weight)
            kept = (weight - weight.mean()).abs() >= self.n_sigma * weight.std()
            block.kept[name] = kept
            block.grids[name] = self.descend(weight, kept, spec)
            block.report.setdefault("kept_weights", {})[name] = int(kept.sum())

    def descend(self, w: Tensor, kept: Tensor, spec: QuantSpec) -> QParams:
        """The grids of what is not `kept` of `w`, `(out, in)` each, with the least squared error on the way."""
        g, counts = grouped(w, spec), grouped(~kept, spec)
        first = choose_qparams(w.masked_fill(kept, 0.0), spec)
        fraction = torch.ones_like(first.scale)
        best, least = fraction.clone(), torch.full_like(fraction, torch.inf)
        adam = torch.optim.Adam([fraction], lr=self.lr)
        for step in range(self.steps + 1):
            q = round_to_grid(g, first.scale * fraction, first.zero, spec)
            delta = (q - g) * counts
            error = group_sum(delta.square(), spec)
            best, least = torch.where(error < least, fraction, best), torch.minimum(error, least)
            if step < self.steps:
                # Of the error in units of the first scale, with respect to the fraction.
                fraction.grad = 2 * group_sum(delta * q, spec) / (first.scale.square() * fraction)
                adam.step()
                fraction.clamp_(0.01, 1.0)
        return QParams(first.scale * best, first.zero)
