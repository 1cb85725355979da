"""Tables: in the terminal, and as CSV, Markdown and LaTeX files."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qbench.report.metrics import is_measured_rate

COSTS = {
    "calib_time_s": "calib s",
    "eval_time_s": "eval s",
    "peak_mem_calib_mb": "calib peak MB",
    "peak_mem_eval_mb": "eval peak MB",
    "peak_device_mem_calib_mb": "device peak MB",
}
_REASONS = 10  # failures that the terminal explains
_SHOWN = ("calib s",)  # in the terminal; files have all costs
_IN_FILES = ("bpb/", "right_to_wrong/", "wrong_to_right/")  # what the terminal has no room for


def quality_metrics(frame: pd.DataFrame) -> list[str]:
    """Perplexities, then accuracies, in order of appearance."""
    names = [str(name) for name in frame["metric"].dropna().unique()]
    return [n for kind in ("ppl/", "acc/") for n in names if n.startswith(kind)] + [
        n for n in names if "/" in n and not n.startswith(("ppl/", "acc/"))
    ]


def _ordered(frame: pd.DataFrame, algos: "pd.Series[str]") -> pd.DataFrame:
    """Floating point first, then from many bits to few; algorithms in the order in which `algos` has them."""
    order = {algo: i for i, algo in enumerate(algos.unique())}
    keys = frame.assign(
        _fp=frame["algo"] != "fp", _w=-frame["wbits"], _a=-frame["abits"], _kv=-frame["kvbits"],
        _algo=frame["algo"].map(order),
    )  # fmt: skip
    by = ["model", "_fp", "_w", "_a", "_kv", "scheme", "_algo", "setting"]
    return keys.sort_values(by, kind="stable").drop(columns=[c for c in by if c.startswith("_")])


def _index(frame: pd.DataFrame) -> list[str]:
    """Model, scheme and algorithm, and the setting where it tells rows apart."""
    return ["model", "scheme", "algo", *(["setting"] if frame["setting"].any() else [])]


def number(value: float, stderr: float | None = None) -> str:
    """Value ± standard error, to the digits that the error leaves meaningful."""
    if pd.isna(value):
        return ""
    if stderr is None or pd.isna(stderr):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    digits = 3 if stderr < 0.01 else 2 if stderr < 1 else 1
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"


def _cells(rows: pd.DataFrame) -> list[str]:
    return [number(value, stderr) for value, stderr in zip(rows["value"], rows["stderr"], strict=True)]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per job: what it was, its size, its metrics with standard errors, its cost, as text."""
    if frame.empty:
        return pd.DataFrame()
    jobs = _ordered(frame.drop_duplicates("fingerprint"), frame["algo"])
    # Sorting jobs and putting numbers in their places takes a second for 10,000 jobs, sorting rows and groups a minute.
    place = dict(zip(jobs["fingerprint"], range(len(jobs)), strict=True))
    numbers = frame[["metric", "value", "stderr"]].assign(at=frame["fingerprint"].map(place))
    numbers = numbers.dropna(subset="metric").sort_values("at", kind="stable")
    quality, of = quality_metrics(numbers), dict(tuple(numbers.groupby("metric", sort=False)))

    def column(metric: str) -> list[str]:
        found, rows = [""] * len(jobs), of.get(metric, numbers[:0])
        for i, cell in zip(rows["at"], _cells(rows), strict=True):
            found[i] = cell
        return found

    table = {key: jobs[key].tolist() for key in _index(frame)} | {"bits": column("bits_per_weight")}
    table |= {name: column(name) for name in quality}
    table |= {title: column(name) for name, title in COSTS.items() if name in of}
    table |= {name: column(name) for name in sorted(map(str, of)) if is_measured_rate(name)}
    for i, (status, reason) in enumerate(zip(jobs["status"], jobs["reason"], strict=True)):
        if status == "failed":
            table.setdefault(next(iter(quality), "result"), [""] * len(jobs))[i] = f"failed: {reason}"
    return pd.DataFrame(table).fillna("")


