"""Two recipes side by side: metrics, costs, settings, answers, windows and blocks, as tables."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qbench.report.apart import blocks_table, settings_table
from qbench.report.item_by_item import answers_table, changed_documents, windows_table
from qbench.report.marked import Made, write
from qbench.report.metrics import is_cost, shown_effect
from qbench.report.page.content import Cell, Mark, PageTable
from qbench.report.pairs import UNSURE, Measured, Pair, figures, measured, p_text
from qbench.report.power import least
from qbench.report.sides import Side
from qbench.report.significance import SURE
from qbench.track.source import Source

_POWER = 0.8
_ROWS = 24  # of a table in the terminal; files have all
_LISTED = 6  # metrics that a note names
_A, _B, _VERDICT = "A: ", "B: ", "B is"


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two recipes, and the tables that tell them apart.

    Attributes:
        tables: By what stands behind the name of their files; the metrics have nothing there. Without those that would be
            empty, except the metrics'.
    """

    found: Measured
    tables: dict[str, Made]

    @property
    def name(self) -> str:
        """Of the files."""
        return _name(self.found.a, self.found.b)


def compare(a: Side, b: Side, source: Source) -> Comparison:
    """Compare B with A in all that their records hold.

    Raises:
        ValueError: If a job is on both sides.
    """
    found = measured(a, b, source)
    title = f"{a.word} (A) and {b.word} (B)"
    tables = {
        "": _metrics(found, title),
        "costs": _costs(found, title),
        "settings": settings_table(a, b, title),
        "tasks": answers_table(found, title),
        "windows": windows_table(found, title),
        "blocks": blocks_table(a, b, title),
    }
    return Comparison(
        found,
        {
            key: replace(made, table=replace(made.table, anchor=f"{_name(a, b)}-{key or 'metrics'}"))
            for key, made in tables.items()
            if made.table.rows or not key
        },
    )


def _name(a: Side, b: Side) -> str:
    return "-".join(["compare", *(re.sub(r"[^A-Za-z0-9_.]+", "-", s.word).strip("-") for s in (a, b))])


def _metrics(found: Measured, title: str) -> Made:
    pairs = [p for p in found.pairs if not is_cost(p.metric)]
    rows = []
    for pair in pairs:
        difference = pair.difference
        marks: tuple[Mark, Mark] = ("", "")
        if pair.verdict in ("better", "worse"):
            marks = ("worse", "best") if pair.verdict == "better" else ("best", "worse")
        rows.append((
            Cell(pair.metric), _value(pair, "a", marks[0]), _value(pair, "b", marks[1]), Cell(pair.effect),
            Cell(pair.interval), Cell(p_text(pair.p), None if np.isnan(pair.p) else pair.p),
            Cell(str(difference.n) if difference else ""), Cell(pair.verdict),
        ))  # fmt: skip
    columns = ("metric", "A", "B", "change", "95 %", "p", "n", _VERDICT)
    notes = (f"{_A}{found.a.title}.", f"{_B}{found.b.title}.", *_notes(found, pairs))
    table = PageTable(f"{title}: metrics", columns, tuple(rows), 1, notes, anchor="compare-metrics")
    return Made(table, _numbers(pairs))


def _notes(found: Measured, pairs: list[Pair]) -> Iterator[str]:
    tests = {p.metric: p.difference for p in pairs if p.difference is not None}
    if tests:
        over = " and over draws" if any("draws" in d.test for d in tests.values()) else ""
        yield (
            f"Change: B against A on the same items (n: windows or documents). 95 %: its interval over items alone. "
            f"p: paired over items{over}, corrected for {len(tests)} metrics (Holm); a difference is sure below {SURE}."
        )
    sizes = [
        f"{shown_effect(p.metric, size).lstrip('+')} in {p.metric}"
        for p in pairs
        if p.verdict == UNSURE
        and p.difference
        and np.isfinite(size := least(p.difference, SURE / len(tests)))
    ]
    if sizes:
        yield (
            f"Where no difference is sure, the least that the items would show {_POWER:.0%} of the time: {_listed(sizes)}."
        )
    if found.unlike:
        ways = [f"{metric} ({how})" for metric, how in found.unlike.items()]
        yield f"Not compared, since the two were not measured alike: {_listed(ways)}."
    for letter, names in zip("AB", found.alone, strict=True):
        if names:
            yield f"Only of {letter}: {_listed(names)}."
    for letter, side in (("A", found.a), ("B", found.b)):
        if side.failed:
            reasons = [f"{r['fingerprint']} ({r['reason']})" for r in side.failed]
            yield f"Draws of {letter} that failed and are not counted: {_listed(reasons)}."


