"""Recipes as points of a figure: what they cost, how good they are, and what is sure of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from qbench.deploy.devices import device
from qbench.deploy.roofline import Phase, bits_of, latency
from qbench.models.recorded import shape_from
from qbench.report.cells import Cells, Recipe
from qbench.report.figures.fronts import on_front
from qbench.report.metrics import is_cost, is_perplexity
from qbench.report.result import Result, same_items
from qbench.report.significance import SURE, differences, holm
from qbench.report.speed import Setting, fastest, usual_setting
from qbench.track.records import Record

_CONTEXT = 2048  # tokens that a step of decoding looks back on, and that a prefill reads
_ROOF = re.compile(r"(prefill|decode)_ms@([\w-]+)")
_MEASURED = re.compile(r"(ttft|decode)_ms@measured")  # by `qbench bench`
_AXES = {
    "model_mb": "stored size, MB", "calib_time_s": "calibration and quantization, s",
    "bits_per_weight": "stored bits a weight", "bits_per_linear_weight": "stored bits a linear weight",
    "peak_mem_calib_mb": "peak memory of calibration, MB", "kvbits": "bits of keys and values",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Points:
    """Recipes with a cost and a metric.

    Attributes:
        frame: Columns label, scheme, calib, x, y, y_low, y_high (what is known of the difference to floating point, as
            values), and the draws behind them.
        floating: What the one floating-point model behind them has; `None` where there is none, or several.
        other_text: How many recipes are left out, since they read another text of that name than most.
        timed: Where and how, if the cost was measured.
    """

    frame: pd.DataFrame
    floating: float | None
    other_text: int = 0
    timed: str = ""

    @property
    def note(self) -> str:
        n, on = self.other_text, f" Timed: {self.timed}." if self.timed else ""
        return on + (
            f" Left out: {n} recipe{'s' if n > 1 else ''} that read another text of that name." if n else ""
        )


def points_of(cells: Cells, metric: str, x: str) -> Points:
    """The quantized recipes that have both, of one text: numbers of two are not to be ranked."""
    timed = usual_setting([record for recipe in cells.recipes for record in recipe.records])
    rows, texts = list[dict[str, Any]](), list[tuple[str, ...]]()
    for recipe in cells.recipes:
        found = None if recipe.is_float else cells.result(recipe, metric)
        if found is None or (cost := cost_of(recipe, x, timed)) is None:
            continue
        floating = cells.floating(recipe, metric)
        low, high = _interval(found, floating, metric)
        labels = dict(zip(cells.names, recipe.labels, strict=True))
        texts.append(found.texts)
        rows.append({
            "label": labels["algo"], "scheme": labels["scheme"], "calib": labels["calib"], "x": cost,
            "y": found.value, "y_low": low, "y_high": high, "draws": found.draws,
            "fp": floating.value if floating else None,
        })  # fmt: skip
    usual = max(texts, key=texts.count, default=())
    kept = [row for row, text in zip(rows, texts, strict=True) if text == usual]
    floats = dict.fromkeys(fp for row in kept if (fp := row.pop("fp")) is not None)
    columns = ["label", "scheme", "calib", "x", "y", "y_low", "y_high", "draws"]
    line = next(iter(floats)) if len(floats) == 1 else None
    on = str(timed) if _MEASURED.fullmatch(x) and timed else ""
    return Points(pd.DataFrame(kept, columns=columns), line, len(rows) - len(kept), on)


def _interval(found: Result, floating: Result | None, metric: str) -> tuple[float, float]:
    if floating is None or not same_items(found, floating) or found.draws is None or floating.draws is None:
        return float("nan"), float("nan")
    (difference,) = differences([(found.draws, floating.draws)])
    ends = np.array([difference.low, difference.high])
    low, high = floating.value * np.exp(ends) if is_perplexity(metric) else floating.value + ends
    return float(low), float(high)


def why_no_cost(records: Sequence[Record], x: str) -> str:
    """Why no recipe has this cost."""
    if _MEASURED.fullmatch(x):
        return "nothing was timed; `qbench bench <fingerprint>` times a record's recipe"
    if _ROOF.fullmatch(x):
        return f"no record has the shape of its model, from which {x} is computed; run again with this qbench"
    known = dict.fromkeys(
        name for record in records for name in record["metrics"] if is_cost(name) and "@" not in name
    )
    shown = [name for name in known if not name.endswith("_stderr")]
    return (
        f"no record has a cost {x}; there are {', '.join(shown)}, decode_ms@<device>, and decode_ms@measured"
    )


def cost_of(recipe: Recipe, x: str, timed: Setting | None = None) -> float | None:
    """A metric or label of a recipe, mean over its draws; `decode_ms@h100` is the roofline's; `None` where unknown.

    Args:
        timed: What `decode_ms@measured` is of.

    Raises:
        ValueError: If it is no number, or there is no such device.
    """
    values = [_cost(record, x, timed) for record in recipe.records]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _cost(record: Record, x: str, timed: Setting | None) -> float | None:
    if asked := _MEASURED.fullmatch(x):
        return None if timed is None else fastest(record, timed, f"{asked[1]}_ms")
    if roof := _ROOF.fullmatch(x):
        if not record.get("shape"):  # of an older qbench
            return None
        phase: Phase = "prefill" if roof[1] == "prefill" else "decode"
        shape = shape_from(record["shape"])
        found = latency(shape, bits_of(record), device(roof[2]), 1, _CONTEXT, phase, fused=True)
        return 1000 * found.seconds
    value = record["labels"].get(x, record["metrics"].get(x))
    if isinstance(value, str):
        raise ValueError(
            f"{x} is {value!r}, which is no cost; name a metric, such as model_mb, or a number of bits"
        )
    return None if value is None else float(value)


def cost_note(x: str) -> str:
    """What to mind of a cost, as further sentences of a caption."""
    if _MEASURED.fullmatch(x):
        return " As measured, with the fastest of the backends that ran the recipe; recipes timed otherwise are left out."
    if _ROOF.fullmatch(x):
        return f" By the roofline, a bound: one sequence, {_CONTEXT} tokens of context; nothing was run on the device."
    if x.endswith("_time_s") or x.startswith("peak_"):
        return " Time and memory are those of the runs, and vary with what else the machine did."
    return ""


def axis_title(x: str) -> str:
    if asked := _MEASURED.fullmatch(x):
        return f"{'first token' if asked[1] == 'ttft' else 'a token'}, ms (measured)"
    if roof := _ROOF.fullmatch(x):
        return f"{roof[1]} on {roof[2]}, ms (roofline)"
    return _AXES.get(x, x)


def sure_of_front(points: pd.DataFrame, lower: bool) -> list[bool]:
    """Whether a member of the front is surely better than the next cheaper one; the cheapest is what it is."""
    front = points[on_front(points["x"], points["y"], lower)].sort_values("x", kind="stable")
    sure = dict.fromkeys(points.index, True)
    pairs = [
        (i, (points["draws"][i], points["draws"][j]))
        for j, i in zip(front.index[:-1], front.index[1:], strict=True)
        if points["x"][i] > points["x"][j]
    ]
    pairs = [(i, pair) for i, pair in pairs if None not in pair and pair[0].items == pair[1].items]
    p = holm([found.p for found in differences([pair for _, pair in pairs])])
    for (i, _), value in zip(pairs, p, strict=True):
        sure[i] = bool(value < SURE)
    return list(sure.values())
