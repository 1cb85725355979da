"""Recipes of one model that can be compared: what each costs, and what it does to perplexity, window by window."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from qbench.report.cells import Cells, Recipe, Result
from qbench.report.frame import protocol
from qbench.report.metrics import base
from qbench.track.records import Record

Latency = Callable[[Record], float]
_DIGEST = re.compile(r" @\w+")  # of a text, which does not tell windows apart
_Measured = dict[str, dict[int, Result]]  # by metric and the recipe's id


@dataclass(frozen=True, eq=False)
class Candidate:
    """A recipe.

    Attributes:
        records: Those that its perplexities are of, in order of seeds.
        bytes: Of the model as stored.
        seconds: That a step takes on the device asked for; `None` where none was.
        change: By text: what it adds to the floating-point model's negative log-likelihood, `(n_draws, n_windows)`.
    """

    recipe: Recipe
    records: tuple[Record, ...]
    bytes: float
    seconds: float | None
    change: tuple[np.ndarray, ...]

    @property
    def title(self) -> str:
        return titled(self.recipe)

    @property
    def record(self) -> Record:
        return self.records[0]

    @property
    def increase(self) -> float:
        """Of the perplexity, relative; texts count alike."""
        return float(np.expm1(np.mean([text.mean() for text in self.change])))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the increase, over windows and draws; both ends are the increase where nothing varies.

        Student's, with the degrees of freedom of Welch and Satterthwaite: quantiles of few draws are too near.
        """
        parts = [text.mean(axis=0) / len(self.change) for text in self.change]
        parts.append(np.mean([text.mean(axis=1) for text in self.change], axis=0))
        spread = np.array([(part.var(ddof=1) / len(part), len(part) - 1) for part in parts if len(part) > 1])
        half = 0.0
        if len(spread) and (total := spread[:, 0].sum()) > 0:
            half = stats.t.isf(0.025, total**2 / (spread[:, 0] ** 2 / spread[:, 1]).sum()) * np.sqrt(total)
        low, high = np.expm1(np.log1p(self.increase) + np.array([-half, half]))
        return float(low), float(high)

    @property
    def has_luck(self) -> bool:
        """Whether calibration samples were drawn for it, and only once: how much hangs on the draw is not known."""
        return self.record["labels"]["calib"] is not None and len(self.change[0]) == 1


@dataclass(frozen=True, eq=False)
class Field:
    """Recipes that were evaluated alike.

    Attributes:
        metrics: The perplexities that decide.
        protocol: How they were taken, such as `[512 x 24]`: the length of windows, and the most of them.
        floating: The model before quantization, which is one of the candidates.
        left_out: Recipes that lack one of the metrics, or have other windows.
    """

    metrics: tuple[str, ...]
    protocol: str
    candidates: tuple[Candidate, ...]
    floating: Candidate
    left_out: tuple[str, ...]

    @property
    def n_windows(self) -> int:
        return sum(text.shape[1] for text in self.floating.change)


def titled(recipe: Recipe) -> str:
    return " ".join(part for part in recipe.labels if part)


def fields(cells: Cells, latency: Latency | None = None, texts: Sequence[str] = ()) -> list[Field]:
    """The sets of recipes with the same perplexities, from most recipes to fewest; of equal ones, most windows first.

    Args:
        texts: What perplexity must be of, and of nothing else; empty: of anything.
    """
    metrics = [m for m in cells.metrics if not texts or _text(m) in texts]
    measured = {metric: dict(_of_all(cells, metric)) for metric in metrics}
    found = []
    for alike in _sets(cells, measured):
        if texts and {_text(m) for m in alike} != set(texts):
            continue
        for recipe in cells.recipes:
            if recipe.is_float and all(id(recipe) in measured[m] for m in alike):
                found.append(_field(cells, recipe, alike, measured, latency))
    return sorted(
        (one for one in found if len(one.candidates) > 1), key=lambda f: (-len(f.candidates), -f.n_windows)
    )


def _text(metric: str) -> str:
    return base(metric).partition("/")[2]


def _of_all(cells: Cells, metric: str) -> Iterator[tuple[int, Result]]:
    for recipe in cells.recipes:
        found = cells.result(recipe, metric)
        if found is not None and found.draws is not None:
            yield id(recipe), found


def _sets(cells: Cells, measured: _Measured) -> list[tuple[str, ...]]:
    """What single jobs measured, and what any two of these have in common."""
    own = dict[tuple[str, ...], None]()
    for record in (record for recipe in cells.recipes for record in recipe.records):
        own[tuple(m for m in measured if _shown(record, base(m), measured) == m)] = None
    common = [tuple(m for m in a if m in b) for a, b in combinations(own, 2)]
    return [alike for alike in dict.fromkeys([*own, *common]) if alike]


def _shown(record: Record, name: str, measured: _Measured) -> str | None:
    """A record's metric, with its protocol where tables tell several apart."""
    if name not in record["metrics"]:
        return None
    return name if name in measured else f"{name} {protocol(record, name)}".strip()


def _field(
    cells: Cells, floating: Recipe, alike: tuple[str, ...], measured: _Measured, latency: Latency | None
) -> Field:
    reference = [measured[metric][id(floating)] for metric in alike]
    found, left_out = [], []
    for recipe in cells.recipes:
        if recipe.is_float and recipe is not floating:
            continue
        results = [measured[metric].get(id(recipe)) for metric in alike]
        change = _change(recipe, floating, alike, results, reference)
        if change is None:
            left_out.append(titled(recipe))
            continue
        behind = {fingerprint for result in results if result for fingerprint in result.records}
        records = [r for r in recipe.records if r["fingerprint"] in behind]
        records.sort(key=lambda r: (r["labels"]["seed"] or 0, r["fingerprint"]))
        stored = float(np.mean([r["metrics"]["model_mb"] for r in records])) * 1e6
        seconds = latency(records[0]) if latency is not None else None
        found.append(Candidate(recipe, tuple(records), stored, seconds, change))
    own = next(c for c in found if c.recipe is floating)
    ways = dict.fromkeys(_DIGEST.sub("", protocol(own.record, base(metric))) for metric in alike)
    return Field(tuple(map(base, alike)), ", ".join(ways), tuple(found), own, tuple(left_out))


def _change(
    recipe: Recipe,
    floating: Recipe,
    metrics: Sequence[str],
    results: Sequence[Result | None],
    reference: Sequence[Result],
) -> tuple[np.ndarray, ...] | None:
    """By text; `None` where a text lacks, was read in other windows, or has draws that another text lacks."""
    parts, seeds = [], set()
    for metric, found, theirs in zip(metrics, results, reference, strict=True):
        if found is None or found.draws is None or theirs.draws is None:
            return None
        if (
            found.draws.items != theirs.draws.items
            or len(_digests(recipe, found, metric) | _digests(floating, theirs, metric)) > 1
        ):
            return None
        seeds.add(
            tuple(
                sorted(str(r["labels"]["seed"]) for r in recipe.records if r["fingerprint"] in found.records)
            )
        )
        parts.append(found.draws.values - theirs.draws.values.mean(0))
    return tuple(parts) if len(seeds) == 1 else None


def _digests(recipe: Recipe, result: Result, metric: str) -> set[str]:
    """Of the text that was read: embedded ones change with Python, under the same name."""
    mine = [r for r in recipe.records if r["fingerprint"] in result.records]
    return {str(r.get("data", {}).get(f"eval/{_text(metric)}", {}).get("sha256")) for r in mine}
