"""Which recipe a word means: a fingerprint, or labels that one recipe alone has."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from typing import Any

from qbench.report.cells import Cells, Recipe
from qbench.track.records import Record, flatten
from qbench.track.source import Source

LABELS = ("model", "algo", "scheme", "calib")
_LISTED = 8
_FINGERPRINT = re.compile(r"[0-9a-f]{4,16}")
_NONE = ("", "none", "null")


@dataclass(frozen=True, eq=False)
class Side:
    """One of two recipes that are compared.

    Attributes:
        word: What it was asked for by; a fingerprint in full.
        recipe: Its draws, all of them done.
        failed: Its draws that failed.
    """

    word: str
    recipe: Recipe
    failed: tuple[Record, ...] = ()

    @property
    def records(self) -> list[Record]:
        return self.recipe.records

    @property
    def title(self) -> str:
        """Labels, seeds, and the fingerprint where there is one alone."""
        alone = self.records[0]["fingerprint"] if len(self.records) == 1 else f"{len(self.records)} jobs"
        return " ".join(filter(None, (*self.recipe.labels, _seeds(self.records), f"({alone})")))


def find(word: str, records: Sequence[Record], source: Source) -> Side:
    """The recipe that a word means.

    Args:
        word: The beginning of a fingerprint; or labels in any order with slashes between (`gptq/w3a16g128/seed0`), or
            `key=value` with commas between (`algo=gptq,calib.n_samples=16`), where a key is a label, or one of the config.

    Raises:
        ValueError: If no recipe, or several, or only failed jobs are meant.
    """
    begun = [r for r in records if r["fingerprint"].startswith(word)] if _FINGERPRINT.fullmatch(word) else []
    parts = [p for part in word.split(",") for p in ([part] if "=" in part else part.split("/")) if p]
    found = begun or [r for r in records if all(_fits(r, part) for part in parts)] if parts else []
    if not found:
        raise ValueError(f"{word!r} is no recipe: {_nearest(word, parts, records)}")
    done = [r for r in found if r["status"] == "done"]
    failed = tuple(r for r in found if r["status"] == "failed")
    if not done:
        one = failed[0]
        raise ValueError(
            f"{word!r} failed and has no numbers ({one['fingerprint']}: {one['reason']}); mend that, and run "
            "`qbench retry`"
        )
    if begun and len(found) > 1:
        lines = [f"{r['fingerprint']}  {_name(r)}" for r in found]
        raise ValueError(_several(word, "fingerprints begin so", "more of its digits", lines))
    cells = Cells.of(done, source, LABELS)
    if len(cells.recipes) > 1:
        raise ValueError(_several(word, "recipes", "one of these words", _candidates(word, cells)))
    return Side(done[0]["fingerprint"] if begun else word, cells.recipes[0], failed)


def _fits(record: Record, part: str) -> bool:
    key, equals, value = part.partition("=")
    labels = record["labels"]
    if not equals:
        return part in [str(labels[name]) for name in LABELS] or part == f"seed{labels['seed']}"
    found = _values(record, key)
    return value in found or (value in _NONE and found == {"None"}) or (value == "-" and not found)


def _values(record: Record, key: str) -> set[str]:
    """Those of a label; else of what is called so in the identity, in the config, or in the environment."""
    if key in record["labels"]:
        return {str(record["labels"][key])}
    for tree in (record["identity"], record["config"], record["environment"]):
        if found := {str(v) for k, v in flatten(tree).items() if key in (k, k.rpartition(".")[2])}:
            return found
    return set()


def _several(word: str, what: str, which: str, lines: list[str]) -> str:
    more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    told = "".join(f"\n  {line}" for line in [*lines[:_LISTED], *more])
    return f"{word!r} means {len(lines)} {what}, and one is needed; ask for it by {which}:{told}"


def _candidates(word: str, cells: Cells) -> list[str]:
    """The word with what tells each recipe apart, and its jobs."""
    columns = list(zip(*(recipe.labels for recipe in cells.recipes), strict=True))
    apart = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    words, jobs = [], []
    for recipe in cells.recipes:
        longer = word
        for i in apart:
            key, value = cells.names[i], recipe.labels[i]
            if key == "setting":
                longer += "," + value.replace(", ", ",")
            else:
                longer += f"/{value}" if value and "=" not in longer else f",{key}={value or 'none'}"
        words.append(longer)
        prints = [r["fingerprint"] for r in recipe.records]
        more = f" and {len(prints) - 1} more" if len(prints) > 1 else ""
        jobs.append("  ".join(filter(None, (prints[0] + more, _seeds(recipe.records)))))
    width = max(map(len, words))
    return [f"{longer:<{width}}  {about}" for longer, about in zip(words, jobs, strict=True)]


def _nearest(word: str, parts: Sequence[str], records: Sequence[Record]) -> str:
    """What is wrong with it, and what could have been meant."""
    for part in parts:
        if any(_fits(record, part) for record in records):
            continue
        key, equals, value = part.partition("=")
        if not equals:
            known = dict.fromkeys(str(r["labels"][k]) for k in LABELS for r in records if r["labels"][k])
            begun = "no fingerprint begins so, and " if part == word and _FINGERPRINT.fullmatch(word) else ""
            return f"{begun}no record has the label {part!r}; {_choices(part, list(known))}"
        if known := dict.fromkeys(v for r in records for v in sorted(_values(r, key))):
            return f"no record has {key}={value}; {_choices(value, list(known))}"
        return f"records have no {key!r}; {_choices(key, list(records[0]['labels']))}"
    names = dict.fromkeys(_name(r) for r in records)
    fitting = {_name(r): sum(_fits(r, part) for part in parts) for r in records}
    near = sorted(
        names, key=lambda n: (-fitting[n], -SequenceMatcher(None, word, n).ratio(), n)
    )  # most labels first
    return f"no record has all of these labels; nearest: {', '.join(near[:3])}"


def _choices(word: str, known: list[str]) -> str:
    if near := get_close_matches(word, known, 3, 0.5):
        return f"nearest: {', '.join(near)}"
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return f"there are {', '.join(known[:_LISTED])}{more}"


def _name(record: Record) -> str:
    return "/".join(str(record["labels"][key]) for key in LABELS if record["labels"][key])


def _seeds(records: Sequence[Record]) -> str:
    known: list[Any] = sorted({r["labels"]["seed"] for r in records if r["labels"]["seed"] is not None})
    return f"seed{'s' if len(known) > 1 else ''} {', '.join(map(str, known))}" if known else ""
