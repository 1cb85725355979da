"""What the words of published tables are in ours: the schema of numbers.csv, the rules of names.toml.

Both files are in `qbench/published`. A number that nothing here expresses keeps the reason in place of a name.
"""

import csv
import re
import tomllib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import pandas as pd
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

FOLDER = Path(str(files("qbench") / "published"))
UNSTATED = "calibration set not stated"

Word = Annotated[str, Field(min_length=1)]
Patterns = Annotated[tuple[Word, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else tuple(v))]


def _a_number(text: str) -> str:
    float(text)
    return text


class PublishedNumber(BaseModel):
    """A line of numbers.csv: words as published, and the value as printed, of which `nan` and `inf` are possible."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: Word
    table: Word
    model: Word
    method: Word
    scheme: Word
    calib: str
    dataset: Word
    metric: Word
    value: Annotated[str, AfterValidator(_a_number)]


COLUMNS = tuple(PublishedNumber.model_fields)


class Rule(BaseModel):
    """A rule of names.toml: patterns of published words, and what they are here, or why they are nothing here."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: Patterns = ("*",)
    table: Patterns = ("*",)
    model: Patterns = ("*",)
    method: Patterns = ("*",)
    scheme: Patterns = ("*",)
    calib: Patterns = ("*",)
    dataset: Patterns = ("*",)
    metric: Patterns = ("*",)
    ours: str | None = None
    why: str | None = None
    caveat: str | None = None
    samples: str | None = None
    factor: float = 1.0

    @model_validator(mode="after")
    def _says_one(self) -> "Rule":
        if (self.ours is None) == (self.why is None):
            raise ValueError("a rule needs either ours, or why there is none")
        return self

    @property
    def looks_at(self) -> dict[str, tuple[str, ...]]:
        """The patterns that it has, by column."""
        return {c: getattr(self, c) for c in COLUMNS if c in self.model_fields_set}


class Names(BaseModel):
    """names.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    data_free: frozenset[str]
    sources: dict[str, str]
    sizes: dict[str, int]
    rules: dict[str, tuple[Rule, ...]]
    commands: dict[str, str]

    @model_validator(mode="after")
    def _is_looked_at(self) -> "Names":
        for what, rules in self.rules.items():
            for rule in rules:
                if beyond := set(rule.looks_at) - set(_LOOKS_AT[what]):
                    raise ValueError(
                        f"a rule of {what} looks at {beyond.pop()}; it may at {', '.join(_LOOKS_AT[what])}"
                    )
        return self


_LOOKS_AT = {
    "models": ("source", "table", "model"),
    "methods": ("source", "table", "method"),
    "schemes": ("source", "table", "model", "method", "scheme"),
    "calibs": ("source", "table", "method", "calib"),
    "metrics": ("source", "table", "dataset", "metric"),
}
_DECIDES = ("models", "methods", "schemes", "metrics")


def read(path: Path) -> pd.DataFrame:
    """Read published numbers: the nine columns, `value` both as printed (`printed`) and as a number.

    Raises:
        ValueError: If a line is not a published number, naming the line, the field and what was found.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, restkey="beyond the last column", strict=True)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{path}, line 1: columns are {reader.fieldnames}, needed are {', '.join(COLUMNS)}"
            )
        lines, rows = [], []
        for row in reader:
            rows.append(row)
            lines.append(reader.line_num)
    try:
        TypeAdapter(list[PublishedNumber]).validate_python(rows)
    except ValidationError as error:
        first = error.errors()[0]
        at, field = first["loc"][0], first["loc"][1]
        raise ValueError(
            f"{path}, line {lines[int(at)]}: {field} is {first['input']!r}: {first['msg']}; correct the line"
        ) from None
    frame = pd.DataFrame(rows, columns=list(COLUMNS), dtype=object)
    return frame.assign(printed=frame["value"], value=frame["value"].astype(float))


@cache
def names() -> Names:
    return Names.model_validate(tomllib.loads((FOLDER / "names.toml").read_text(encoding="utf-8")))


def translate(frame: pd.DataFrame, names: Names) -> pd.DataFrame:
    """Put ours beside published words; see `qbench.report.published.load`.

    Raises:
        ValueError: If a source has no short name.
    """
    if unknown := sorted(set(frame["source"]) - set(names.sources)):
        raise ValueError(f"source {unknown[0]!r} has no short name; add it to names.toml under [sources]")
    frame = frame.assign(source_name=frame["source"].map(names.sources))
    rule = {what: _rules(frame, what, names.rules[what]) for what in _LOOKS_AT}
    free = [r.ours in names.data_free for r in rule["methods"]]
    why = [_joined(rules) for rules in zip(*([r.why for r in rule[w]] for w in _DECIDES), strict=True)]
    unstated = [
        UNSTATED if c.ours is None and not f else None for c, f in zip(rule["calibs"], free, strict=True)
    ]
    caveats = [[r.caveat for r in rule[what]] for what in _DECIDES] + [unstated]
    ours = {
        "model_id": [r.ours for r in rule["models"]],
        "our_model": [r.ours.split("/")[-1] if r.ours else None for r in rule["models"]],
        "our_algo": [r.ours for r in rule["methods"]],
        "our_scheme": [r.ours for r in rule["schemes"]],
        "our_calib": [None if f else c.ours for c, f in zip(rule["calibs"], free, strict=True)],
        "our_samples": [None if f else c.samples for c, f in zip(rule["calibs"], free, strict=True)],
        "our_metric": [r.ours for r in rule["metrics"]],
        "why_not": why,
        "caveat": [_joined(said) for said in zip(*caveats, strict=True)],
    }
    found = frame.assign(
        number=_identify(frame),
        our_value=frame["value"] * [r.factor for r in rule["metrics"]],
        size=frame["dataset"].map(names.sizes).astype(float),
        # As objects, so that what is missing stays `None`.
        **{name: pd.Series(words, frame.index, dtype=object) for name, words in ours.items()},
    )
    return found[["number", "source_name", *[c for c in found if c not in ("number", "source_name")]]]


def _rules(frame: pd.DataFrame, what: str, rules: Sequence[Rule]) -> list[Rule]:
    """The rule of every row."""
    columns, known = _LOOKS_AT[what], dict[tuple[str, ...], Rule]()
    tests = [([(columns.index(c), p) for c, p in rule.looks_at.items()], rule) for rule in rules]
    words = list(zip(*(frame["source_name" if c == "source" else c] for c in columns), strict=True))
    for key in dict.fromkeys(words):
        none = Rule(why=f"names.toml has no rule of {what} for {key[-1]!r}")
        known[key] = next((r for test, r in tests if all(_fits(key[i], p) for i, p in test)), none)
    return [known[key] for key in words]


def _fits(word: str, patterns: Iterable[str]) -> bool:
    return any(word == pattern or fnmatchcase(word, pattern) for pattern in patterns)


def _joined(reasons: Iterable[str | None]) -> str | None:
    return "; ".join(dict.fromkeys(filter(None, reasons))) or None


def _identify(frame: pd.DataFrame) -> "pd.Series[str]":
    """`llm-qbench/impact-of-calibration-data/17`: source, table, place in the table."""
    table = frame["table"].map(lambda t: re.sub(r"[^a-z0-9]+", "-", t.lower()).strip("-"))
    place = frame.groupby(["source", "table"]).cumcount() + 1
    return frame["source_name"] + "/" + table + "/" + place.astype(str)
