"""How often one beats another: all else equal, counted only where the difference is sure."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from qbench.report.cells import Cells, Recipe
from qbench.report.labels import is_calibration_text, label, recipe_of
from qbench.report.marked import Made
from qbench.report.metrics import base, lower_is_better
from qbench.report.page.content import Cell, PageTable
from qbench.report.protocols import usual
from qbench.report.result import same_items
from qbench.report.results import failures
from qbench.report.significance import SURE, Difference, Draws, differences, holm
from qbench.report.spec import TableSpec

# Keys of a recipe's identity that go with a label.
_OWN: dict[str, Callable[[str], bool]] = {
    "model": lambda key: key.partition(".")[0] == "model",
    "algo": lambda key: key.partition(".")[0] == "algorithm",
    "calib": is_calibration_text,
}

# What they say in a scheme's text.
_BITS = {"wbits": r"^w\d+", "abits": r"a\d+", "kvbits": r"kv\d+", "group_size": r"g\d+"}


@dataclass(frozen=True, eq=False)
class _Contestant:
    """A recipe.

    Attributes:
        value: Of the label that is compared.
        alike: What it must share with those that it meets: labels and all of the identity, but the factor and the
            calibration data.
        data: The calibration data, which it must share with those that read any; `None` where it reads none.
    """

    recipe: Recipe
    value: str
    alike: tuple[object, ...]
    data: tuple[tuple[str, str], ...] | None
    context: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Duel:
    one: str
    other: str
    metric: str
    context: str
    pair: tuple[Draws, Draws]
    records: tuple[str, ...]


def duels(cells: Cells, factor: str) -> pd.DataFrame:
    """Every two values of a label, wherever all else is the same: other labels, hyperparameters, and the metric.

    Of a metric that was taken by several protocols, the one that most recipes have counts: the windows of one may be among
    those of another. A recipe that reads no calibration data meets those of every set. Where algorithms are compared, their
    hyperparameters are theirs, and each choice of them is a contestant.

    Returns:
        A row for each: one, other, metric, context (the labels both share), effect, low, high, p (corrected for all
        rows), winner (empty where the difference is not sure), records.

    Raises:
        ValueError: If no two recipes differ in that label alone.
    """
    found = list(_duels(cells, factor))
    if not found:
        raise ValueError(f"no two recipes differ in {factor} alone and have the same windows or documents")
    results = differences([duel.pair for duel in found])
    p = holm([result.p for result in results])
    return pd.DataFrame([
        {
            "one": duel.one, "other": duel.other, "metric": duel.metric, "context": duel.context,
            "effect": result.effect, "low": result.low, "high": result.high, "p": float(adjusted),
            "winner": _winner(duel, result, float(adjusted)), "records": " ".join(duel.records),
        }
        for duel, result, adjusted in zip(found, results, p, strict=True)
    ])  # fmt: skip


def _duels(cells: Cells, factor: str) -> Iterator[_Duel]:
    groups: dict[tuple[object, ...], list[_Contestant]] = {}
    for recipe in cells.recipes:
        if not recipe.is_float and label(recipe.records[0], factor):
            contestant = _contestant(cells, recipe, factor)
            groups.setdefault(contestant.alike, []).append(contestant)
    place = {
        value: i for i, value in enumerate(dict.fromkeys(c.value for found in groups.values() for c in found))
    }
    metrics = usual(_measured(cells, c.recipe) for found in groups.values() for c in found)
    for found in groups.values():
        for metric in (m for m in cells.metrics if m in metrics):
            for one, other in combinations(sorted(found, key=lambda c: place[c.value]), 2):
                if one.value != other.value and (duel := _duel(cells, one, other, metric)) is not None:
                    yield duel


def _measured(cells: Cells, recipe: Recipe) -> dict[str, int]:
    found = {metric: cells.result(recipe, metric) for metric in cells.metrics}
    return {metric: one.n_items for metric, one in found.items() if one is not None and one.draws is not None}


def _contestant(cells: Cells, recipe: Recipe, factor: str) -> _Contestant:
    record = recipe.records[0]
    labels = {key: label(record, key) for key in ("model", "algo", "scheme") if key != factor}
    if factor in _BITS:
        labels["scheme"] = re.sub(_BITS[factor], "", labels["scheme"], count=1)
    own, last = _OWN.get(factor), factor.rpartition(".")[2]
    did = {
        key: str(value)
        for key, value in recipe_of(record).items()
        if not (own and own(key)) and not ("." in factor and key.rpartition(".")[2] == last)
    }
    data = {key: value for key, value in did.items() if key.partition(".")[0] == "calib"}
    rest = {key: value for key, value in did.items() if key not in data}
    if "seed" in (*cells.names, *cells.across) and factor != "seed":
        data["seed"] = label(record, "seed")
    shown = zip((*cells.names, *cells.across), (*recipe.labels, *recipe.across), strict=True)
    return _Contestant(
        recipe, label(record, factor), (*labels.items(), *sorted(rest.items())),
        tuple(sorted(data.items())) if record["labels"]["calib"] is not None else None,
        tuple(text for name, text in shown if name != factor),
    )  # fmt: skip


def _duel(cells: Cells, one: _Contestant, other: _Contestant, metric: str) -> _Duel | None:
    """`None` where they were calibrated on different data, or have not the same items."""
    if one.data is not None and other.data is not None and one.data != other.data:
        return None
    first, second = cells.result(one.recipe, metric), cells.result(other.recipe, metric)
    if first is None or second is None or first.draws is None or second.draws is None:
        return None
    if not same_items(first, second):
        return None
    context = " ".join(filter(None, dict.fromkeys(one.context + other.context)))
    pair = first.draws, second.draws
    return _Duel(one.value, other.value, metric, context, pair, first.records + second.records)


def _winner(duel: _Duel, difference: Difference, p: float) -> str:
    if not p < SURE:
        return ""
    return duel.one if (difference.effect < 0) == lower_is_better(duel.metric) else duel.other


def wins_table(cells: Cells, spec: TableSpec, anchor: str) -> Made:
    """Each value against each other: won, undecided, lost.

    Raises:
        ValueError: If nothing can be compared.
    """
    found = duels(cells, spec.factor)
    names = list(dict.fromkeys([*found["one"], *found["other"]]))
    rows = []
    for name in names:
        cells_ = [_count(found, name, other) for other in names]
        mine = found[(found["one"] == name) | (found["other"] == name)]
        won = int((mine["winner"] == name).sum())
        lost = int((mine["winner"] != "").sum()) - won
        rows.append((Cell(name), *cells_, Cell(f"{won} / {len(mine) - won - lost} / {lost}", won - lost)))
    note = (
        f"won / undecided / lost by the row against the column, over {len(found)} comparisons with all else equal; "
        f"won where p < {SURE} after correction for all of them."
    )
    if len({base(metric) for metric in cells.metrics}) < len(cells.metrics):
        note += " Of a metric that was taken by several protocols, the one that most recipes have is counted."
    columns = (spec.factor, *(f"against {name}" for name in names), "all")
    return Made(
        PageTable(spec.title, columns, tuple(rows), 1, (note, *failures(cells.failed)), anchor=anchor), found
    )


def _count(found: pd.DataFrame, name: str, other: str) -> Cell:
    if name == other:
        return Cell("")
    pair = {name, other}
    mine = found[np.array([{a, b} == pair for a, b in zip(found["one"], found["other"], strict=True)])]
    if mine.empty:
        return Cell("")
    won, lost = int((mine["winner"] == name).sum()), int((mine["winner"] == other).sum())
    records = tuple(dict.fromkeys(r for text in mine["records"] for r in text.split()))
    return Cell(f"{won} / {len(mine) - won - lost} / {lost}", won - lost, "", records)
