"""Metrics of recipes: the best of each column, what ties with it, and what difference could have been seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from qbench.report.cells import Cells, Recipe, Result
from qbench.report.labels import Labels, label, title_of
from qbench.report.marked import TIE, Made
from qbench.report.metrics import is_cost, lower_is_better, shown_effect
from qbench.report.page.content import Cell, Mark, PageTable
from qbench.report.power import table_detectable
from qbench.report.significance import SURE, Draws, Standing, table_ties
from qbench.report.spec import TableSpec
from qbench.report.tables import COSTS, number
from qbench.track.records import Record

Group = tuple[Labels, Labels, str]  # what is compared: rows alike in `within`, what stands across, a metric
_REASONS = 3  # failures or recipes that a note names
_POWER = 0.8
_WIDE = 1.5  # times that the least differences of a column's groups may differ, to be told as one


@dataclass(frozen=True, eq=False)
class Compared:
    """Where recipes stand among those that they may be compared with.

    Attributes:
        standings: By group, and in it by the number of the recipe.
        groups: Those that a recipe stands in, by its number and the metric.
        unlike: Metrics in which recipes could not be compared, since they were not asked the same items.
        bare: By metric: the recipes that have no items to compare.
    """

    standings: Mapping[Group, Mapping[int, Standing]]
    groups: Mapping[tuple[int, str], Sequence[Group]]
    unlike: tuple[str, ...] = ()
    bare: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def standing(self, recipe: int, metric: str) -> Standing | None:
        """Of several groups, the one in which the recipe stands worst."""
        found = [self.standings[group][recipe] for group in self.groups.get((recipe, metric), ())]
        return min(found, key=lambda s: (s.best, s.tie, 1.0 if s.p is None else s.p), default=None)

    @property
    def family(self) -> int:
        """For how many comparisons p-values are corrected."""
        return next((s.family for group in self.standings.values() for s in group.values()), 0)


def compared(cells: Cells, within: Sequence[str]) -> Compared:
    """Compare the recipes that are alike in the labels `within`, floating point apart, in each metric that has items.

    A recipe without calibration data is like those of every set.
    """
    members: dict[Group, dict[int, Draws]] = {}
    texts: dict[Group, set[tuple[str, ...]]] = {}
    bare: dict[str, list[str]] = {}
    places = _alike(cells, within)
    for metric in cells.metrics:
        for (i, across), alikes in places.items():
            found = cells.result(cells.recipes[i], metric)
            if found is None or is_cost(metric):
                continue
            if found.draws is None:
                bare.setdefault(metric, []).append(" ".join(filter(None, cells.recipes[i].labels)))
                continue
            for alike in alikes:
                members.setdefault((alike, across, metric), {})[i] = found.draws
                texts.setdefault((alike, across, metric), set()).add(found.texts)
    members = {group: found for group, found in members.items() if len(found) > 1}
    same = {
        g: len({draws.items for draws in found.values()}) == len(texts[g]) == 1
        for g, found in members.items()
    }
    unlike = dict.fromkeys(group[2] for group, is_same in same.items() if not is_same)
    members = {group: found for group, found in members.items() if same[group]}
    groups: dict[tuple[int, str], list[Group]] = {}
    for group, several in members.items():
        for i in several:
            groups.setdefault((i, group[2]), []).append(group)
    lower = {group: lower_is_better(group[2]) for group in members}
    return Compared(table_ties(members, lower) if members else {}, groups, tuple(unlike), bare)


def _alike(cells: Cells, within: Sequence[str]) -> dict[tuple[int, Labels], list[Labels]]:
    """By number and place of a quantized recipe: the labels `within`, of each group that it belongs to."""
    recipes = [(i, recipe) for i, recipe in enumerate(cells.recipes) if not recipe.is_float]
    own = {i: tuple(label(recipe.records[0], key) for key in within) for i, recipe in recipes}
    data = [key.partition(".")[0] == "calib" for key in within]
    found: dict[tuple[int, Labels], list[Labels]] = {}
    for i, recipe in recipes:
        found[i, recipe.across] = [own[i]]
        if any(data) and recipe.records[0]["labels"]["calib"] is None:
            others = (own[j] for j, other in recipes if other.records[0]["labels"]["calib"] is not None)
            like = [o for o in others if all(d or a == b for d, a, b in zip(data, o, own[i], strict=True))]
            found[i, recipe.across] = list(dict.fromkeys(like)) or [own[i]]
    return found


def results_table(cells: Cells, spec: TableSpec, anchor: str) -> Made:
    """Recipes down, metrics across.

    Raises:
        ValueError: If no record has such a metric.
    """
    columns = cells.columns()
    if not columns:
        raise ValueError(f"no record of these has a metric like {' or '.join(spec.metrics)}")
    shown, standing = set(columns), compared(cells, spec.within)
    rows: dict[Labels, dict[tuple[Labels, str], Cell]] = {}
    numbers = []
    for i, recipe in enumerate(cells.recipes):
        row = rows.setdefault(recipe.labels, {})
        for metric in cells.metrics:
            found = cells.result(recipe, metric) if (recipe.across, metric) in shown else None
            if found is not None:
                place = standing.standing(i, metric)
                row[recipe.across, metric] = cell_of(found, place)
                numbers.append(_number(cells, recipe, metric, found, place))
    table = PageTable(
        spec.title,
        (*cells.names, *(heading(across, metric) for across, metric in columns)),
        tuple(
            (*map(Cell, labels), *(row.get(column, Cell("")) for column in columns))
            for labels, row in rows.items()
            if row
        ),
        len(cells.names),
        (*_notes(standing, spec.within), *failures(cells.failed)),
        anchor=anchor,
    )
    return Made(table, pd.DataFrame(numbers))


def heading(across: Labels, metric: str) -> str:
    """What a column of numbers is called."""
    return " ".join(filter(None, (*across, COSTS.get(metric, metric))))


def cell_of(found: Result, place: Standing | None) -> Cell:
    """A number with its mark."""
    mark: Mark = ""
    if place is not None:
        mark = "best" if place.best else "tie" if place.tie else "worse"
    return Cell(number(found.value, found.stderr), found.value, mark, found.records)


def _number(
    cells: Cells, recipe: Recipe, metric: str, found: Result, place: Standing | None
) -> dict[str, object]:
    difference = place.difference if place else None
    return {
        **dict(zip(cells.names, recipe.labels, strict=True)),
        **dict(zip(cells.across, recipe.across, strict=True)),
        "metric": metric, "value": found.value, "stderr": found.stderr,
        "draws": len(found.records), "items": found.n_items,
        "best": place.best if place else None, "tie": place.tie if place else None,
        "to_best": difference.effect if difference else None,
        "low": difference.low if difference else None, "high": difference.high if difference else None,
        "p": place.p if place else None, "test": difference.test if difference else None,
        "records": " ".join(found.records),
    }  # fmt: skip


def _notes(standing: Compared, within: Sequence[str]) -> list[str]:
    notes = []
    if standing.standings:
        alike = f" among rows alike in {', '.join(within)}" if within else ""
        notes.append(
            f"best: of its column{alike}. {TIE}: not surely worse than that (paired over windows or documents, and over "
            f"seeds; p ≥ {SURE} after correction for all {standing.family} pairs that could be compared)."
        )
        if any(key.partition(".")[0] == "calib" for key in within):
            notes[-1] += " A recipe that reads no calibration data is compared with those of every set."
    if seen := _detectable(standing):
        notes.append(
            f"Least difference that this table finds {_POWER:.0%} of the time, over windows or documents: "
            f"{', '.join(seen)}. Where seeds differ, it takes more."
        )
    if standing.unlike:
        notes.append(f"Not compared, for want of equal windows or documents: {', '.join(standing.unlike)}.")
    if standing.bare:
        told = [f"{metric} of {_some(recipes)}" for metric, recipes in standing.bare.items()]
        notes.append(
            f"Not compared, for want of windows or documents that all draws kept: {'; '.join(told)}."
        )
    return notes


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _REASONS} more" if len(names) > _REASONS else ""
    return ", ".join(names[:_REASONS]) + more


def _detectable(standing: Compared) -> list[str]:
    """By metric, as text: what is least, of the rows that are compared; a range where they differ much."""
    by_metric: dict[str, list[float]] = {}
    for group, effect in table_detectable(standing.standings, _POWER).items():
        if np.isfinite(effect) and effect > 0:
            by_metric.setdefault(group[2], []).append(effect)
    seen = []
    for metric, found in by_metric.items():
        low, middle, high = (
            shown_effect(metric, float(size)).lstrip("+")
            for size in (min(found), np.median(found), max(found))
        )
        wide = max(found) > _WIDE * min(found) and low != high
        seen.append(f"{low} to {high} in {metric}" if wide else f"{middle} in {metric}")
    return seen


def failures(failed: Sequence[Record]) -> list[str]:
    """What could not be measured, as a note."""
    if not failed:
        return []
    told = [f"{title_of(r)} ({r['reason']})" for r in failed[:_REASONS]]
    more = f" and {len(failed) - _REASONS} more" if len(failed) > _REASONS else ""
    return [f"Failed: {'; '.join(told)}{more}."]
