"""What a quantization algorithm is."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, ClassVar, Literal

from torch import Tensor

from qbench.calib.block import Block
from qbench.errors import Unsuitable
from qbench.quant.scheme import Scheme

Kind = Literal["transform", "select", "allocate", "clip", "round", "tune"]
# What a clip decides of a grid: its scales, real zero-points, or scales that are integers times the row's.
Choice = Literal["scales", "zeros", "multiples"]
_MIXES: dict[Kind, str] = {
    "select": "channels that stay in floating point", "allocate": "groups of several widths",
}  # fmt: skip
ORDER: tuple[Kind, ...] = ("transform", "select", "allocate", "clip", "round", "tune")


class Algorithm(ABC):
    """One step of post-training quantization.

    A subclass is a frozen dataclass: its fields are its hyperparameters and it keeps no state between
    blocks. It is one of six kinds, and steps follow one another in this order.

    * A **transform** rewrites weights so that they are easier to quantize and leaves the function of
      the model unchanged.
    * A **selection** marks what stays in floating point, in `block.kept`.
    * An **allocation** chooses how many bits each group of a layer has, in `block.group_bits`.
    * A **clip** chooses grids, in `block.grids`, narrower than those that hold every weight.
    * A **rounder** leaves every weight of the block on its grid, save what is kept, and that grid in `block.grids`.
    * A **tuning** step trains what is not quantized (norms, adapters) to make up for the rounding.

    `tests/test_laws.py` checks these promises for every algorithm in the package.

    Attributes:
        revision: Raised when a change to the code changes numbers; part of a job's identity.
        needs_data: Whether calibration data can change the result.
        needs_float_path: Whether `process` reads `block.float_inputs` and `block.float_outputs`.
        runs_model: Whether `prepare` runs the model, which is then on the device as a whole.
        on_grid: Of a rounder: whether the weights lie on the scheme's grid as they are; not if their grid is one in
            another basis (QuIP).
        chooses: Of a clip: what it decides of the grids.
        uses: Of a clip or a rounder: which of these it starts from or leaves as they are. A pipeline refuses a clip
            before a step that would undo it.
        uses_kept: Of a rounder: whether it honours what selections before it have chosen.
        uses_bits: Of a clip or a rounder: whether the groups of a layer may differ in width. A pipeline refuses an
            allocation before one that would give all of them the scheme's.
        resumable: Whether a block's weights are all that it leaves, so that a job that was killed can go on behind the
            blocks that are finished.
        folds_norms: Whether norms are folded into the layers behind them, and LayerNorms become RMSNorms by it.
    """

    kind: ClassVar[Kind]
    revision: ClassVar[int] = 1
    needs_data: ClassVar[bool] = True
    needs_float_path: ClassVar[bool] = False
    runs_model: ClassVar[bool] = False
    on_grid: ClassVar[bool] = True
    chooses: ClassVar[frozenset[Choice]] = frozenset({"scales"})
    uses: ClassVar[frozenset[Choice]] = frozenset({"scales", "zeros", "multiples"})
    uses_kept: ClassVar[bool] = True
    uses_bits: ClassVar[bool] = False
    resumable: ClassVar[bool] = True
    folds_norms: ClassVar[bool] = False

    def check(self, scheme: Scheme) -> None:
        """Refuse, before anything is loaded, a scheme that this algorithm can do nothing for.

        Raises:
            Unsuitable: Saying what is needed. A grid leaves such a cell out.
        """

    def check_model(self, skeleton: Any) -> None:
        """Refuse, before weights are loaded, a model that this algorithm can do nothing for.

        Raises:
            Unsuitable: Saying why. A grid leaves such a cell out.
        """

    def prepare(self, model: Any, scheme: Scheme, tokens: Tensor | None) -> dict[str, Any] | None:
        """Edit the whole model in place, before its blocks are quantized.

        Returns:
            What there is to tell (plain numbers, texts, lists), by the step's name; `None` where the model is unchanged.
        """
        return None

    @abstractmethod
    def process(self, block: Block) -> None:
        """Edit the block's weights in place."""

    def _check_weights(self, scheme: Scheme) -> None:
        """For `check`: refuse a scheme that leaves weights alone."""
        if not scheme.weights:
            raise Unsuitable(
                f"{type(self).__name__} works on weights",
                f"the scheme {scheme} leaves them in floating point; set wbits, or use algo=rtn",
            )

    @property
    def beside(self) -> str:
        """What a model needs at inference beside its weights, in words; empty for nothing."""
        return ""

    @property
    def mixes(self) -> str:
        """In what a layer's weight is more than codes of one grid, in words; empty for nothing."""
        return _MIXES.get(self.kind, "") if self.on_grid else "weights that lie on a grid in another basis"

    def identity(self) -> dict[str, Any]:
        """Name, revision and every hyperparameter, defaults included."""
        return {"name": type(self).__name__, "revision": self.revision, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Pipeline(Algorithm):
    """Any transforms, selections, allocation and clipping, then one rounder, then any tuning.

    Each block meets them in this order.

    Attributes:
        steps: In order; given as a mapping, so that a step can be named on the command line
            (`algo.steps.scale.n_grid=10`) and left out (`algo.steps.clip=null`).
    """

    steps: Sequence[Algorithm] | Mapping[str, Algorithm | None]

    kind: ClassVar[Kind] = "round"

    def __post_init__(self) -> None:
        steps = self.steps.values() if isinstance(self.steps, Mapping) else self.steps
        object.__setattr__(self, "steps", tuple(step for step in steps if step is not None))
        ranks = [ORDER.index(step.kind) for step in self]
        if not ranks or ranks != sorted(ranks) or [s.kind for s in self].count("round") != 1:
            raise ValueError(
                "a pipeline is any transforms, then any selections, then any allocation, then any clipping, then one "
                "rounder, then any tuning; got "
                + (" -> ".join(f"{type(s).__name__} ({s.kind})" for s in self) or "no step")
            )
        self._check_honoured()

    def _check_honoured(self) -> None:
        """Refuse a step that a later one would undo, or overtake.

        Raises:
            Unsuitable: Naming both.
        """
        for step, later in combinations(self, 2):
            if problem := _undone(step, later):
                raise Unsuitable(
                    problem, f"{type(step).__name__} before it would have no effect; leave it out"
                )
            again = type(step) is type(later) and step.kind != "select"  # selections add up
            if again or (_rewrites_model(step) and _rewrites_model(later)):
                raise Unsuitable(
                    f"{type(step).__name__} and then {type(later).__name__} do one thing twice",
                    "leave one of them out",
                )
            if _rewrites_model(later):
                raise Unsuitable(
                    f"{type(later).__name__} rewrites the whole model before {type(step).__name__} meets a block",
                    "name it first",
                )

    def __iter__(self) -> Iterator[Algorithm]:
        return iter(self.steps)  # type: ignore[arg-type]

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        return any(step.needs_data for step in self)

    @property
    def needs_float_path(self) -> bool:  # type: ignore[override]
        return any(step.needs_float_path for step in self)

    @property
    def runs_model(self) -> bool:  # type: ignore[override]
        return any(step.runs_model for step in self)

    @property
    def resumable(self) -> bool:  # type: ignore[override]
        return all(step.resumable for step in self)

    @property
    def folds_norms(self) -> bool:  # type: ignore[override]
        return any(step.folds_norms for step in self)

    @property
    def beside(self) -> str:
        return ", ".join(step.beside for step in self if step.beside)

    @property
    def mixes(self) -> str:
        return ", ".join(step.mixes for step in self if step.mixes)

    def check(self, scheme: Scheme) -> None:
        for step in self:
            step.check(scheme)

    def check_model(self, skeleton: Any) -> None:
        for step in self:
            step.check_model(skeleton)

    def prepare(self, model: Any, scheme: Scheme, tokens: Tensor | None) -> dict[str, Any] | None:
        reports = [step.prepare(model, scheme, tokens) for step in self]
        told = [report for report in reports if report is not None]
        return {name: value for report in told for name, value in report.items()} if told else None

    def process(self, block: Block) -> None:
        for step in self:
            step.process(block)

    def identity(self) -> dict[str, Any]:
        return {"name": "Pipeline", "steps": [step.identity() for step in self]}


def _undone(step: Algorithm, later: Algorithm) -> str:
    """How a later step of a pipeline makes an earlier one useless; empty if it does not."""
    name = type(later).__name__
    if step.kind == "clip" and later.kind in ("clip", "round") and step.chooses - later.uses:
        return f"{name} chooses its own grids"
    if step.kind == "select" and later.kind == "round" and not later.uses_kept:
        return f"{name} chooses its own channels to keep"
    if step.kind == "allocate" and later.kind in ("clip", "round") and not later.uses_bits:
        return f"{name} gives all groups of a layer one width"
    return ""


def _rewrites_model(step: Algorithm) -> bool:
    return type(step).prepare is not Algorithm.prepare
