"""What an evaluator returns."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """Numbers, and the items they are means of.

    Attributes:
        metrics: Flat numbers; a metric's standard error has its name with `_stderr` behind it.
        samples: One row per item: `{"metric", "item", "value"}`, what a paired test compares.
    """

    metrics: dict[str, float]
    samples: list[dict[str, Any]]

    def __add__(self, other: "Evaluation") -> "Evaluation":
        return Evaluation(self.metrics | other.metrics, self.samples + other.samples)


NOTHING = Evaluation({}, [])
