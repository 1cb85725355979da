"""Records as recipes and their items, so that what is made of some of them never depends on others.

A table may name a recipe by how it differs from the table's others; an answer that must not change when an unrelated record
is deleted may not. So everything here is told from a record alone: its recipe is its identity without seeds, and a metric
always has its protocol.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qbench.report.frame import protocol
from qbench.report.labels import WHICH_TEXT, draw_of, seedless
from qbench.report.metrics import base, kind
from qbench.report.protocols import usual
from qbench.report.significance import Draws
from qbench.track.records import Record
from qbench.track.source import Source

_Key = tuple[str, str, str, str, str, str, str]
_FAMILIES = ("ppl/", "acc/")


@dataclass(frozen=True, eq=False)
class Recipe:
    """Jobs that differ in their seeds, and in what they were evaluated on, alone.

    Attributes:
        calib: Label of the calibration set; empty where there is none.
        base: What recipes must share to be compared at all, as JSON: the model, the engine, Python's version.
        algorithm: Its identity without seeds, as JSON.
        calibration: The same of the calibration set; `null` where there is none.
    """

    model: str
    algo: str
    scheme: str
    calib: str
    base: str
    algorithm: str
    calibration: str
    records: tuple[Record, ...]

    @property
    def fingerprints(self) -> tuple[str, ...]:
        return tuple(record["fingerprint"] for record in self.records)

    @property
    def is_float(self) -> bool:
        return self.algo == "fp"

    @property
    def amount(self) -> str:
        """How the calibration set is used, whichever text it is of, as JSON."""
        about = json.loads(self.calibration)
        return _canonical({k: v for k, v in about.items() if k not in WHICH_TEXT} if about else None)

    @property
    def shown_amount(self) -> str:
        """`16 x 512 tokens`."""
        about = json.loads(self.calibration) or {}
        return (
            f"{about['n_samples']} x {about['seq_len']} tokens"
            if {"n_samples", "seq_len"} <= set(about)
            else ""
        )

    @property
    def megabytes(self) -> float | None:
        sizes = [r["metrics"]["model_mb"] for r in self.records if "model_mb" in r["metrics"]]
        return float(np.mean(sizes)) if sizes else None


@dataclass(frozen=True, eq=False)
class Joint:
    """Recipes on the metrics that most of them share, those metrics' items put one after another.

    Attributes:
        metrics: With their protocols.
        sizes: How many items each metric has.
        draws: By place of the recipe in the list that was given.
    """

    metrics: tuple[str, ...]
    sizes: tuple[int, ...]
    draws: Mapping[int, Draws]


class Evidence:
    """The recipes among records, and their items, read once."""

    def __init__(self, records: Sequence[Record], source: Source) -> None:
        self._source = source
        self._metrics: dict[tuple[int, str], dict[str, dict[str, str]]] = {}
        self._done = sorted(
            (r for r in records if r["status"] == "done"), key=lambda r: str(r["fingerprint"])
        )

    @cached_property
    def recipes(self) -> list[Recipe]:
        """In the order of their names, whatever the order of the records."""
        found: dict[_Key, list[Record]] = {}
        for record in self._done:
            found.setdefault(_key(record), []).append(record)
        return [Recipe(*key, records=tuple(records)) for key, records in sorted(found.items())]

    @cached_property
    def _items(self) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
        """By fingerprint and metric: item ids, sorted, and values."""
        table = self._source.sample_table([r["fingerprint"] for r in self._done])
        names = [table[c].combine_chunks().dictionary_encode() for c in ("fingerprint", "metric")]
        jobs, metrics = (name.indices.to_numpy(zero_copy_only=False).astype(np.int64) for name in names)
        of_jobs, of_metrics = (name.dictionary.to_pylist() for name in names)
        item, value = (table[c].to_numpy() for c in ("item", "value"))
        order = np.lexsort((item, metrics, jobs))
        jobs, metrics, item, value = jobs[order], metrics[order], item[order], value[order]
        starts = np.flatnonzero(np.diff(jobs, prepend=-1) | np.diff(metrics, prepend=-1))
        found = {}
        for start, end in zip(starts, [*starts[1:], len(jobs)], strict=True):
            name = str(of_metrics[metrics[start]])
            if name.startswith(_FAMILIES):
                found[str(of_jobs[jobs[start]]), name] = item[start:end], value[start:end]
        return found

    def metrics(self, recipe: Recipe, family: str = "ppl/") -> dict[str, dict[str, str]]:
        """By metric with its protocol: the fingerprint that measured it, by draw. A job evaluated twice counts once."""
        key = id(recipe), family
        if key not in self._metrics:
            self._metrics[key] = self._measured(recipe, family)
        return self._metrics[key]

    def _measured(self, recipe: Recipe, family: str) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for record in recipe.records:
            for name in record["metrics"]:
                if name.startswith(family) and (record["fingerprint"], name) in self._items:
                    by_draw = found.setdefault(f"{name} {protocol(record, name)}".strip(), {})
                    by_draw.setdefault(draw_of(record), record["fingerprint"])
        return found

    def _sizes(self, recipe: Recipe, family: str) -> dict[str, int]:
        """How many items a recipe has of each metric."""
        return {
            metric: max(len(self._items[job, base(metric)][0]) for job in by_draw.values())
            for metric, by_draw in self.metrics(recipe, family).items()
        }

    def draws(self, recipe: Recipe, metrics: Sequence[str], family: str = "ppl/") -> Draws | None:
        """Items of several metrics as those of one.

        `None` where no draw has them all, draws differ in items, or a value is not finite.
        """
        found = self.metrics(recipe, family)
        if not metrics or any(metric not in found for metric in metrics):
            return None
        seeds = sorted(set.intersection(*(set(found[metric]) for metric in metrics)))
        rows, ids = [], set()
        for seed in seeds:
            parts = [self._items[found[m][seed], base(m)] for m in metrics]
            ids.add(
                tuple(
                    f"{m} {i}" for m, (items, _) in zip(metrics, parts, strict=True) for i in items.tolist()
                )
            )
            rows.append(np.concatenate([values for _, values in parts]) if len(ids) == 1 else np.empty(0))
        if len(ids) != 1:
            return None
        values = np.array(rows)
        if not np.isfinite(values).all():
            return None
        return Draws(next(iter(ids)), values, seeds != [""], kind(metrics[0]) == "loss")

    def joint(self, recipes: Sequence[Recipe], family: str = "ppl/") -> Joint:
        """Recipes on the metrics that most of them share, each by one protocol.

        Those that lack one of these, or differ in items, have no draws.
        """
        metrics = _shared([self._sizes(recipe, family) for recipe in recipes])
        found = {i: d for i, r in enumerate(recipes) if (d := self.draws(r, metrics, family)) is not None}
        usual = Counter(draws.items for draws in found.values())
        if not usual:
            return Joint(metrics, (), {})
        items = min(usual, key=lambda ids: (-usual[ids], ids))
        sizes = Counter(item.rpartition(" ")[0] for item in items)
        return Joint(
            metrics, tuple(sizes[m] for m in metrics), {i: d for i, d in found.items() if d.items == items}
        )


def digest(*parts: str) -> str:
    """A short name for what has no readable one."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:6]


