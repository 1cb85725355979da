"""Numbers that papers and READMEs have published, in our words, and beside our own.

How far a run may be from a published perplexity is taken from how far published ones of the same thing are from each
other: see `Noise`, and docs/published.md for what it comes to.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from qbench.report.implausible import flags, half_unit
from qbench.report.naming import FOLDER, UNSTATED, names, read, translate

FULL = ("[2048]", "[all]")  # protocols of published tables, as `qbench.report.frame.protocol` prints them
_TWO_RUNS = 2 * math.sqrt(2)  # two standard deviations of the difference of two runs
_COARSE = 0.005  # half a unit of the last digit, relative: rounding hides what is to be measured
_DAMAGED = 0.01  # of the logarithm: less is rounding
_SAME = ["our_model", "our_algo", "our_scheme", "our_metric"]


@dataclass(frozen=True)
class Noise:
    """How far apart published perplexities of one thing are.

    Attributes:
        floor: Standard deviation of the logarithm, of floating-point models.
        share: Standard deviation of the logarithm of quantized ones, in parts of the damage: of the logarithm of
            perplexity over floating-point perplexity.
    """

    floor: float
    share: float

    def tolerance(self, damage: float) -> float:
        """How far two runs may be from each other, relative."""
        return math.expm1(_TWO_RUNS * math.hypot(self.floor, self.share * max(damage, 0.0)))


def load() -> pd.DataFrame:
    """Every published number.

    Returns:
        One row for each: number (its name, which stays), source_name (short), the published columns (`value` a number,
        `printed` as published), then ours: model_id (on the hub), our_model, our_algo, our_scheme, our_calib, our_samples
        (`128x2048`), our_metric, our_value (in our unit), size (documents of the test set), why_not (reasons, where it is
        not mapped), caveat (why a mapped one cannot be judged), fp (floating-point perplexity of the same model and text),
        tolerance (relative for perplexity, else absolute; nan where unknown), flags (what is wrong with it, `; ` between).
    """
    return _load().copy()


@cache
def _load() -> pd.DataFrame:
    frame = floating_point(translate(read(FOLDER / "numbers.csv"), names()))
    known = noise(frame)
    rows: Any = frame.assign(rounding=half_unit(frame["printed"])).itertuples()
    frame = frame.assign(tolerance=[_tolerance(row, known) for row in rows])
    return frame.assign(flags=flags(frame, known.tolerance(0.0)))


def floating_point(frame: pd.DataFrame) -> pd.DataFrame:
    """The same with `fp`: the perplexity of the floating-point model in the same source, or else the sources' median."""
    base = frame[(frame["our_algo"] == "fp") & frame["our_metric"].fillna("").str.startswith("ppl/")]
    here = base.groupby(["source", "our_model", "our_metric"])["value"].median().rename("here")
    sure = base[base["caveat"].isna()].groupby(["our_model", "our_metric"])["value"].median().rename("there")
    frame = frame.join(here, on=["source", "our_model", "our_metric"]).join(
        sure, on=["our_model", "our_metric"]
    )
    return frame.assign(fp=frame["here"].fillna(frame["there"])).drop(columns=["here", "there"])


def noise(frame: pd.DataFrame) -> Noise:
    """Measure what one source's perplexity tells of another's.

    A source counts once for each thing, with its median, and not if it repeats another's value to the last digit, which is
    how tables are copied from paper to paper.
    """
    sure = frame["caveat"].isna() | (frame["caveat"] == UNSTATED)
    finite = np.isfinite(frame["value"]) & (half_unit(frame["printed"]) < _COARSE * frame["value"])
    ppl = frame[
        sure & finite & frame["why_not"].isna() & frame["our_metric"].fillna("").str.startswith("ppl/")
    ]
    each = ppl.groupby([*_SAME, "source_name"])[["value", "fp"]].median().reset_index()
    each = each.drop_duplicates([*_SAME, "value"])
    each = each.assign(log=np.log(each["value"]), damage=np.log(each["value"] / each["fp"]))
    found = (
        each.groupby(_SAME).agg(sd=("log", "std"), n=("log", "size"), damage=("damage", "mean")).reset_index()
    )
    found = found[found["n"] > 1]
    exact = found["our_algo"] == "fp"
    apart = found[~exact & (found["damage"] > _DAMAGED)]
    return Noise(_rms(found[exact], 1.0), _rms(apart, apart["damage"]))


