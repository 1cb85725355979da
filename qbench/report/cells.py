"""Records to the cells of a table: which jobs are one recipe, what each metric is over its draws, and its items."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qbench.report.frame import protocol
from qbench.report.labels import Labels as Labels
from qbench.report.labels import draw_of, matches, settings
from qbench.report.labels import label as label  # this is where others look for it
from qbench.report.metrics import base, is_cost, is_perplexity, kind
from qbench.report.result import Result as Result
from qbench.report.result import digests, stderr_of
from qbench.report.significance import Draws
from qbench.report.spec import Where
from qbench.track.records import Record
from qbench.track.source import Source


@dataclass(frozen=True, eq=False)
class Recipe:
    """The jobs of one row, which differ in their seeds alone.

    Attributes:
        labels: What the row says, in the order of the table's label columns.
        across: What the columns say beside the metric.
    """

    labels: Labels
    across: Labels
    records: list[Record]

    @property
    def is_float(self) -> bool:
        return bool(self.records[0]["labels"]["algo"] == "fp")


@dataclass
class Cells:
    """The recipes of a selection of records, and their results.

    Attributes:
        names: Of the label columns; `setting` is the last where jobs differ in more than the other labels say.
    """

    source: Source
    names: tuple[str, ...]
    across: tuple[str, ...]
    recipes: list[Recipe]
    patterns: tuple[str, ...]
    failed: list[Record]
    _results: dict[tuple[int, str], Result] = field(default_factory=dict)
    _orders: dict[bytes, tuple[tuple[str, ...], np.ndarray]] = field(default_factory=dict)
    _seeds: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        records: Sequence[Record],
        source: Source,
        rows: Sequence[str],
        columns: Sequence[str] = (),
        metrics: Sequence[str] = ("ppl/*", "acc/*"),
    ) -> "Cells":
        """Put records together to recipes: those that differ in seeds alone are draws of one."""
        done = [r for r in records if r["status"] == "done"]
        named = (*rows, *columns)
        told = settings(done, named)
        names = (*rows, *(["setting"] if any(told.values()) else []))
        found: dict[tuple[Labels, Labels], Recipe] = {}
        for record in done:
            labels = tuple(label(record, key) for key in rows)
            labels += (told[record["fingerprint"]],) if len(names) > len(rows) else ()
            across = tuple(label(record, key) for key in columns)
            found.setdefault((labels, across), Recipe(labels, across, [])).records.append(record)
        recipes = sorted(found.values(), key=_order(done))
        failed = [r for r in records if r["status"] == "failed"]
        return cls(source, names, tuple(columns), recipes, tuple(metrics), failed)

    @cached_property
    def metrics(self) -> list[str]:
        """Names with protocol where there are several, in the order of the patterns and of appearance."""
        ways: dict[str, dict[str, None]] = {}
        for recipe in self.recipes:
            for record in recipe.records:
                for name in record["metrics"]:
                    if not name.endswith("_stderr") and matches(name, self.patterns):
                        ways.setdefault(name, {})[protocol(record, name) if not is_cost(name) else ""] = None
        self._ways = {name: len(found) > 1 for name, found in ways.items()}
        order = sorted(ways, key=lambda n: next(i for i, p in enumerate(self.patterns) if fnmatchcase(n, p)))
        return [f"{n} {way}".strip() if self._ways[n] else n for n in order for way in ways[n]]

    @cached_property
    def items(self) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
        """By fingerprint and metric: the items and their values."""
        fingerprints = [r["fingerprint"] for recipe in self.recipes for r in recipe.records]
        table = self.source.sample_table(fingerprints).select(["fingerprint", "metric", "item", "value"])
        wanted = pa.array(list({base(metric): None for metric in self.metrics}), pa.string())
        frame = table.filter(pc.is_in(table["metric"], wanted)).to_pandas()
        item, value = frame["item"].to_numpy(), frame["value"].to_numpy(dtype=float)
        places = frame.groupby(["fingerprint", "metric"], sort=False).indices
        return {(str(f), str(m)): (item[place], value[place]) for (f, m), place in places.items()}

    def result(self, recipe: Recipe, metric: str) -> Result | None:
        """What a recipe's jobs measured; `None` where none of them did, by this protocol."""
        key = id(recipe), metric
        if key not in self._results:
            found = self._result(recipe, metric)
            if found is None:
                return None
            self._results[key] = found
        return self._results[key]

    def _result(self, recipe: Recipe, metric: str) -> Result | None:
        name = base(metric)
        mine = [
            r
            for r in recipe.records
            if name in r["metrics"]
            and (not self._several(name) or f"{name} {protocol(r, name)}".strip() == metric)
        ]
        if not mine:
            return None
        # Jobs of one recipe and one draw differ in what else was evaluated: this number is the same in both.
        mine = list({self._draw(r): r for r in mine}.values())
        values = np.array([r["metrics"][name] for r in mine], dtype=float)
        fingerprints = tuple(r["fingerprint"] for r in mine)
        draws = None if is_cost(name) else self._draws(mine, name)
        value = float(np.exp(np.log(values).mean()) if is_perplexity(name) else values.mean())
        of_items = [r["metrics"].get(f"{name}_stderr") for r in mine]
        stderr, texts = stderr_of(values, of_items), digests(mine, name)
        return Result(value, stderr, len(draws.items) if draws else 0, fingerprints, draws, texts)

    def _several(self, name: str) -> bool:
        _ = self.metrics
        return self._ways.get(name, False)

    def _draws(self, records: Sequence[Record], name: str) -> Draws | None:
        """`None` where some have no items, or others, or of other texts, or several of one document, as of its parts."""
        if len({digests([r], name) for r in records}) > 1:
            return None
        records = sorted(records, key=self._draw)
        found = [self.items.get((r["fingerprint"], name)) for r in records]
        known = [one for one in found if one is not None]
        sorts = [self._sorted(item) for item, _ in known]
        names = sorts[0][0] if sorts else ()
        if len(known) < len(records) or len(set(names)) < len(names) or any(n != names for n, _ in sorts):
            return None
        values = np.array([value[order] for (_, value), (_, order) in zip(known, sorts, strict=True)])
        return Draws(names, values, any(map(self._draw, records)), kind(name) == "loss")

    def _draw(self, record: Record) -> str:
        """Its seeds, which are asked for in every metric."""
        key = record["fingerprint"]
        if key not in self._seeds:
            self._seeds[key] = draw_of(record)
        return self._seeds[key]

    def _sorted(self, items: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
        """Names of items in order, and the order; most jobs have the same."""
        key = items.tobytes()
        if key not in self._orders:
            names = items.astype(str)
            order = np.argsort(names, kind="stable")
            self._orders[key] = tuple(names[order].tolist()), order
        return self._orders[key]

    def floating(self, recipe: Recipe, metric: str) -> Result | None:
        """What the very same model scored on the same text before it was quantized."""
        mine, model = self.result(recipe, metric), recipe.records[0]["identity"]["model"]
        same = (r for r in self.recipes if r.is_float and r.records[0]["identity"]["model"] == model)
        found = (self.result(r, metric) for r in same) if mine is not None else ()
        return next((one for one in found if one is not None and mine and one.texts == mine.texts), None)

    def columns(self) -> list[tuple[Labels, str]]:
        """The columns of numbers: what stands across, and the metric.

        Those that a quantized model has a number in, if there are such: floating point alone, evaluated for something
        else, is no column.
        """
        across = list(dict.fromkeys(recipe.across for recipe in self.recipes))
        found = {(a, m): [r.is_float for r, _ in self.column(a, m)] for m in self.metrics for a in across}
        quantized = [place for place, floating in found.items() if not all(floating)]
        return quantized or [place for place, floating in found.items() if floating]

    def column(self, across: Labels, metric: str) -> Iterator[tuple[Recipe, Result]]:
        """The recipes that have a number there."""
        for recipe in self.recipes:
            if recipe.across == across and (found := self.result(recipe, metric)) is not None:
                yield recipe, found


def chosen(records: Sequence[Record], where: Where, algorithms: Sequence[str] = ()) -> list[Record]:
    """The records that match all of `where`; and of their models, the floating-point ones.

    Args:
        algorithms: The only ones, where `where` names none.
    """
    conditions = dict(where)
    if algorithms and "algo" not in conditions:
        conditions["algo"] = tuple(algorithms)
    fitting = [r for r in records if all(matches(label(r, key), one) for key, one in conditions.items())]
    models = {r["labels"]["model"] for r in fitting}
    kept = {r["fingerprint"] for r in fitting}
    return [
        r
        for r in records
        if r["fingerprint"] in kept or (r["labels"]["algo"] == "fp" and r["labels"]["model"] in models)
    ]


def _order(records: Sequence[Record]) -> Any:
    """Floating point first, then from many bits to few; models, algorithms and sets in order of appearance."""
    place: dict[str, dict[Any, int]] = {
        key: {v: i for i, v in enumerate(dict.fromkeys(r["labels"][key] for r in records))}
        for key in ("model", "algo", "calib")
    }

    def key(recipe: Recipe) -> tuple[Any, ...]:
        labels: Mapping[str, Any] = recipe.records[0]["labels"]
        return (
            place["model"][labels["model"]], labels["algo"] != "fp",
            -labels["wbits"], -labels["abits"], -labels["kvbits"], str(labels["scheme"]),
            place["algo"][labels["algo"]], place["calib"][labels["calib"]], recipe.labels, recipe.across,
        )  # fmt: skip

    return key
