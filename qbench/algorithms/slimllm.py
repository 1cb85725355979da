"""SliM-LLM: GPTQ whose grids weigh the errors of salient weights, in groups of which the salient ones have more bits.

Huang et al., "SliM-LLM: Salience-Driven Mixed-Precision Quantization for Large Language Models", ICML 2025,
arXiv:2405.14917. Bits are moved between groups beforehand, by `qbench.algorithms.sba`; here is salience-weighted
quantizer calibration, section 3.3. SliM-LLM+ has OmniQuant's learned clipping and round to nearest in its place.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.algorithms.base import Algorithm, Choice, Kind
from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.sba import salience
from qbench.calib.block import Block
from qbench.calib.observers import Gram
from qbench.errors import Unsuitable
from qbench.quant.grid import QParams, choose_qparams, extremes, grouped, qparams_of_range, round_to_grid
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec


@dataclass(frozen=True)
class SQC(Algorithm):
    """Salience-weighted quantizer calibration, inside GPTQ in the order of the columns.

    When GPTQ reaches a group its min-max range is multiplied by τ, for each row the one with the least error.

    Attributes:
        salient_weight: What the error of a salient weight counts, in units of any other's (`lambda_salience`).
        threshold: Standard deviations by which salience exceeds its mean in a group where a weight counts as salient.
        reach: τ is tried from `1 − reach` to `1 + reach`.
        n_tau: Values of τ on either side of 1.
        norm: Exponent of an error.
        damp: Added to the Hessian's diagonal, as a fraction of its mean (`percdamp`).
        true_sequential: Refresh statistics after each group of layers.
    """

    salient_weight: float = 1.0
    threshold: float = 3.0
    reach: float = 0.1
    n_tau: int = 50
    norm: float = 2.4
    damp: float = 0.01
    true_sequential: bool = True

    kind: ClassVar[Kind] = "round"
    revision: ClassVar[int] = 2
    uses: ClassVar[frozenset[Choice]] = frozenset()
    uses_bits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.salient_weight <= 0 or not 0 < self.reach < 1 or self.n_tau < 1:
            raise ValueError(
                f"SQC's salient_weight is {self.salient_weight}, reach {self.reach} and n_tau {self.n_tau}; "
                "they must be positive, and reach below 1"
            )

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)
        for spec in scheme.weights:
            if spec.spans_rows or spec.scale_format == "e4m3":
                raise Unsuitable(
                    "SQC chooses one group's grid at a time",
                    f"in {scheme} groups depend on one another; set group_size, and scale_bits=16",
                )

    @torch.no_grad()
    def process(self, block: Block) -> None:
        gptq = GPTQ(damp=self.damp, act_order=False, static_groups=False)
        passes = block.sequential(Gram) if self.true_sequential else block.observe(Gram).items()
        for link, (gram,) in passes:
            for name in link.sinks:
                if (spec := block.weight_spec(name)) is None:
                    continue
                weight, bits, kept = (
                    block.linear(name).weight,
                    block.group_bits.get(name),
                    block.kept_mask((name,)),
                )
                rounded, block.grids[name] = gptq.solve(
                    weight.to(gram), gram, spec, None, kept, bits, self.grid
                )
                weight.copy_(rounded)

    def grid(self, w: Tensor, spread: Tensor, spec: QuantSpec) -> QParams:
        """The best grid of each row of one group, `w`, `(out, group_size)`; `spread` are the columns' `U_jj`."""
        if spec.bits == 1:
            return choose_qparams(w, spec)
        importance = torch.where(self.salient(salience(w, spread)), self.salient_weight, 1.0)[:, None]
        g = grouped(w, spec)
        low, high = extremes(g, spec)
        best, least = qparams_of_range(low, high, spec), torch.full_like(low, torch.inf)
        for tau in self._tried():
            tried = qparams_of_range(low * tau, high * tau, spec)
            error = ((round_to_grid(g, *tried, spec) - g).abs_().pow_(self.norm) * importance).sum(
                -1, keepdim=True
            )
            better = error < least
            least = torch.where(better, error, least)
            best = QParams(*(torch.where(better, *pair) for pair in zip(tried, best, strict=True)))
        return best

    def salient(self, salience: Tensor) -> Tensor:
        """Which weights of a group are salient, by their salience, `(out, group_size)`."""
        return (salience - salience.mean()) > self.threshold * salience.std()

    def _tried(self) -> list[float]:
        steps = [self.reach * i / self.n_tau for i in range(1, self.n_tau + 1)]
        return [1.0, *(1 + step for step in steps), *(1 - step for step in steps)]