def _rms(found: pd.DataFrame, unit: "pd.Series[float] | float") -> float:
    """Pooled standard deviation, weighed by degrees of freedom, in a unit of each group's own."""
    freedom = found["n"] - 1
    return float(np.sqrt(((found["sd"] / unit) ** 2 * freedom).sum() / freedom.sum()))


def _tolerance(row: Any, known: Noise) -> float:
    """Rounding as printed, and the noise of two runs, or of the test set; nan where neither is known."""
    if row.why_not is not None or not math.isfinite(row.value):
        return math.nan
    if row.our_metric.startswith("ppl/"):
        damage = 0.0 if row.our_algo == "fp" else math.log(row.value / row.fp)
        return row.rounding / row.value + known.tolerance(damage)
    error = math.sqrt(max(row.our_value * (1 - row.our_value), 0.0) / row.size)
    return row.rounding * row.our_value / row.value + 2 * error if row.value else 2 * error


def beside(cells: pd.DataFrame, source: str, table: str | None = None) -> pd.DataFrame:
    """Published numbers of a source, and of one of its tables, beside our runs; see `match`.

    Args:
        source: Its name as published, or its short name.

    Raises:
        ValueError: If no such source or table is known.
    """
    found = load()
    chosen = found[(found["source"] == source) | (found["source_name"] == source)]
    if chosen.empty:
        raise ValueError(f"no source {source!r} is known; known: {', '.join(found['source_name'].unique())}")
    if table is not None:
        known = ", ".join(map(repr, chosen["table"].unique()))
        chosen = chosen[chosen["table"] == table]
        if chosen.empty:
            raise ValueError(f"{source!r} has no table {table!r}; known: {known}")
    return match(chosen, cells)


def match(published: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Published numbers beside our runs of the same model, algorithm, scheme and metric, and calibration set if stated.

    Args:
        cells: Our numbers: model, algo, scheme, calib, metric (without protocol), value, stderr, fingerprint. If there are
            columns `protocol` (as `frame.protocol` prints it) and `samples` (`128x2048`), they must be as published too.

    Returns:
        `published` with ours (the middle one of several seeds or calibration sets; none where hyperparameters differ, told
        by a column `recipe`), difference and tolerance (relative for perplexity, else
        absolute), within (`None` where there is no run, or a caveat) and fingerprint.
    """
    runs: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    keys = ("model", "algo", "scheme", "metric")
    records: list[dict[Any, Any]] = cells.dropna(subset=["value"]).to_dict("records")
    for cell in records:
        if cell.get("protocol", FULL[0]) in FULL:
            runs[tuple(str(cell[key]) for key in keys)].append(cell)
    rows = [_compared(row, _run(row, runs)) for row in published.itertuples()]
    columns = ["ours", "difference", "tolerance", "within", "fingerprint"]
    return published.drop(columns="tolerance").join(
        pd.DataFrame(rows, index=published.index, columns=columns, dtype=object)
    )


def _run(row: Any, runs: dict[tuple[str, ...], list[dict[str, Any]]]) -> dict[str, Any] | None:
    key = tuple(getattr(row, name) for name in _SAME)
    if row.why_not is not None or key not in runs:
        return None
    found = [
        cell for cell in runs[key]
        if (row.our_calib is None or cell["calib"] == row.our_calib)
        and (row.our_samples is None or cell.get("samples") in (None, row.our_samples))
    ]  # fmt: skip
    if len({cell.get("recipe") for cell in found}) > 1:
        return None  # of the same labels with other hyperparameters: which of them is the published one is not known
    found.sort(key=lambda cell: (cell["value"], cell["fingerprint"]))
    return found[(len(found) - 1) // 2] if found else None


def _compared(row: Any, run: dict[str, Any] | None) -> tuple[Any, ...]:
    """ours, difference, tolerance, within, fingerprint."""
    if run is None:
        return None, None, row.tolerance, None, None
    ours, relative, tolerance = run["value"], row.our_metric.startswith("ppl/"), row.tolerance
    difference = ours / row.our_value - 1 if relative else ours - row.our_value
    if math.isnan(tolerance) and not relative and run["stderr"] is not None:
        tolerance = 2 * run["stderr"]
    within = None
    if row.caveat is None and math.isfinite(row.our_value) and not math.isnan(tolerance):
        # By ratio, so that half as much is as far as twice as much.
        apart = math.expm1(abs(math.log(ours / row.our_value))) if relative else abs(difference)
        within = bool(apart <= tolerance)
    return ours, difference, tolerance, within, run["fingerprint"]
