"""One recipe's number for one metric, and whether two of them are of the same items."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qbench.report.draws import Draws
from qbench.report.metrics import base
from qbench.track.records import Record


@dataclass(frozen=True, eq=False)
class Result:
    """One recipe's number for one metric.

    Attributes:
        value: Mean over the draws; of perplexities, the geometric one.
        stderr: Of the items and of the draws together; `None` where neither is known.
        n_items: How many windows or documents; 0 where none were kept.
        records: Fingerprints of its draws.
        draws: Its items; `None` where none were kept, or the draws have different ones.
        texts: Digests of what was read; empty where none is known.
    """

    value: float
    stderr: float | None
    n_items: int
    records: tuple[str, ...]
    draws: Draws | None = None
    texts: tuple[str, ...] = ()


def digests(records: Sequence[Record], metric: str) -> tuple[str, ...]:
    """Of the text or task that a metric was taken on: embedded ones change with Python, under the same name."""
    name = base(metric).partition("/")[2]
    found = (record.get("data", {}).get(f"eval/{name}", {}).get("sha256") for record in records)
    return tuple(sorted({str(one) for one in found if one}))


def same_items(a: Result, b: Result) -> bool:
    """Whether both kept the same items of the same text, so that they can be compared item by item."""
    return (
        a.draws is not None and b.draws is not None and a.texts == b.texts and a.draws.items == b.draws.items
    )


def stderr_of(values: np.ndarray, of_items: Sequence[float | None]) -> float | None:
    """Of the mean over draws: that of the items, which all draws share, and that of the draws."""
    known = [s for s in of_items if s is not None]
    items = float(np.mean(known)) if known else None
    if len(values) < 2:
        return items
    between = float(values.std(ddof=1) / np.sqrt(len(values)))
    return between if items is None else float(np.hypot(items, between))
