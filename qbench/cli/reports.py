"""The sub-commands that read records: tables, ledger, figures, takeaways, report, compare."""

import difflib
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbench.cli.compare import compare
from qbench.errors import UsageError
from qbench.sweep.composed import config_of

_VIEWS = ("against", "matrix", "by")


@dataclass(frozen=True)
class _Asked:
    """What follows a sub-command.

    Attributes:
        words: What has no `=`: studies, fingerprints.
        results: Where files are written, and where records are unless `from=` says otherwise.
        source: Of records.
        tracker: The config's section on MLflow.
    """

    words: list[str]
    views: dict[str, str]
    results: Path
    source: Any
    tracker: dict[str, Any]

    def records(self) -> list[dict[str, Any]]:
        """All of them.

        Raises:
            UsageError: If there are none.
        """
        if not (records := list(self.source.all())):
            raise UsageError(
                f"no records under {self.source.where}; run e.g. `qbench -m algo=rtn,gptq wbits=4,3`"
            )
        return records


def _asked(arguments: list[str], views: tuple[str, ...] = ()) -> _Asked:
    words = [a for a in arguments if "=" not in a]
    keys = dict(a.split("=", 1) for a in arguments if a.partition("=")[0] in (*views, "from"))
    rest = [a for a in arguments if a not in words and a.partition("=")[0] not in (*views, "from")]
    if options := [word for word in words if word.startswith("-")]:
        raise UsageError(f"there is no option {options[0]} here; see `qbench <command> --help`")
    for argument in rest:
        if (key := argument.lstrip("+~").partition("=")[0]).partition(".")[0] not in ("results", "tracker"):
            known = ["results", "from", *views]
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(
                f"{argument}: {hint}records are read, not run; there are {', '.join(f'{k}=' for k in known)}"
            )
    config = config_of(rest)
    from qbench.track.source import source_of

    uri = keys.pop("from", None)
    results = Path(config["results"])
    if uri == "mlflow":
        uri = config["tracker"]["uri"]
    try:
        source = source_of(results, uri, config["tracker"].get("experiment") or "qbench")
    except ValueError as error:
        raise UsageError(str(error)) from error
    return _Asked(words, keys, results, source, config["tracker"])


