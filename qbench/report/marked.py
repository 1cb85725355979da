"""Tables whose cells are marked: in the terminal, and as CSV, Markdown, LaTeX and HTML files."""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qbench.report.page.content import Cell, PageTable

BEST, TIE = "best", "≈"
# Signs that LaTeX reads otherwise, or that its usual fonts lack.
_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "≈": r"$\approx$", "≤": r"$\leq$", "≥": r"$\geq$",
    "×": r"$\times$", "−": "$-$", "→": r"$\to$", "∞": r"$\infty$", "ρ": r"$\rho$", "…": r"\ldots{}", "\n": " ",
}  # fmt: skip
_BOLD: dict[str, Callable[[str], str]] = {
    "csv": lambda text: f"{text} {BEST}",
    "md": lambda text: f"**{text}**",
    "tex": lambda text: f"\\textbf{{{text}}}",
    "html": lambda text: f"<b>{text}</b>",
}


def tex(text: str) -> str:
    """Plain text as LaTeX writes it; safe at the beginning of a row too."""
    escaped = "".join(_TEX.get(sign, sign) for sign in text)
    return f"{{{escaped[0]}}}{escaped[1:]}" if escaped.startswith(("[", "*")) else escaped


def _md(text: str) -> str:
    """Plain text as a cell of Markdown."""
    return "".join(f"\\{sign}" if sign in "\\|*<" else sign for sign in text).replace("\n", " ")


_ESCAPED: dict[str, Callable[[str], str]] = {"md": _md, "tex": tex, "html": html.escape}
_PAGE = (
    '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
    "<style>body{{font:14px/1.45 system-ui,sans-serif;margin:2rem}}table{{border-collapse:collapse}}"
    "th,td{{padding:.15rem .6rem;text-align:right}}th{{border-bottom:1px solid}}"
    "td:nth-child(-n+{labels}),th:nth-child(-n+{labels}){{text-align:left}}</style>\n"
    "<h1>{title}</h1>\n{table}\n{notes}\n</html>\n"
)


@dataclass(frozen=True)
class Made:
    """A table, and the numbers behind its text.

    Attributes:
        numbers: A row for each number: labels, metric, value, error, comparison, fingerprints.
    """

    table: PageTable
    numbers: pd.DataFrame = field(default_factory=pd.DataFrame)


def of_frame(frame: pd.DataFrame, title: str, anchor: str, n_labels: int, notes: Sequence[str] = ()) -> Made:
    """A table of text without marks."""
    rows = tuple(tuple(Cell(str(value)) for value in row) for row in frame.itertuples(index=False))
    columns = tuple(str(c) for c in frame.columns)
    return Made(PageTable(title, columns, rows, n_labels, tuple(notes), anchor=anchor), frame)


def plain(cell: Cell) -> str:
    """A cell with its mark spelled out."""
    return f"{cell.text} {TIE}" if cell.mark == "tie" else cell.text


def show(table: PageTable, console: Console) -> None:
    """Print a table, as wide as it must be, with its notes; the best in bold and named."""
    grid = Table(
        title=Text(table.title), title_justify="left", title_style="bold", box=None, header_style="bold"
    )
    for i, column in enumerate(table.columns):
        grid.add_column(
            Text(column.replace("/", "\n", 1)), justify="left" if i < table.n_labels else "right",
            no_wrap=column != "setting", overflow="fold", vertical="top",
        )  # fmt: skip
    for row in table.rows:
        grid.add_row(*(_styled(cell) for cell in row))
    width = console.measure(grid, options=console.options.update(max_width=1000)).maximum
    # A line that wraps is ugly, a number cut short is wrong.
    wide = Console(file=console.file, width=max(width, console.width), force_terminal=console.is_terminal)
    wide.print(grid)
    for note in table.notes:
        console.print(Text(note), soft_wrap=True)
    console.print()


def _styled(cell: Cell) -> Text:
    if cell.mark == "best":
        return Text(f"{cell.text} {BEST}", style="bold")
    return Text(plain(cell))


def stem(text: str) -> str:
    """Any text as the name of a file, without folders."""
    return re.sub(r"[^\w.+-]+", "-", text)


def write(made: Made, folder: Path, name: str, study: str = "") -> list[Path]:
    """Write `<name>.csv`, `.md`, `.tex` (booktabs), `.html`, and `<name>-numbers.csv`.

    Args:
        study: Of which the table is; LaTeX's labels of two studies must differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = made.table
    written = {
        "csv": _frame(table, "csv").to_csv(index=False),
        "md": _markdown(table),
        "tex": _latex(table, study),
        "html": _page(table),
    }
    paths = []
    for suffix, text in written.items():
        paths.append(folder / f"{name}.{suffix}")
        paths[-1].write_text(text, encoding="utf-8")
    if not made.numbers.empty:
        paths.append(folder / f"{name}-numbers.csv")
        made.numbers.to_csv(paths[-1], index=False)
    return paths


def _markdown(table: PageTable) -> str:
    body = _frame(table, "md").to_markdown(index=False, disable_numparse=True)
    return "\n\n".join([f"## {_md(table.title)}", body, *map(_md, table.notes)]) + "\n"


def _latex(table: PageTable, study: str) -> str:
    """A floating table with its notes below it; needs booktabs."""
    text: str = _frame(table, "tex").to_latex(
        index=False,
        escape=False,
        column_format="l" * table.n_labels + "r" * (len(table.columns) - table.n_labels),
        caption=tex(table.title),
        label=f"tab:{stem('-'.join(filter(None, (study, table.anchor))))}",
    )
    notes = "".join(f"\\par\\footnotesize {tex(note)}\n" for note in table.notes)
    return text.replace("\\end{table}", f"{notes}\\end{{table}}")


def _page(table: PageTable) -> str:
    return _PAGE.format(
        title=html.escape(table.title),
        labels=table.n_labels,
        table=_frame(table, "html").to_html(index=False, escape=False, border=0),
        notes="\n".join(f"<p>{html.escape(note)}</p>" for note in table.notes),
    )


def _frame(table: PageTable, style: str) -> pd.DataFrame:
    escape = _ESCAPED.get(style, str)
    bold = _BOLD[style]

    def written(cell: Cell) -> str:
        text = escape(plain(cell))
        return bold(text) if cell.mark == "best" else text

    columns = [escape(column) for column in table.columns]
    return pd.DataFrame([[written(cell) for cell in row] for row in table.rows], columns=columns)
