"""TesseraQ: learn which way weights are rounded, harden the choice a share at a time, and learn scales beside it.

Li & Panda, "TesseraQ: Ultra Low-Bit LLM Post-Training Quantization with Block Reconstruction", 2024, arXiv:2410.19103:
progressive adaptive rounding (Algorithm 1) and dequantization scale tuning, after AdaRound (arXiv:2004.10568):

    ŵ = s · 2h(u) · (clamp(floor(w / s + z) + h(v), qmin, qmax) − z)        h(x) = clamp(1.2 σ(x) − 0.1, 0, 1)

with one `v` for each weight, which starts where nothing is rounded at all, and one `u` for each scale. Scales and
clipping come from the steps before, in the paper from AWQ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor

from qbench.algorithms.base import Algorithm, Choice, Kind
from qbench.algorithms.learn import fit
from qbench.calib.block import Block
from qbench.errors import Unsuitable
from qbench.quant.grid import QParams, choose_qparams, grouped, wide
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec

SOFT = (
    0.8,
    0.65,
    0.5,
    0.43,
    0.38,
    0.34,
    0.3,
    0.27,
    0.24,
    0.21,
    0.18,
    0.15,
    0.12,
    0.1,
    0.08,
    0.06,
    0.04,
    0.02,
    0.01,
    0.005,
)


@dataclass(frozen=True)
class TesseraQ(Algorithm):
    """Learned rounding in rounds, one block at a time.

    The inputs are those of the quantized path, the targets the floating-point block's outputs on its own path.

    Attributes:
        soft: The share of the weights that a round begins with as yet undecided (`thresholds`).
        steps: Of the optimizer in each round (`iterations`).
        batch_size: Samples for each step.
        lr: Adam's learning rate for roundings.
        scale_lr: That for scales; zero leaves them alone.
        decay: Pulls scales towards the ones that they start from.
        seed: Of the samples' order.
    """

    soft: Sequence[float] = SOFT
    steps: int = 250
    batch_size: int = 4
    lr: float = 1e-3
    scale_lr: float = 1e-3
    decay: float = 1e-4
    seed: int = 0

    kind: ClassVar[Kind] = "round"
    needs_float_path: ClassVar[bool] = True

    @property
    def uses(self) -> frozenset[Choice]:  # type: ignore[override]
        return frozenset({"scales", "zeros"}) if self.scale_lr else super().uses

    def __post_init__(self) -> None:
        object.__setattr__(self, "soft", tuple(self.soft))
        falling = all(a > b for a, b in zip(self.soft, self.soft[1:], strict=False))
        if not self.soft or not falling or not 0 <= self.soft[-1] <= self.soft[0] <= 1:
            raise ValueError(f"TesseraQ's soft shares are {list(self.soft)}; they must fall, between 1 and 0")
        if min(self.steps, self.batch_size) < 1 or self.lr <= 0 or self.scale_lr < 0:
            raise ValueError(
                f"TesseraQ's steps are {self.steps}, batch_size {self.batch_size}, lr {self.lr} and scale_lr "
                f"{self.scale_lr}; all but the last must be positive"
            )

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)
        for spec in scheme.weights:
            if spec.granularity == "block":
                raise Unsuitable(
                    "TesseraQ learns scales of rows, and the rows of a block share theirs",
                    f"the scheme is {scheme}; set weight_granularity=auto",
                )
            if spec.format != "int":
                raise Unsuitable(
                    "TesseraQ chooses between two neighbouring integers",
                    f"the scheme is {scheme}; set weight_format=int",
                )
            if self.scale_lr and spec.scale_bits < 16:
                raise Unsuitable(
                    "TesseraQ's scales are real numbers",
                    f"{scheme} quantizes scales; set scale_bits=16, or algo.scale_lr=0",
                )

    @torch.no_grad()
    def process(self, block: Block) -> None:
        assert block.inputs is not None
        assert block.float_outputs is not None
        learned = {
            name: Rounding.of(block, name, s) for name in block.linears if (s := block.weight_spec(name))
        }
        if not learned:
            return
        optimizer, taken = self._optimizer(list(learned.values())), count()

        def weights() -> dict[str, Tensor]:
            if not torch.is_grad_enabled():  # what is measured is what will be taken
                return {f"{name}.weight": r.weight(r.up()) for name, r in learned.items()}
            if (step := next(taken)) % self.steps == 0:
                for r in learned.values():
                    r.harden(self.soft[step // self.steps])
                optimizer.state.clear()
            return {f"{name}.weight": r.weight(rectified(r.logit)) for name, r in learned.items()}

        fit(
            block, "tesseraq", weights, optimizer,
            inputs=block.inputs, targets=block.float_outputs, steps=self.steps * len(self.soft),
            batch_size=self.batch_size, seed=self.seed,
        )  # fmt: skip
        for name, r in learned.items():
            block.linear(name).weight.copy_(r.weight(r.up()))
            block.grids[name] = QParams(r.scale(), r.grid.zero)

    def _optimizer(self, learned: "list[Rounding]") -> torch.optim.Optimizer:
        groups = [{"params": [r.logit.requires_grad_() for r in learned], "lr": self.lr}]
        if self.scale_lr:
            scales = [r.scale_logit.requires_grad_() for r in learned]
            groups.append({"params": scales, "lr": self.scale_lr, "weight_decay": self.decay})
        return torch.optim.Adam(groups)


@dataclass(frozen=True)
class Rounding:
    """How one weight is rounded.

    Attributes:
        original: `(out, in)`.
        grid: `(..., n_groups, 1)` each.
        below: The codes next below the weights, as `grouped` has them; zero-point included.
        logit: `v`, as `below`; infinite where it is decided. `scale_logit`: `u`, as the scale. These are trained.
        kept: What stays in floating point.
    """

    spec: QuantSpec
    original: Tensor
    grid: QParams
    below: Tensor
    logit: Tensor
    scale_logit: Tensor
    kept: Tensor | None

    @classmethod
    def of(cls, block: Block, name: str, spec: QuantSpec) -> "Rounding":
        """Start from the weight itself, on the grid that a step before has chosen, or on the min-max grid."""
        weight, kept = block.linear(name).weight.detach(), block.kept.get(name)
        free = weight if kept is None else weight.masked_fill(kept, 0.0)
        grid = block.grids.get(name) or choose_qparams(free, spec)
        codes = wide(grouped(free, spec)) / grid.scale + grid.zero
        below = codes.floor()
        logit = ((codes - below + 0.1) / 1.2).logit()
        return cls(spec, weight, grid, below, logit, torch.zeros_like(grid.scale), kept)

    def up(self) -> Tensor:
        """Which weights are rounded up as things stand, as 0 and 1."""
        return (self.logit > 0).to(self.logit)

    def scale(self) -> Tensor:
        return self.grid.scale * (2 * rectified(self.scale_logit))

    def weight(self, up: Tensor) -> Tensor:
        """The weight, `(out, in)`, if `up` of every step above the code below is taken; differentiable."""
        codes = (self.below + up).clamp(self.spec.qmin, self.spec.qmax)
        w = (self.scale() * (codes - self.grid.zero)).reshape(self.original.shape).to(self.original.dtype)
        return w if self.kept is None else torch.where(self.kept, self.original, w)

    @torch.no_grad()
    def harden(self, soft: float) -> None:
        """Decide, in place and for good, all but a share of the weights: those nearest to half way stay soft."""
        certainty = (rectified(self.logit) - 0.5).abs()
        rank = round(soft * certainty.numel())
        if rank < 1:
            certain = torch.ones_like(certainty, dtype=torch.bool)
        else:
            certain = certainty > certainty.flatten().kthvalue(rank).values
        up = self.logit > 0
        self.logit.masked_fill_(certain & up, torch.inf).masked_fill_(certain & ~up, -torch.inf)


def rectified(x: Tensor) -> Tensor:
    """AdaRound's sigmoid, stretched to reach 0 and 1; one half at zero."""
    return (1.2 * torch.sigmoid(x) - 0.1).clamp(0, 1)
