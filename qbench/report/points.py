"""Recipes as points of a figure: what they cost, how good they are, and what is sure of it."""

import re

import numpy as np
import pandas as pd

from qbench.deploy.devices import device
from qbench.deploy.roofline import Phase, bits_of, latency
from qbench.models.shape import Shape
from qbench.report.cells import Cells, Recipe, Result
from qbench.report.figures.fronts import on_front
from qbench.report.metrics import base
from qbench.report.significance import SURE, differences, holm
from qbench.track.records import Record

_CONTEXT = 2048  # tokens that a step of decoding looks back on, and that a prefill reads
_AXES = {
    "model_mb": "stored size, MB", "calib_time_s": "calibration and quantization, s",
    "bits_per_weight": "stored bits a weight", "bits_per_linear_weight": "stored bits a linear weight",
    "peak_mem_calib_mb": "peak memory of calibration, MB", "kvbits": "bits of keys and values",
}  # fmt: skip


def points_of(cells: Cells, metric: str, x: str) -> tuple[pd.DataFrame, float | None]:
    """Recipes with a cost and a metric, and the floating-point model's value.

    Returns:
        Columns label, scheme, x, y, y_low, y_high (what is known of the difference to floating point, as values), and the
        draws behind them.
    """
    floats = {_model(r): cells.result(r, metric) for r in reversed(cells.recipes) if r.is_float}
    rows = []
    for recipe in cells.recipes:
        floating = floats.get(_model(recipe))
        found = cells.result(recipe, metric)
        cost = cost_of(recipe, x)
        if recipe.is_float or found is None or cost is None:
            continue
        low, high = _interval(found, floating, metric)
        labels = dict(zip(cells.names, recipe.labels, strict=True))
        rows.append({
            "label": labels["algo"], "scheme": labels["scheme"], "calib": labels["calib"], "x": cost,
            "y": found.value, "y_low": low, "y_high": high, "draws": found.draws,
        })  # fmt: skip
    columns = ["label", "scheme", "calib", "x", "y", "y_low", "y_high", "draws"]
    first = next(reversed(floats.values()), None)
    return pd.DataFrame(rows, columns=columns), first.value if first else None


def _model(recipe: Recipe) -> str:
    """The very model: of a name there may be several revisions and dtypes."""
    return str(recipe.records[0]["identity"]["model"])


def _interval(found: Result, floating: Result | None, metric: str) -> tuple[float, float]:
    if floating is None or found.draws is None or floating.draws is None:
        return float("nan"), float("nan")
    if found.draws.items != floating.draws.items:
        return float("nan"), float("nan")
    (difference,) = differences([(found.draws, floating.draws)])
    ends = np.array([difference.low, difference.high])
    if base(metric).startswith(("ppl/", "decode_ppl/")):
        return tuple(floating.value * np.exp(ends))  # type: ignore[return-value]
    return tuple(floating.value + ends)  # type: ignore[return-value]


def cost_of(recipe: Recipe, x: str) -> float | None:
    """A metric or label of a recipe, mean over its draws; `decode_ms@h100` is the roofline's; `None` where unknown."""
    values = [_cost(record, x) for record in recipe.records]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _cost(record: Record, x: str) -> float | None:
    if roof := re.fullmatch(r"(prefill|decode)_ms@([\w-]+)", x):
        if "shape" not in record:  # of an older qbench
            return None
        phase: Phase = "prefill" if roof[1] == "prefill" else "decode"
        shape = Shape(**record["shape"])
        found = latency(shape, bits_of(record), device(roof[2]), 1, _CONTEXT, phase, fused=True)
        return 1000 * found.seconds
    value = record["labels"].get(x, record["metrics"].get(x))
    return None if value is None else float(value)


def axis_title(x: str) -> str:
    if roof := re.fullmatch(r"(prefill|decode)_ms@([\w-]+)", x):
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