def console() -> Any:
    """The terminal, or wide lines where there is none."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=200)


def tables(arguments: list[str]) -> int:
    """`qbench tables [<study> …] [results=…] [from=<tracking uri>] [against=<algo> | matrix=calib | by=part]`

    Without a study: all records, paired differences, calibration sets by evaluation texts, or metrics by parts of their
    tasks. With one (`llm_qbench`, `llm_qbench/calibration`, …): the tables of that paper, best and ties marked, beside the
    published numbers. Shown, and written as CSV, Markdown, LaTeX (and HTML).
    """
    asked = _asked(arguments, _VIEWS)
    if len(asked.views) + bool(asked.words) > 1:
        raise UsageError(f"one of a study, {', '.join(f'{view}=' for view in _VIEWS)} at a time")
    out = console()
    folder = asked.results / "tables"
    if asked.words:
        return _study_tables(asked, folder, out)
    if asked.views:
        paths = _view(asked, *next(iter(asked.views.items())), folder, out)
    else:
        from qbench.report.frame import tidy
        from qbench.report.tables import show, write

        frame = tidy(asked.records())
        show(frame, out)
        paths = write(frame, folder)
    out.print(f"\n{len(paths)} files in {folder} (CSV, Markdown, LaTeX)", highlight=False)
    return 0


def _study_tables(asked: _Asked, folder: Path, out: Any) -> int:
    """The tables of each study; 3 if none could be made."""
    from qbench.report.marked import show, write
    from qbench.report.study import tables as make
    from qbench.sweep.study import studies

    paths: list[Path] = []
    records = asked.records()
    for study in (study for word in asked.words for study in studies(word)):
        made, lacking = make(study.tables, records, asked.source, study.algorithms)
        if made:
            _say(out, f"{study.name}: {study.title}\n")
        for name, one in made.items():
            if not name.endswith("-published") or one.numbers["ours"].notna().any():
                show(one.table, out)
            paths += write(one, folder / study.name, name, study.name)
        for name, reason in lacking.items():
            _say(out, f"{study.name}: {name} not made: {reason}; run `qbench -m +sweep={study.name}`")
    if not paths:
        return 3
    out.print(f"\n{len(paths)} files in {folder} (CSV, Markdown, LaTeX, HTML)", highlight=False)
    return 0


def _view(asked: _Asked, view: str, value: str, folder: Path, out: Any) -> list[Path]:
    """One of the tables that are made of samples, shown and written."""
    from qbench.report import matrix, paired, parts

    records, samples = asked.records(), asked.source.samples
    try:
        if view == "against":
            frame = paired.compare(records, samples, value)
            paired.show(frame, value, out)
            return paired.write(frame, value, folder)
        if (view, value) == ("matrix", "calib"):
            frame = matrix.compare(matrix.losses(records, samples))
            matrix.show(frame, out)
            return matrix.write(frame, folder)
        if (view, value) == ("by", "part"):
            frame = parts.by_part(records, samples)
            parts.show(frame, out)
            return parts.write(frame, folder)
    except ValueError as error:
        raise UsageError(str(error)) from error
    raise UsageError(f"{view}={value} is no table; there are against=<algo>, matrix=calib and by=part")


def figures(arguments: list[str]) -> int:
    """`qbench figures [<study> …] [results=…] [from=<tracking uri>]`: fronts, curves, heat maps as SVG, PDF, PNG.

    Without a study: those that fit any records. With one: the figures of that paper.
    """
    asked, out = _asked(arguments), console()
    from qbench.report.drawing import figures as draw
    from qbench.report.figures.style import save

    records, paths = asked.records(), list[Path]()
    for chapter in _chapters(asked.words):
        if not chapter.figures:
            _say(out, f"{chapter.name} states no figures; `qbench figures` draws those that fit any records")
        drawn, lacking = draw(chapter.figures, records, asked.source, chapter.algorithms)
        for name, one in drawn.items():
            paths += save(one.figure, asked.results / "figures" / chapter.name / name)
            _say(out, f"{paths[-1]}  {one.title}. {one.caption}")
        for name, reason in lacking.items():
            _say(out, f"{chapter.name}: {name} not drawn: {reason}")
    return 0 if paths else 3


def ledger(arguments: list[str]) -> int:
    """`qbench ledger [results=…] [from=<tracking uri>]`: every published number, whether we have the run, how far it is off.

    Also flags published values that cannot be right. Shown by source; all 8,582 are in the files.
    """
    asked, out = _asked(arguments), console()
    if asked.words:
        raise UsageError(f"`qbench ledger` takes key=value; got {asked.words[0]}")
    from qbench.report.ledger import ledger as make
    from qbench.report.ledger import show, write

    found = make(asked.source.all())
    show(found, out)
    for path in write(found, asked.results / "tables"):
        _say(out, str(path))
    return 0


def takeaways(arguments: list[str]) -> int:
    """`qbench takeaways [results=…] [from=<tracking uri>]`: what the records say, in sentences with their evidence.

    Which calibration set, which algorithm, which scheme for a budget, which combination; and papers' claims: supported,
    contradicted, or undecided here.
    """
    asked, out = _asked(arguments), console()
    if asked.words:
        raise UsageError(f"`qbench takeaways` takes key=value; got {asked.words[0]}")
    from qbench.report.takeaways.questions import takeaways as answer
    from qbench.report.takeaways.writing import show, write

    found = answer(asked.records(), asked.source)
    show(found, out)
    for path in write(found, asked.results / "tables"):
        _say(out, str(path))
    return 0


def report(arguments: list[str]) -> int:
    """`qbench report [<study> …] [results=…] [from=<tracking uri>] [to=<file>]`: one HTML file with everything.

    Takeaways, tables that sort and filter, figures, and the record behind every number; it needs no network. Without a
    study: what fits any records; with one or several: theirs too.
    """
    asked, out = _asked(arguments, ("to",)), console()
    from qbench.report.assembly import page
    from qbench.report.page.render import write

    target = Path(asked.views.get("to", asked.results / "report.html"))
    command = shlex.join(["qbench", "report", *arguments])
    chapters = [*_chapters([]), *(_chapters(asked.words) if asked.words else [])]
    records = asked.records()
    content = page(
        chapters, records, asked.source, folder=target.resolve().parent, command=command, link=_links(asked)
    )
    write(content, target)
    _say(out, f"{target}  {len(records)} records, {target.stat().st_size / 1e6:.1f} MB")
    return 0


def _links(asked: _Asked) -> Callable[[str], str | None]:
    """Where a browser shows the MLflow run of a fingerprint."""
    from qbench.track.mirror import Marks
    from qbench.track.records import RecordStore
    from qbench.track.source import link_to_copy

    uri = asked.tracker.get("uri")
    if not isinstance(asked.source, RecordStore) or not uri:
        return lambda fingerprint: asked.source.link(fingerprint)
    marks = Marks(asked.source, uri, asked.tracker["experiment"])
    return lambda fingerprint: link_to_copy(marks, fingerprint)


def studies(arguments: list[str]) -> int:
    """`qbench studies`: the studies that `+sweep=` and `qbench tables` know, with their papers and tables."""
    if arguments:
        raise UsageError(f"`qbench studies` takes nothing; got {arguments[0]}")
    from rich.table import Table

    from qbench.sweep.study import names
    from qbench.sweep.study import studies as read

    out, grid = console(), Table(box=None, header_style="bold", pad_edge=False)
    for column in ("study", "of", "what", "tables"):
        grid.add_column(column, overflow="fold")
    for name in names():
        for study in read(name):
            if study.name == name:
                grid.add_row(name, study.source, study.title, ", ".join(study.tables))
    out.print(grid)
    _say(out, "\nqbench -m +sweep=<study> plan=true, then without plan=true, then qbench tables <study>")
    return 0


def _chapters(words: list[str]) -> list[Any]:
    """What studies show; without any, what fits all records."""
    from qbench.report.assembly import OVERVIEW, Chapter
    from qbench.sweep.study import studies

    if not words:
        return [OVERVIEW]
    return [
        Chapter(
            study.name, study.title, study.source, study.tables, study.figures, study.algorithms,
            f"qbench -m +sweep={study.name}",
        )
        for word in words
        for study in studies(word)
    ]  # fmt: skip


def _say(out: Any, line: str) -> None:
    out.print(line, markup=False, highlight=False, soft_wrap=True)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "tables": tables,
    "figures": figures,
    "ledger": ledger,
    "takeaways": takeaways,
    "report": report,
    "studies": studies,
    "compare": compare,
}