def _shared(measured: Sequence[Mapping[str, int]]) -> tuple[str, ...]:
    """Of the metrics that most recipes have, the largest set that the same recipes have; then that of the most items."""
    chosen = usual(measured)
    have = {m: frozenset(i for i, found in enumerate(measured) if m in found) for m in chosen}
    most = max(map(len, have.values()), default=0)
    sets = {frozenset(m for m in chosen if have[m] >= have[one]) for one in chosen if len(have[one]) == most}
    items = {m: max(found.get(m, 0) for found in measured) for m in chosen}
    return min(
        (tuple(sorted(one)) for one in sets),
        key=lambda s: (-len(s), -sum(items[m] for m in s), s),
        default=(),
    )


def _key(record: Record) -> _Key:
    labels, identity = record["labels"], record["identity"]
    apart = ("algorithm", "scheme", "calib", "evaluation")
    rest = {k: v for k, v in identity.items() if k not in apart}
    rest["python"] = record["environment"]["versions"]["python"]  # embedded text changes with it
    model, algo, scheme, calib = (str(labels[key] or "") for key in ("model", "algo", "scheme", "calib"))
    parts = (rest, identity.get("algorithm"), identity.get("calib"))
    shared, algorithm, calibration = (_canonical(seedless(part)) for part in parts)
    return model, algo, scheme, calib, shared, algorithm, calibration


def _canonical(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))
