"""What a quantization algorithm is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from qbench.calib.stream import Block
from qbench.errors import Unsuitable
from qbench.quant.scheme import Scheme

Kind = Literal["transform", "clip", "round"]
ORDER: tuple[Kind, ...] = ("transform", "clip", "round")


class Algorithm(ABC):
    """One step of post-training quantization.

    A subclass is a frozen dataclass: its fields are its hyperparameters and it keeps no state between
    blocks. It is one of three kinds.

    * A **transform** rewrites weights so that they are easier to quantize and leaves the function of
      the model unchanged.
    * A **clip** narrows the range of weights, which chooses the grid that a rounder will find.
    * A **rounder** leaves every weight of the block on the scheme's grid.

    `tests/test_laws.py` checks these promises for every algorithm in the package.

    Attributes:
        revision: Raised when a change to the code changes numbers; part of a job's identity.
    """

    kind: ClassVar[Kind]
    revision: ClassVar[int] = 1
    needs_data: ClassVar[bool] = True

    def check(self, scheme: Scheme) -> None:
        """Refuse, before anything is loaded, a scheme that this algorithm can do nothing for.

        Raises:
            Unsuitable: Saying what is needed. A grid leaves such a cell out.
        """

    @abstractmethod
    def process(self, block: Block, scheme: Scheme) -> None:
        """Edit the block's weights in place."""

    def _check_weights(self, scheme: Scheme) -> None:
        """For `check`: refuse a scheme that leaves weights alone."""
        if scheme.weight is None:
            raise Unsuitable(
                f"{type(self).__name__} works on weights",
                f"the scheme {scheme} leaves them in floating point; set wbits, or use algo=rtn",
            )

    def identity(self) -> dict[str, Any]:
        """Name, revision and every hyperparameter, defaults included."""
        return {"name": type(self).__name__, "revision": self.revision, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Pipeline(Algorithm):
    """Any transforms, then any clipping, then one rounder, applied in this order to each block.

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
                "a pipeline is any number of transforms, then any clipping, then one rounder; got "
                + (" -> ".join(f"{type(s).__name__} ({s.kind})" for s in self) or "no step")
            )

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.steps)

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        return any(step.needs_data for step in self)

    def check(self, scheme: Scheme) -> None:
        for step in self:
            step.check(scheme)

    def process(self, block: Block, scheme: Scheme) -> None:
        for step in self:
            step.process(block, scheme)

    def identity(self) -> dict[str, Any]:
        return {"name": "Pipeline", "steps": [step.identity() for step in self]}
