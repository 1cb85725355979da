"""AutoRound: learn by signed gradient descent which way weights are rounded, and how far ranges are clipped.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", Findings of EMNLP
2024, arXiv:2309.05516, Equations 3 and 4 and Algorithm 1:

    ŵ = s · (clamp(round(w / s + V) + z, qmin, qmax) − z),  s and z of the range β · min(w) … α · max(w)

with V in [−½, ½] and α and β up to 1, so that the block's output is near that of the floating-point model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qbench.algorithms.base import Algorithm, Choice, Kind
from qbench.algorithms.learn import fit, squared_error
from qbench.calib.block import Block
from qbench.errors import Unsuitable
from qbench.quant.grid import QParams, extremes, grouped, qparams_of_range, round_to_grid, wide
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec

LEAST = 0.1  # of a range is kept, whatever the learning rate; with the paper's it cannot fall below a half


@dataclass(frozen=True)
class AutoRound(Algorithm):
    """Learned rounding, one block at a time.

    The inputs are those of the quantized path, the targets the floating-point block's outputs on its own path, as the
    authors' code has it (`enable_quanted_input`). Ranges that a step before has chosen are where clipping starts.

    Attributes:
        steps: Of the optimizer (`iters`).
        lr: Length of the first step in every direction, of V as of α and β; it falls linearly to zero. `None`: one
            over the number of steps, so that V can just reach its bounds.
        batch_size: Samples for each step.
        clip: Learn α and β as well (`enable_minmax_tuning`).
        keep_best: End where a step's loss was least, not where the last one led.
        seed: Of the samples' order.
    """

    steps: int = 200
    lr: float | None = None
    batch_size: int = 8
    clip: bool = True
    keep_best: bool = True
    seed: int = 0

    kind: ClassVar[Kind] = "round"
    needs_float_path: ClassVar[bool] = True

    @property
    def uses(self) -> frozenset[Choice]:  # type: ignore[override]
        return frozenset({"scales", "zeros"}) if self.clip else super().uses

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or (self.lr is not None and self.lr <= 0):
            raise ValueError(
                f"AutoRound's steps are {self.steps}, batch_size {self.batch_size} and lr {self.lr}; "
                "all must be positive"
            )

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)
        for spec in scheme.weights:
            if spec.granularity == "block":
                raise Unsuitable(
                    "AutoRound learns scales of rows, and the rows of a block share theirs",
                    f"the scheme is {scheme}; set weight_granularity=auto",
                )
            if spec.format != "int" or spec.bits == 1:
                raise Unsuitable(
                    "AutoRound's offsets are fractions of the step between neighbouring integers",
                    f"the scheme is {scheme}; set weight_format=int, and wbits of 2 or more",
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
        lr = self.lr or 1 / self.steps
        offsets = [r.offset for r in learned.values()]
        shares = [share for r in learned.values() for share in (r.lower, r.upper)] if self.clip else []
        optimizer = SignSGD((offsets, lr, -0.5, 0.5), (shares, lr, LEAST, 1.0))
        best = Best([*offsets, *shares])

        def weights() -> dict[str, Tensor]:
            if self.keep_best and not torch.is_grad_enabled():  # what is measured is what will be taken
                best.restore()
            return {f"{name}.weight": r.weight() for name, r in learned.items()}

        fit(
            block, "autoround", weights, optimizer,
            inputs=block.inputs, targets=block.float_outputs, steps=self.steps, batch_size=self.batch_size,
            seed=self.seed, loss=best.loss, schedule=lambda step: 1 - step / self.steps,
        )  # fmt: skip
        for name, r in learned.items():
            block.linear(name).weight.copy_(r.weight())
            block.grids[name] = r.grid()


@dataclass(frozen=True)
class Rounding:
    """How one weight is rounded.

    Attributes:
        original: `(out, in)`; `groups`: the same as `grouped` has it, in float32 at least.
        low, high: The ends of each group's range before it is clipped, `(..., n_groups, 1)`.
        offset: V, as `groups`; `lower`, `upper`: β and α, as `low`. These are trained.
        kept: What stays in floating point.
    """

    spec: QuantSpec
    original: Tensor
    groups: Tensor
    low: Tensor
    high: Tensor
    offset: Tensor
    lower: Tensor
    upper: Tensor
    kept: Tensor | None

    @classmethod
    def of(cls, block: Block, name: str, spec: QuantSpec) -> "Rounding":
        """Start from round to nearest, on the grid that a step before has chosen, or on the min-max grid."""
        weight, kept = block.linear(name).weight.detach(), block.kept.get(name)
        groups = wide(grouped(weight if kept is None else weight.masked_fill(kept, 0.0), spec))
        low, high = extremes(groups, spec) if name not in block.grids else ends(block.grids[name], spec)
        shares = (torch.ones_like(low), torch.ones_like(low))
        return cls(spec, weight, groups, low, high, torch.zeros_like(groups), *shares, kept)

    def grid(self) -> QParams:
        return qparams_of_range(self.low * self.lower, self.high * self.upper, self.spec)

    def weight(self) -> Tensor:
        """The weight on its grid, `(out, in)`, save what is kept; differentiable, straight through rounding."""
        scale, zero = self.grid()
        rounded = round_to_grid(self.groups + scale * self.offset, scale, zero, self.spec)
        rounded = rounded.reshape(self.original.shape).to(self.original.dtype)
        return rounded if self.kept is None else torch.where(self.kept, self.original, rounded)


def ends(grid: QParams, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The range whose grid this is."""
    if spec.symmetric:
        high = grid.scale * (spec.qmax / 2 if spec.symmetric_mode == "gptq" else spec.qmax)
        return -high, high
    return -grid.zero * grid.scale, (spec.qmax - grid.zero) * grid.scale


class SignSGD(torch.optim.Optimizer):
    """Steps of one length in every direction, over groups of (tensors, learning rate, least, largest value).

    The tensors become trainable.
    """

    def __init__(self, *groups: tuple[list[Tensor], float, float, float]) -> None:
        parts: list[dict[str, Any]] = [
            {"params": [t.requires_grad_() for t in tensors], "lr": lr, "least": least, "largest": largest}
            for tensors, lr, least, largest in groups
            if tensors
        ]
        super().__init__(parts, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["lr"]).clamp_(group["least"], group["largest"])


class Best:
    """What was trained, as it stood in the step with the least loss."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self.least, self.found = float("inf"), list[Tensor]()

    def loss(self, y: Tensor, target: Tensor) -> Tensor:
        """The mean squared error; takes note of what led to it while training."""
        value = squared_error(y, target)
        if torch.is_grad_enabled() and float(value.detach()) < self.least:
            self.least, self.found = float(value.detach()), [t.detach().clone() for t in self.tensors]
        return value

    def restore(self) -> None:
        """Put it back, in place, if there is any."""
        for tensor, value in zip(self.tensors, self.found, strict=False):
            tensor.copy_(value)