def _costs(found: Measured, title: str) -> Made:
    pairs = [p for p in found.pairs if is_cost(p.metric)]
    columns = ("cost", "A", "B", "change", _VERDICT)
    rows = tuple(
        (Cell(p.metric), _value(p, "a"), _value(p, "b"), Cell(p.effect), Cell(p.verdict)) for p in pairs
    )
    alone = min(len(found.a.records), len(found.b.records)) == 1
    notes = [
        "Time and memory vary from run to run, and a side that is one job does not show by how much."
        if alone
        else f"{UNSURE[0].upper()}{UNSURE[1:]}: what jobs of one recipe differ by explains it (Welch, p ≥ {SURE})."
    ]
    devices = [", ".join(sorted({str(r.get("device")) for r in s.records})) for s in (found.a, found.b)]
    if devices[0] != devices[1]:
        notes.append(f"A ran on {devices[0]}, B on {devices[1]}: time and memory are not of one machine.")
    table = PageTable(f"{title}: costs", columns, rows, 1, tuple(notes), anchor="compare-costs")
    return Made(table, _numbers(pairs))


def _value(pair: Pair, side: str, mark: Mark = "") -> Cell:
    found = pair.a if side == "a" else pair.b
    return Cell(figures(found.value), found.value, mark, found.records)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _numbers(pairs: Sequence[Pair]) -> pd.DataFrame:
    rows = []
    for pair in pairs:
        d = pair.difference
        rows.append({
            "metric": pair.metric, "a": pair.a.value, "a_stderr": pair.a.stderr, "b": pair.b.value,
            "b_stderr": pair.b.stderr, "effect": d.effect if d else None, "low": d.low if d else None,
            "high": d.high if d else None, "p": d.p if d else pair.p, "p_corrected": pair.p if d else None,
            "n": d.n if d else None, "sd": d.sd if d else None, "test": d.test if d else None,
            "verdict": pair.verdict, "records_a": " ".join(pair.a.records), "records_b": " ".join(pair.b.records),
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    return frame.astype({"n": "Int64"}) if rows else frame


def save(comparison: Comparison, folder: Path, documents: bool = False) -> list[Path]:
    """Write every table as CSV, Markdown, LaTeX and HTML; with `documents`, those whose answers changed, as CSV."""
    paths = []
    for key, made in comparison.tables.items():
        paths += write(made, folder, "-".join(filter(None, (comparison.name, key))))
    if documents:
        paths.append(folder / f"{comparison.name}-flips.csv")
        changed_documents(comparison.found).to_csv(paths[-1], index=False, float_format="%g")
    return paths


def show(comparison: Comparison, console: Console) -> None:
    """Print the tables, text folded into the terminal's width; what only repeats another row is left to the files."""
    a, b = comparison.found.a, comparison.found.b
    console.print(Text(f"A  {a.title}\nB  {b.title}\n"))
    for made in comparison.tables.values():
        table = made.table
        rows = [row for row in table.rows if not row[-1].text.startswith("as ppl/")]
        grid = _grid(table, rows[:_ROWS], False)
        unbounded = console.options.update(max_width=1000)
        if console.measure(grid, options=unbounded).minimum > console.width:
            grid = _grid(table, rows[:_ROWS], True)
        # A line that wraps is ugly, a number cut short is wrong.
        width = max(console.width, console.measure(grid, options=unbounded).minimum)
        Console(file=console.file, width=width, force_terminal=console.is_terminal).print(grid)
        if len(rows) > _ROWS:
            console.print(f"and {len(rows) - _ROWS} more rows, in the files", highlight=False)
        for note in table.notes:
            if not note.startswith((_A, _B)):  # they stand at the top
                console.print(Text(note))
        console.print()


def _grid(table: PageTable, rows: Sequence[tuple[Cell, ...]], narrow: bool) -> Table:
    """A table for the terminal; if `narrow`, protocols below the names of their metrics."""
    grid = Table(
        title=Text(table.title.rpartition(": ")[2].capitalize()), title_justify="left", title_style="bold",
        box=None, padding=(0, 1, 0, 0), header_style="bold",
    )  # fmt: skip
    for i, column in enumerate(table.columns):
        folds = column == _VERDICT or "setting" in table.columns
        grid.add_column(
            Text(re.sub(r"(?<=both) | (?=to )", "\n", column)),
            justify="left" if folds or i < table.n_labels else "right",
            no_wrap=not folds, overflow="fold", vertical="top",
        )  # fmt: skip
    for row in rows:
        texts = [cell.text.replace(" [", "\n[") if narrow else cell.text for cell in row]
        bold = ["bold" if cell.mark == "best" else "" for cell in row]
        grid.add_row(*(Text(text, style) for text, style in zip(texts, bold, strict=True)))
    return grid
