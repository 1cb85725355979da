"""What stands on a report page: plain text, numbers to sort by, and the records behind them.

Nothing here is markup, except a figure's drawing; the page escapes every text and adds the signs that marks stand for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Mark = Literal["", "best", "tie", "worse", "failed"]
Verdict = Literal["supported", "contradicted", "undecided", "answered"]


@dataclass(frozen=True)
class Cell:
    """A value in a table.

    Attributes:
        text: As it is read, without a sign for its mark.
        sort: What a column is sorted by. Numbers come before text, and cells without either last. Where it is `None`, the
            number with which the text begins, if any; in a column of text, the text.
        mark: How it compares with the best of what it was compared with; `worse` means surely worse.
        records: Fingerprints of the records behind it, each of which has an entry on the page.
    """

    text: str
    sort: float | str | None = None
    mark: Mark = ""
    records: tuple[str, ...] = ()


@dataclass(frozen=True)
class PageTable:
    """A table.

    Attributes:
        n_labels: How many of the first columns say what a row is; these stay in view when the table is scrolled.
        notes: A paragraph each, below the table.
        anchor: Its place in the page's address, without `#`; of letters, digits, `-`, `_` and `.`.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    n_labels: int
    notes: tuple[str, ...] = ()
    anchor: str = field(kw_only=True)

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows, 1):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {number} of table {self.title!r} has {len(row)} cells, {len(self.columns)} are needed"
                )


@dataclass(frozen=True)
class PageFigure:
    """A figure.

    Attributes:
        svg: Markup of our own making, put on the page as it is; its ids are made unique there.
        caption: Below the figure, and what it says to those who cannot see it.
        anchor: As of a table.
    """

    title: str
    svg: str
    caption: str
    anchor: str


@dataclass(frozen=True)
class PageTakeaway:
    """An answer from the data.

    Attributes:
        evidence: Fingerprints, each of which has an entry on the page.
        effect: Its size, with the unit.
        confidence: How sure it is: a test with its p-value, or an interval.
        claim: What a paper says, with which the sentence is compared.
    """

    question: str
    verdict: Verdict
    sentence: str
    evidence: tuple[str, ...]
    effect: str
    confidence: str
    claim: str = ""


@dataclass(frozen=True)
class RecordEntry:
    """A record, as the page lists it.

    Attributes:
        href: Path of `record.json`, relative to the page's folder, not quoted.
        mlflow: Address of its MLflow run.
        status: `done` or `failed`.
        facts: What folds out below it; that named `reason` is also shown wherever a failed record is.
    """

    fingerprint: str
    title: str
    href: str
    mlflow: str | None
    status: str
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Section:
    """A part of the page: takeaways first, then tables, then figures."""

    title: str
    intro: str
    tables: tuple[PageTable, ...] = ()
    figures: tuple[PageFigure, ...] = ()
    takeaways: tuple[PageTakeaway, ...] = ()


@dataclass(frozen=True)
class Page:
    """All of it.

    Attributes:
        summary: Facts about the whole (jobs, models, protocol), as name and value.
        command: What makes the page again.
    """

    title: str
    subtitle: str
    summary: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    records: tuple[RecordEntry, ...]
    command: str
