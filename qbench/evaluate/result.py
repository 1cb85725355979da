"""What an evaluator returns."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """Numbers, and the items they are means of.

    Attributes:
        metrics: Flat numbers; a metric's standard error has its name with `_stderr` behind it.
        samples: One row per item: `{"metric", "item", "value"}`, what a paired test compares, and `"part"` where items
            are of several kinds (a subject, a length, a position).
    """

    metrics: dict[str, float]
    samples: list[dict[str, Any]]

    def __add__(self, other: "Evaluation") -> "Evaluation":
        return Evaluation(self.metrics | other.metrics, self.samples + other.samples)


NOTHING = Evaluation({}, [])


def mean(metric: str, rows: Iterable[Mapping[str, Any]], over: str | None = None) -> Evaluation:
    """The mean of rows `{"item", "value"}`, and its standard error.

    Args:
        over: A field of the rows: the mean is that of the means of the rows alike in it.
    """
    rows = list(rows)
    kinds: dict[str, list[float]] = {}
    for row in rows:
        kinds.setdefault(str(row[over]) if over else "", []).append(float(row["value"]))
    means = [sum(values) / len(values) for values in kinds.values()]
    variances = [_variance(values) / len(values) for values in kinds.values()]
    value, stderr = sum(means) / len(means), math.sqrt(sum(variances)) / len(means)
    if len(means) > 1 and min(map(len, kinds.values())) < 2:  # nothing is known of the spread inside a part
        stderr = math.sqrt(_variance(means) / len(means))
    samples = [{"metric": metric, **row, "value": float(row["value"])} for row in rows]
    return Evaluation({metric: value, f"{metric}_stderr": stderr}, samples)


def _variance(values: list[float]) -> float:
    average = sum(values) / len(values)
    return sum((v - average) ** 2 for v in values) / max(1, len(values) - 1)