def by_metric(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Algorithms down, schemes across, as text; what has not been run is left empty, what failed says why."""
    index = [key for key in _index(frame) if key != "scheme"]
    chosen = _ordered(frame[(frame["metric"] == metric) | (frame["status"] == "failed")], frame["algo"])
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    rows = zip(*(chosen[c] for c in [*index, "scheme", "status", "reason"]), _cells(chosen), strict=True)
    for *key, scheme, status, reason, cell in rows:
        cells.setdefault(tuple(key), {})[scheme] = f"failed: {reason}" if status == "failed" else cell
    table = [dict(zip(index, key, strict=True)) | columns for key, columns in cells.items()]
    schemes = list(dict.fromkeys(chosen["scheme"]))
    return pd.DataFrame(table, columns=[*index, *schemes]).fillna("")


def write(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the summary and one table per metric, each as CSV, Markdown and LaTeX."""
    tables = {"summary": summary(frame)}
    return save(
        tables | {file_name(metric): by_metric(frame, metric) for metric in quality_metrics(frame)}, folder
    )


def save(tables: dict[str, pd.DataFrame], folder: Path) -> list[Path]:
    """Write tables by name, each as CSV, Markdown and LaTeX."""
    folder.mkdir(parents=True, exist_ok=True)
    writers: dict[str, Callable[[pd.DataFrame], str]] = {
        "csv": lambda t: t.to_csv(index=False),
        "md": lambda t: t.to_markdown(index=False, disable_numparse=True) + "\n",
        "tex": _booktabs,
    }
    paths = []
    for name, table in tables.items():
        for suffix, render in writers.items():
            path = folder / f"{name}.{suffix}"
            path.write_text(render(table), encoding="utf-8")
            paths.append(path)
    return paths


def file_name(metric: str) -> str:
    """`ppl/docs [512 x 32]` -> `ppl-docs-512x32`."""
    return "".join(c for c in metric.replace("/", "-").replace(" [", "-") if c not in " []")


def _booktabs(table: pd.DataFrame) -> str:
    """LaTeX as `DataFrame.to_latex` writes it, whose template takes 30 times as long: seconds for 10,000 rows."""
    head = [table.columns] if len(table.columns) else []
    lines = [
        r"\begin{tabular}{" + "l" * len(table.columns) + "}",
        r"\toprule",
        *map(_tex_row, head),
        r"\midrule",
    ]
    lines += map(_tex_row, table.itertuples(index=False, name=None))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _tex_row(cells: Iterable[Any]) -> str:
    return " & ".join(map(_tex, cells)) + r" \\"


def _tex(value: Any) -> str:
    text = str(value)
    for plain in "_%&#":
        text = text.replace(plain, f"\\{plain}")
    return text.replace("±", "$\\pm$")


def show(frame: pd.DataFrame, console: Console) -> None:
    """The summary, a table for each model, without the costs that are for files only; fits 80 columns; then failures."""
    table = summary(frame)
    hidden = [title for title in COSTS.values() if title not in _SHOWN]
    hidden += [str(c) for c in table if str(c).startswith(_IN_FILES) or is_measured_rate(str(c))]
    for model, part in table.groupby("model", sort=False) if not table.empty else ():
        print_table(part.drop(columns=["model", *(c for c in hidden if c in part)]), str(model), console)
    show_failures(frame, console)


def print_table(table: pd.DataFrame, title: str, console: Console) -> None:
    """A table under its title; wider than the terminal if it must be."""
    grid = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )
    for column in table.columns:
        is_label = column in ("model", "scheme", "algo", "setting", "unit", "recipe", "why not")
        grid.add_column(
            Text(str(column).replace("/", "\n", 1)),
            justify="left" if is_label else "right",
            vertical="top",
            overflow="fold",
            no_wrap=column != "setting",
        )
    for row in table.itertuples(index=False):
        cells = ["failed" if str(value).startswith("failed: ") else str(value) for value in row]
        grid.add_row(*(Text(cell) for cell in cells))
    # A line that wraps is ugly, a number cut short is wrong.
    width = console.measure(grid, options=console.options.update(max_width=1000)).maximum
    wide = Console(file=console.file, width=max(width, console.width), force_terminal=console.is_terminal)
    wide.print(grid)


def show_failures(frame: pd.DataFrame, console: Console) -> None:
    """The failed jobs and their reasons, a line each; not in the table, where they would push numbers off the screen."""
    failed = frame[frame["status"] == "failed"]
    for _, job in failed.head(_REASONS).iterrows():
        title = " ".join(str(job[key]) for key in ("model", "algo", "scheme", "setting") if job[key])
        console.print(f"{title} failed: {job['reason']}", markup=False, highlight=False, soft_wrap=True)
    if len(failed) > _REASONS:
        console.print(f"and {len(failed) - _REASONS} more failed", highlight=False)
