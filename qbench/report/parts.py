"""A metric by parts of its task: subjects, lengths, positions.

A part may have several marks with commas between them ("600 chars, 0.25"): there is a table for each mark, over all
values of the others, and one of all marks together.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from qbench.evaluate.result import mean
from qbench.report.frame import tidy
from qbench.report.paired import Samples
from qbench.report.tables import number, print_table, save

_FITS = 16  # parts that a terminal shows side by side


def by_part(records: Sequence[dict[str, Any]], samples: Samples) -> pd.DataFrame:
    """Means of every metric by part.

    Returns:
        One row for each job, metric and part: model, scheme, algo, setting, metric, marks (which of a part's marks), part,
        value, stderr, n.

    Raises:
        ValueError: If no metric has parts.
    """
    done = [record for record in records if record["status"] == "done"]
    settings = tidy(done).drop_duplicates("fingerprint").set_index("fingerprint")["setting"]
    rows = []
    for record in done:
        found = pd.DataFrame(samples(record["fingerprint"]))
        if "part" not in found:
            continue
        labels = {key: record["labels"][key] for key in ("model", "scheme", "algo")}
        labels["setting"] = settings[record["fingerprint"]]
        for metric, items in found.dropna(subset=["part"]).groupby("metric", sort=False):
            rows += [labels | {"metric": metric} | row for row in _rows(items)]
    if not rows:
        raise ValueError(
            "no metric has parts; they are of tasks such as mmlu (subjects) and those of eval=long (lengths, positions)"
        )
    return pd.DataFrame(rows)


def _rows(items: pd.DataFrame) -> list[dict[str, Any]]:
    marks = items["part"].str.split(", ", expand=False)
    n_marks = set(map(len, marks))
    views = {"all": items["part"]}
    if len(n_marks) == 1 and (n := n_marks.pop()) > 1:
        views |= {f"mark {i + 1}": marks.str[i] for i in range(n)}
    rows = []
    for view, names in views.items():
        if view != "all" and names.nunique() == 1:
            continue
        for part, group in sorted(items.groupby(names, sort=False), key=lambda found: _order(str(found[0]))):
            found = mean("", [{"value": value} for value in group["value"]]).metrics
            stderr = found["_stderr"] if len(group) > 1 else None
            rows.append({"marks": view, "part": part, "value": found[""], "stderr": stderr, "n": len(group)})
    return rows


def _order(part: str) -> list[tuple[float, str]]:
    """Numbers by their size, words by the alphabet."""
    first = [mark.partition(" ")[0] for mark in part.split(", ")]
    return [(float(word) if word.replace(".", "", 1).isdigit() else 0.0, word) for word in first]


def tables(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By metric and marks: jobs down, parts across, as text."""
    index = ["model", "scheme", "algo", *(["setting"] if frame["setting"].any() else [])]
    found = {}
    for (metric, marks), part in frame.groupby(["metric", "marks"], sort=False):
        cells: dict[tuple[str, ...], dict[str, str]] = {}
        counts = part.groupby("part")["n"].agg(["min", "max"]).astype(str)
        shown = {p: f"{p} (n={'-'.join(dict.fromkeys(n))})" for p, n in counts.T.to_dict("list").items()}
        for _, row in part.iterrows():
            cell = number(row["value"], row["stderr"])
            cells.setdefault(tuple(row[k] for k in index), {})[shown[row["part"]]] = cell
        rows = [dict(zip(index, key, strict=True)) | columns for key, columns in cells.items()]
        found[f"{metric} by {marks}"] = pd.DataFrame(rows).fillna("")
    return found


def show(frame: pd.DataFrame, console: Console) -> None:
    """The tables that a terminal has room for."""
    for title, table in tables(frame).items():
        if len(table.columns) <= _FITS:
            print_table(table, title.removesuffix(" by all"), console)


def write(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """All tables, as CSV, Markdown and LaTeX."""
    names = {
        f"parts-{title.replace('/', '-').replace(' ', '-')}": table for title, table in tables(frame).items()
    }
    return save({"parts": frame} | names, folder)
