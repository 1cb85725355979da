"""The figures of a study, made of records as its specification says."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from qbench.report import matrix
from qbench.report.agreement import better_is_higher, wide
from qbench.report.cells import Cells, chosen, label
from qbench.report.correlation import spearman
from qbench.report.figures.curves import bits_curves
from qbench.report.figures.fronts import pareto
from qbench.report.figures.grids import correlation_map, heat_map
from qbench.report.figures.radar import retention_radar
from qbench.report.figures.storage import equal_storage
from qbench.report.figures.wins import wins_matrix
from qbench.report.labels import check_labels
from qbench.report.marked import stem
from qbench.report.metrics import lower_is_better
from qbench.report.points import Points, axis_title, cost_note, points_of, sure_of_front, why_no_cost
from qbench.report.retention import polygons, retention, tasks
from qbench.report.significance import SURE
from qbench.report.spec import FigureKind, FigureSpec
from qbench.report.tables import file_name
from qbench.report.wins import duels
from qbench.track.records import Record
from qbench.track.source import Source

_GROUP = ["model", "algo", "scheme", "setting"]  # of one matrix


@dataclass(frozen=True, eq=False)
class Drawn:
    """A figure, and what to say below it."""

    title: str
    caption: str
    figure: Figure


def figures(
    specs: Mapping[str, FigureSpec], records: Sequence[Record], source: Source, algorithms: Sequence[str] = ()
) -> tuple[dict[str, Drawn], dict[str, str]]:
    """All figures of a study by name of file, and those that the records do not suffice for, with the reason."""
    drawn: dict[str, Drawn] = {}
    lacking: dict[str, str] = {}
    for name, spec in specs.items():
        mine = [r for r in chosen(records, spec.where, algorithms) if r["status"] == "done"]
        try:
            check_labels(records, spec.labels)
            if all(r["labels"]["algo"] == "fp" for r in mine):
                raise ValueError("no record is of it")
            for file, one in _KINDS[spec.kind](name, spec, mine, source):
                drawn[stem(file)] = one
        except ValueError as error:  # what was drawn before stays: one model may lack what others have
            lacking[name] = str(error)
    return drawn, lacking


Drawings = Iterator[tuple[str, Drawn]]


def _by_model(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["labels"]["model"], []).append(record)
    return found


def _cells(records: Sequence[Record], source: Source, spec: FigureSpec) -> Cells:
    return Cells.of(records, source, ("model", "scheme", "algo", "calib"), metrics=spec.metrics)


def _none(spec: FigureSpec) -> ValueError:
    return ValueError(f"no record has a metric like {' or '.join(spec.metrics)}")


def _points(
    spec: FigureSpec, records: Sequence[Record], source: Source, x: str
) -> Iterator[tuple[str, str, Points]]:
    """By model and metric, those that are not empty.

    Raises:
        ValueError: After these, if a model had a metric, but no point.
    """
    measured, without = False, list[str]()
    for model, mine in _by_model(records).items():
        cells = _cells(mine, source, spec)
        quantized = [recipe for recipe in cells.recipes if not recipe.is_float]
        metrics = [m for m in cells.metrics if any(cells.result(recipe, m) for recipe in quantized)]
        found = [(metric, points_of(cells, metric, x)) for metric in metrics]
        measured |= bool(found)
        yield from ((model, metric, points) for metric, points in found if not points.frame.empty)
        if found and all(points.frame.empty for _, points in found):
            without.append(model)
    if not measured:
        raise _none(spec)
    if without:
        mine = [r for model in without for r in _by_model(records)[model]]
        raise ValueError(f"{', '.join(without)}: {why_no_cost(mine, x)}")


def _pareto(name: str, spec: FigureSpec, records: Sequence[Record], source: Source) -> Drawings:
    names = sorted({label(r, "algo") for r in records})
    for model, metric, found in _points(spec, records, source, spec.cost):
        lower = lower_is_better(metric)
        points = found.frame.assign(significant=sure_of_front(found.frame, lower))
        figure = pareto(
            points,
            axis_title(spec.cost),
            metric,
            lower_is_better=lower,
            fp=found.floating,
            names=names,
            width=6.5,
        )
        caption = (
            "Bars: 95 % interval of the difference to floating point, paired. Half-filled: not surely better "
            f"than the next cheaper recipe of the front.{found.note}{cost_note(spec.cost)}"
        )
        yield (
            f"{name}-{model}-{file_name(metric)}",
            Drawn(f"{spec.title}: {model}, {metric}", caption, figure),
        )


def _storage(name: str, spec: FigureSpec, records: Sequence[Record], source: Source) -> Drawings:
    rows: dict[str, list[dict[str, object]]] = {}
    notes: dict[str, str] = {}
    for model, metric, found in _points(spec, records, source, "model_mb"):
        lower = lower_is_better(metric)
        best = found.frame.sort_values("y", ascending=lower, kind="stable").drop_duplicates("scheme")
        notes[metric] = notes.get(metric, "") or found.note
        rows.setdefault(metric, []).extend(
            {
                "model": model, "scheme": row["scheme"], "bytes": row["x"] * 1e6, "value": row["y"],
                "low": row["y_low"], "high": row["y_high"],
            }
            for _, row in best.iterrows()
        )  # fmt: skip
    for metric, points in rows.items():
        figure = equal_storage(pd.DataFrame(points), metric, width=6.5)
        caption = "The best recipe of each scheme. Bars: 95 % interval of the difference to floating point."
        yield f"{name}-{file_name(metric)}", Drawn(f"{spec.title}: {metric}", caption + notes[metric], figure)


def _curves(name: str, spec: FigureSpec, records: Sequence[Record], source: Source) -> Drawings:
    names = sorted({label(r, "algo") for r in records})
    for model, metric, found in _points(spec, records, source, spec.cost):
        lower = lower_is_better(metric)
        best = found.frame.sort_values("y", ascending=lower, kind="stable").drop_duplicates(["label", "x"])
        frame = best.rename(
            columns={"label": "algo", "x": "bits", "y": "value", "y_low": "low", "y_high": "high"}
        )
        figure = bits_curves(frame, metric, lower_is_better=lower, fp=found.floating, names=names, width=6.5)
        caption = f"Bands: 95 % interval of the difference to floating point, paired.{found.note}"
        yield (
            f"{name}-{model}-{file_name(metric)}",
            Drawn(f"{spec.title}: {model}, {metric}", caption, figure),
        )


def _radar(name: str, spec: FigureSpec, records: Sequence[Record], source: Source) -> Drawings:
    lacking, measured = list[str](), False
    for model, mine in _by_model(records).items():
        cells = _cells(mine, source, spec)
        if not cells.metrics:
            continue
        measured = True
        found, out = retention(cells)
        left_out = f" Left out: {', '.join(out)}." if out else ""
        if not found.empty:
            found = found.assign(task=tasks(found["metric"]), scheme=polygons(found, cells.names))
        if found.empty or (n := found["task"].nunique()) < 3:
            lacking.append(
                f"{model}: a radar needs three tasks above guessing, there are {0 if found.empty else n}.{left_out}"
            )
            continue
        frame = found.rename(columns={"value": "retention"})
        caption = f"Share of the accuracy above guessing that is kept.{left_out}"
        yield f"{name}-{model}", Drawn(f"{spec.title}: {model}", caption, retention_radar(frame, width=6.5))
    if not measured:
        raise _none(spec)
    if lacking:
        raise ValueError(" ".join(lacking).removesuffix("."))


def _matrix(name: str, spec: FigureSpec, records: Sequence[Record], source: Source) -> Drawings:
    found = matrix.compare(matrix.losses(records, source.samples, spec.metrics))
    if found.empty:
        raise _none(spec)
    if found.groupby(_GROUP, sort=False)["calib"].nunique().max() < 2:
        raise ValueError(
            f"one calibration set ({found['calib'].iloc[0]}) was used for each recipe, a matrix needs two"
        )
    for key, part in found.groupby(_GROUP, sort=False):
        if part["calib"].nunique() < 2:
            continue
        title = " ".join(filter(None, map(str, key)))
        values, changes, p = (
            part.pivot(index="calib", columns="text", values=column).reindex(
                index=part["calib"].unique(), columns=part["text"].unique()
            )
            for column in ("value", "change", "p")
        )
        marks = (p < SURE).replace({True: "*", False: ""})
        caption = (
            "Perplexity and how much worse than the column's best; * surely worse (p < 0.05, corrected)."
        )
        figure = heat_map(values, changes, marks, shade="worse than the best", width=6.5)
        yield f"{name}-{title}", Drawn(f"{spec.title}: {title}", caption, figure)


def _wins(name: str, spec: FigureSpec, records: Sequence[Record], source: Source) -> Drawings:
    found = duels(_cells(records, source, spec), spec.factor)
    rows = []
    for (one, other), part in found.groupby(["one", "other"], sort=False):
        won, lost = int((part["winner"] == one).sum()), int((part["winner"] == other).sum())
        tied = len(part) - won - lost
        rows += [
            {"row": one, "column": other, "won": won, "tied": tied, "lost": lost},
            {"row": other, "column": one, "won": lost, "tied": tied, "lost": won},
        ]
    caption = f"{len(found)} comparisons with all else equal; won where p < {SURE} after correction."
    yield name, Drawn(spec.title, caption, wins_matrix(pd.DataFrame(rows), width=6.5))


def _spearman(name: str, spec: FigureSpec, records: Sequence[Record], source: Source) -> Drawings:
    frame = better_is_higher(wide(_cells(records, source, spec)))
    frame = frame.dropna(axis="columns", thresh=3)
    if frame.shape[1] < 2:
        raise ValueError(f"{frame.shape[1]} metrics have three recipes or more, two are needed")
    found = spearman(frame)
    marks = (found.p < SURE).replace({True: "*", False: ""})
    caption = f"Over {len(frame)} recipes, better counted as higher; * where p < {SURE}, corrected."
    yield name, Drawn(spec.title, caption, correlation_map(found.rho, marks, width=6.5))


_KINDS: dict[FigureKind, Callable[[str, FigureSpec, Sequence[Record], Source], Drawings]] = {
    "pareto": _pareto,
    "storage": _storage,
    "curves": _curves,
    "radar": _radar,
    "matrix": _matrix,
    "wins": _wins,
    "spearman": _spearman,
}
