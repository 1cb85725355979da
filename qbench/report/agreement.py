"""Tables of how metrics go together, and of what makes results differ."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from qbench.report.cells import Cells
from qbench.report.correlation import pearson, spearman
from qbench.report.labels import label, settings
from qbench.report.marked import Made
from qbench.report.metrics import base, is_cost, is_perplexity, kind, lower_is_better
from qbench.report.page.content import Cell, PageTable
from qbench.report.results import failures
from qbench.report.significance import SURE, holm
from qbench.report.spec import TableSpec
from qbench.report.variance import FACTORS, decompose

_LEAST = 3  # recipes without which a correlation says nothing
_SETTING = "setting"


def wide(cells: Cells) -> pd.DataFrame:
    """Recipes down, metrics across; floating point is one of them."""
    rows = [
        {
            metric: found.value
            for metric in cells.metrics
            if (found := cells.result(recipe, metric)) is not None
        }
        for recipe in cells.recipes
    ]
    return pd.DataFrame(rows, columns=cells.metrics)


def better_is_higher(frame: pd.DataFrame) -> pd.DataFrame:
    """The same with the sign turned where lower is better, so that agreement is positive."""
    return frame.assign(**{str(m): -frame[m] for m in frame if lower_is_better(str(m))})


def spearman_table(cells: Cells, spec: TableSpec, anchor: str) -> Made:
    """How alike two metrics rank the recipes.

    Raises:
        ValueError: If there are too few recipes or metrics.
    """
    frame = _enough(better_is_higher(wide(cells)))
    rho, p, n = spearman(frame)
    rows = tuple(
        (Cell(str(one)), *(_correlation(rho.loc[one, other], p.loc[one, other]) for other in rho.columns))
        for one in rho.index
    )
    numbers = pd.DataFrame([
        {"one": one, "other": other, "rho": rho.loc[one, other], "p": p.loc[one, other], "n": n.loc[one, other]}
        for i, one in enumerate(rho.index)
        for other in rho.columns[i + 1 :]
    ])  # fmt: skip
    note = (
        f"Spearman's ρ over {len(frame)} recipes, better counted as higher; * where p < {SURE} after correction "
        "for all pairs. Recipes of one model are not independent of each other: p is optimistic."
    )
    table = PageTable(
        spec.title, ("", *map(str, rho.columns)), rows, 1, (note, *failures(cells.failed)), anchor=anchor
    )
    return Made(table, numbers)


def _correlation(r: float, p: float = float("nan")) -> Cell:
    """Empty where it is not known."""
    return Cell("") if pd.isna(r) else Cell(f"{r:.2f}{'*' if p < SURE else ''}", float(r))


def _enough(frame: pd.DataFrame) -> pd.DataFrame:
    frame = frame.dropna(axis="columns", thresh=_LEAST).dropna(how="all")
    if len(frame.columns) < 2 or len(frame) < _LEAST:
        raise ValueError(
            f"{len(frame)} recipes with {len(frame.columns)} metrics are recorded; a correlation needs {_LEAST} "
            "recipes and 2 metrics"
        )
    return frame


def pearson_table(cells: Cells, spec: TableSpec, anchor: str) -> Made:
    """Whether perplexity tells how tasks fare: its linear correlation with every other metric.

    Raises:
        ValueError: If there are too few recipes, no perplexity, or nothing beside it.
    """
    frame = _enough(wide(cells))
    losses = [str(m) for m in frame if is_perplexity(str(m))]
    others = [str(m) for m in frame if kind(str(m)) != "loss" and not is_cost(str(m))]
    if not losses or not others:
        raise ValueError(f"perplexities and tasks are needed, there are {', '.join(map(str, frame.columns))}")
    parts = []
    for loss in losses:
        plain = pearson(frame, loss, others).assign(x=loss)
        logs = pearson(frame.assign(**{loss: np.log(frame[loss])}), loss, others)
        parts.append(plain.assign(r_log=logs["r"].to_numpy()))
    found = pd.concat(parts, ignore_index=True)
    rows = tuple(
        (
            Cell(row["x"]), Cell(row["y"]), _correlation(row["r"], row["p"]),
            Cell("" if pd.isna(row["low"]) else f"{row['low']:.2f} to {row['high']:.2f}"),
            _correlation(row["r_log"]), Cell(str(row["n"])),
        )
        for _, row in found.iterrows()
    )  # fmt: skip
    columns = ("perplexity", "task", "r", "95 % interval", "r of its logarithm", "recipes")
    note = (
        f"Pearson's r; * where p < {SURE} after correction for the tasks beside a perplexity. A few recipes of very high "
        "perplexity decide r; that of the logarithm minds them less. Recipes of one model are not independent: "
        "intervals are too narrow."
    )
    table = PageTable(spec.title, columns, rows, 2, (note, *failures(cells.failed)), anchor=anchor)
    return Made(table, found)


def variance_table(cells: Cells, spec: TableSpec, anchor: str) -> Made:
    """Which share of the spread between jobs each label explains, in each metric.

    Raises:
        ValueError: If no metric has jobs that differ.
    """
    found, notes = _decomposed(cells)
    shares: dict[str, dict[str, Cell]] = {}
    left_out = dict[str, None]()
    for _, row in found.iterrows():
        if pd.isna(row["share"]):
            left_out[f"{row['term']} ({row['note']})"] = None
            continue
        text = f"{row['share']:.1%}{'*' if row['p'] < SURE else ''}"
        shares.setdefault(str(row["term"]), {})[row["metric"]] = Cell(text, float(row["share"]))
    metrics = list(found["metric"].unique())
    rows = tuple((Cell(term), *(row.get(m, Cell("")) for m in metrics)) for term, row in shares.items())
    note = (
        "Share of the sum of squares (type II) between jobs, floating point apart, of the logarithm of perplexity and of "
        f"other metrics as they are; * where p < {SURE} after correction for the whole table. `a:b` is how far a's effect "
        "depends on b."
    )
    if _SETTING in shares:
        note += " `setting` is what jobs differ in beside the other labels, such as hyperparameters."
    if left_out:
        note += f" Left out: {', '.join(left_out)}."
    below = (note, *notes, *failures(cells.failed))
    table = PageTable(spec.title, ("", *metrics), rows, 1, below, anchor=anchor)
    return Made(table, found)


def _decomposed(cells: Cells) -> tuple[pd.DataFrame, list[str]]:
    """The terms of each metric, p corrected for all of them; and of which metrics nothing can be said, and why.

    Raises:
        ValueError: If of none.
    """
    told = settings([r for recipe in cells.recipes for r in recipe.records if not recipe.is_float], FACTORS)
    factors = (*FACTORS, _SETTING) if any(told.values()) else FACTORS
    parts, notes = [], dict[str, None]()
    for metric in cells.metrics:
        try:
            parts.append(decompose(_jobs(cells, metric, told), factors).assign(metric=metric))
        except ValueError as error:
            notes[f"{metric}: {error}."] = None
    if not parts:
        raise ValueError("; ".join(notes) or "no metric is recorded")
    found = pd.concat(parts, ignore_index=True)
    return found.assign(p=holm(found["p"])), list(notes)


def _jobs(cells: Cells, metric: str, told: Mapping[str, str]) -> pd.DataFrame:
    rows = []
    for recipe in cells.recipes:
        found = None if recipe.is_float else cells.result(recipe, metric)
        if found is not None:
            rows += [
                {factor: label(r, factor) or None for factor in FACTORS}
                | {_SETTING: told[r["fingerprint"]] or None, "value": r["metrics"][base(metric)]}
                for r in recipe.records
                if r["fingerprint"] in found.records
            ]
    if not rows:
        raise ValueError("no quantized model has it")
    frame = pd.DataFrame(rows)
    return frame.assign(value=np.log(frame["value"])) if is_perplexity(metric) else frame
