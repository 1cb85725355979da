"""Everything that a report page shows, from records: takeaways, tables, figures, and an entry for each record."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qbench.report.drawing import Drawn, figures
from qbench.report.figures.style import inline_svg
from qbench.report.marked import Made
from qbench.report.page.content import Page, PageFigure, RecordEntry, Section
from qbench.report.spec import FigureSpec, TableSpec
from qbench.report.study import tables
from qbench.report.takeaways.answer import page_takeaway
from qbench.report.takeaways.questions import takeaways
from qbench.report.takeaways.writing import TITLES, by_kind
from qbench.track.records import Record
from qbench.track.source import Source

_QUALITY = (
    "ppl/*",
    "acc/*",
    "kl/*",
    "agreement/*",
    "flips/*",
    "pass@1/*",
    "judge/*",
    "drop/*",
    "decode_ppl/*",
)
_NAMED = 12  # models, schemes, ... that the head of the page lists
_ABOUT = {
    "claim": "Papers' claims in our words, held against these records: what is so here need not be so elsewhere."
}
_COSTS = (
    "bits_per_weight", "model_mb", "calib_time_s", "eval_time_s", "peak_mem_calib_mb", "decode_tokens_per_s@*",
    "prefill_tokens_per_s@*",
)  # fmt: skip


@dataclass(frozen=True)
class Chapter:
    """What a study shows.

    Attributes:
        command: What fills it with records.
    """

    name: str
    title: str
    source: str = ""
    tables: Mapping[str, TableSpec] = field(default_factory=dict)
    figures: Mapping[str, FigureSpec] = field(default_factory=dict)
    algorithms: Sequence[str] = ()
    command: str = ""


# What there is to show of any records.
OVERVIEW = Chapter(
    "overview",
    "All results",
    tables={
        "quality": TableSpec("Quality", rows=("model", "scheme", "algo", "calib"), metrics=_QUALITY),
        "cost": TableSpec("Size and cost", rows=("model", "scheme", "algo", "calib"), metrics=_COSTS),
        "wins": TableSpec(
            "Which algorithm wins", kind="wins", rows=("model", "scheme", "algo", "calib"), metrics=("ppl/*",)
        ),
        "variance": TableSpec("What makes results differ", kind="variance"),
        "agreement": TableSpec("Do metrics agree?", kind="spearman"),
    },
    figures={
        "front": FigureSpec("Perplexity against stored bytes", "pareto", metrics=("ppl/*",)),
        "front-cost": FigureSpec(
            "Perplexity against calibration", "pareto", x="calib_time_s", metrics=("ppl/*",)
        ),
        "front-speed": FigureSpec(
            "Perplexity against decoding", "pareto", x="decode_ms@h100", metrics=("ppl/*",)
        ),
        "front-measured": FigureSpec(
            "Perplexity against measured decoding", "pareto", x="decode_ms@measured", metrics=("ppl/*",)
        ),
        "curves": FigureSpec("Perplexity by bits", "curves", metrics=("ppl/*",)),
        "calibration": FigureSpec("Calibration sets by evaluation texts", "matrix"),
        "retention": FigureSpec("What is kept of accuracy", "radar", metrics=("acc/*",)),
        "wins": FigureSpec("Which algorithm wins", "wins", metrics=("ppl/*",)),
    },
)


def page(
    chapters: Sequence[Chapter],
    records: Sequence[Record],
    source: Source,
    *,
    folder: Path,
    command: str,
    link: Callable[[str], str | None],
) -> Page:
    """The page of these chapters.

    Args:
        folder: Where the page will lie; links to records are relative to it.
        command: What makes the page again.
        link: Where a browser shows the MLflow run of a fingerprint.
    """
    sections = [
        Section(TITLES[kind], _ABOUT.get(kind, ""), takeaways=tuple(map(page_takeaway, answers)))
        for kind, answers in by_kind(takeaways(records, source))
    ]
    sections += [
        section
        for chapter in chapters
        if (section := _section(chapter, records, source)).tables or section.figures
    ]
    labels = [record["labels"] for record in records]
    done = sum(record["status"] == "done" for record in records)
    summary = (
        ("jobs", f"{done} done, {len(records) - done} failed"),
        *(
            (f"{name}s", _listed([str(one[key]) for one in labels if one[key] is not None]))
            for name, key in (
                ("model", "model"), ("algorithm", "algo"), ("scheme", "scheme"), ("calibration set", "calib"),
            )
        ),
        ("records", source.where),
    )  # fmt: skip
    entries = tuple(_entry(record, source, folder, link) for record in records)
    return Page(
        f"qbench report: {_listed([one['model'] for one in labels])}",
        "; ".join(
            ["Which quantization recipe, and how sure", *(c.title for c in chapters if c is not OVERVIEW)]
        ),
        tuple((name, text) for name, text in summary if text),
        tuple(s for s in sections if s.takeaways or s.tables or s.figures),
        entries,
        command,
    )


def _listed(names: Sequence[str]) -> str:
    """The first of them, and how many there are beside."""
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - _NAMED} more" if len(unique) > _NAMED else ""
    return ", ".join(unique[:_NAMED]) + more


def _section(chapter: Chapter, records: Sequence[Record], source: Source) -> Section:
    made, no_tables = tables(chapter.tables, records, source, chapter.algorithms)
    drawn, no_figures = figures(chapter.figures, records, source, chapter.algorithms)
    lacking = (
        [] if chapter is OVERVIEW else [f"{name}: {why}" for name, why in (no_tables | no_figures).items()]
    )
    intro = " ".join(
        part
        for part in (
            f"{chapter.source}." if chapter.source else "",
            f"Filled by {chapter.command}." if chapter.command else "",
            f"Not made: {'; '.join(lacking)}." if lacking else "",
        )
        if part
    )
    return Section(
        chapter.title,
        intro,
        tuple(
            replace(one.table, anchor=_anchor("table", chapter.name, name))
            for name, one in made.items()
            if _is_shown(name, one)
        ),
        tuple(_figure(chapter, name, one) for name, one in drawn.items()),
    )


def _is_shown(name: str, made: Made) -> bool:
    """A published table of which nothing was run is for the ledger."""
    return not name.endswith("-published") or bool(made.numbers["ours"].notna().any())


def _figure(chapter: Chapter, name: str, drawn: Drawn) -> PageFigure:
    anchor = _anchor("figure", chapter.name, name)
    return PageFigure(drawn.title, inline_svg(drawn.figure, drawn.caption, anchor), drawn.caption, anchor)


def _anchor(*parts: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(parts))


def _entry(record: Record, source: Source, folder: Path, link: Callable[[str], str | None]) -> RecordEntry:
    labels, environment = record["labels"], record["environment"]
    fingerprint = record["fingerprint"]
    seed = f"seed {labels['seed']}" if labels["seed"] is not None else ""
    named = (labels["model"], labels["algo"], labels["scheme"], labels["calib"], seed)
    facts = {
        "metrics": ", ".join(
            f"{k} {v:.5g}" for k, v in record["metrics"].items() if not k.endswith("_stderr")
        ),
        "device": str(record["device"]),
        "command": environment["command"],
        "commit": str(environment["git_commit"]),
        "versions": ", ".join(f"{k} {v}" for k, v in environment["versions"].items()),
        "started": record["started"],
    }
    if record["status"] == "failed":
        facts = {"reason": str(record["reason"])} | facts
    return RecordEntry(
        fingerprint=fingerprint,
        title=" ".join(str(part) for part in named if part),
        href=Path(os.path.relpath(source.folder(fingerprint) / "record.json", folder)).as_posix(),
        mlflow=link(fingerprint),
        status=record["status"],
        facts={key: value for key, value in facts.items() if value},
    )
