"""Calibration sets down, evaluation texts across: does it matter on which text a model is calibrated?

Two things are drawn at random: what a job draws by its seeds (calibration samples, a rotation) and the windows that are
evaluated. A difference counts only where it is sure on both grounds: between the draws of two sets (Welch's t-test of their
perplexities on these windows) and between windows (a paired t-test of the means over draws). The larger of the two p-values
is that of claiming both (an intersection-union test; Berger 1982); with a single draw of each the second test is alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from qbench.report import significance
from qbench.report.frame import protocol
from qbench.report.labels import draw_of, matches, settings
from qbench.report.paired import Samples
from qbench.report.result import digests
from qbench.report.significance import Draws, holm
from qbench.report.tables import print_table, save

_SURE = 0.05
_GROUP = ["model", "algo", "scheme", "setting"]


def losses(
    records: Sequence[dict[str, Any]], samples: Samples, metrics: Sequence[str] = ("ppl/*",)
) -> pd.DataFrame:
    """Windows' mean negative log-likelihoods of all calibrated jobs.

    Args:
        metrics: Patterns of the perplexities that are wanted.

    Returns:
        One row for each job, text and window: model, algo, scheme, setting (what else tells jobs apart), calib, seed (all
        seeds of the job, as text), text (with its protocol), own (whether it is the calibration set's own text), item,
        value.

    Raises:
        ValueError: If no record is of a calibrated job.
    """
    mine = [r for r in records if r["status"] == "done" and r["labels"]["calib"] is not None]
    told, parts = settings(mine, (*_GROUP[:3], "calib")), []
    ways: dict[str, set[str]] = {}
    for record in mine:
        for metric in record["metrics"]:
            ways.setdefault(metric, set()).add(_way(record, metric))
    for record in mine:
        labels = record["labels"] | {"setting": told[record["fingerprint"]]}
        found = pd.DataFrame(samples(record["fingerprint"]), columns=["metric", "item", "value"])
        found = found[[m.startswith("ppl/") and matches(m, metrics) for m in found["metric"]]]
        metric = found.pop("metric")
        shown = {m: f" {_way(record, m)}" if len(ways[m]) > 1 else "" for m in metric.unique()}
        found["text"] = [m.removeprefix("ppl/") + shown[m] for m in metric]
        found["own"] = metric == f"ppl/{labels['calib']}"
        for key in (*_GROUP, "calib"):
            found[key] = labels[key]
        found["seed"] = draw_of(record)
        parts.append(found)
    if not parts:
        raise ValueError("no job with a calibration set is recorded; run e.g. `qbench -m +sweep=calibration`")
    return pd.concat(parts, ignore_index=True)


def _way(record: dict[str, Any], metric: str) -> str:
    """The protocol, and which text went by that name."""
    return " ".join([protocol(record, metric), *(f"@{digest[:6]}" for digest in digests([record], metric))])


def compare(frame: pd.DataFrame) -> pd.DataFrame:
    """Each calibration set beside the best one for the same text, and beside the text's own.

    Returns:
        One row for each model, algorithm, scheme, text and set: value (perplexity), draws, change (from the best set's,
        relative) and p of it, own_change (of the text's own set against this one, relative) and own_p. P-values are
        corrected by Holm's method within a model, algorithm and scheme: p as one of all pairs of sets, since the best is
        chosen by the numbers that it is tested on (docs/statistics.md), own_p of those with the own set.
    """
    rows, tests = [], []
    for key, group in frame.groupby([*_GROUP, "text"], sort=False):
        nll: dict[Any, float] = group.groupby("calib", sort=False)["value"].mean().to_dict()
        sets = {calib: _draws(mine) for calib, mine in group.groupby("calib", sort=False)}
        least = min(nll, key=lambda calib: nll[calib])
        own = next(iter(group.loc[group["own"], "calib"]), None)
        for calib, mine in sets.items():
            row = dict(zip([*_GROUP, "text"], key, strict=True))
            row |= {"calib": calib, "value": float(np.exp(nll[calib])), "draws": len(mine.values)}
            row |= {"change": float(np.expm1(nll[calib] - nll[least]))}
            if calib != least:
                tests.append((row, "p", (mine, sets[least])))
            if own not in (None, calib):
                row["own_change"] = float(np.expm1(nll[own] - nll[calib]))
                tests.append((row, "own_p", (sets[own], mine)))
            rows.append(row)
    results = significance.differences([pair for *_, pair in tests])
    for (row, name, _), result in zip(tests, results, strict=True):
        row[name] = result.p
    found = pd.DataFrame(rows).reindex(columns=[*_COLUMNS])
    for _, part in found.groupby(_GROUP, sort=False):
        pairs = sum(n * (n - 1) // 2 for n in part["text"].value_counts())
        found.loc[part.index, "p"] = holm(part["p"], pairs)
        found.loc[part.index, "own_p"] = holm(part["own_p"])
    return found


_COLUMNS = (*_GROUP, "text", "calib", "value", "draws", "change", "p", "own_change", "own_p")


def _draws(part: pd.DataFrame) -> Draws:
    means = part.groupby(["seed", "item"], dropna=False)["value"].mean()
    return Draws.of(means.rename_axis(index={"seed": "draw"}).reset_index())


def table(found: pd.DataFrame) -> pd.DataFrame:
    """The matrix as text: perplexity, how much worse than the best set's, and `*` where that is sure."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for _, row in found.iterrows():
        worse = f"{row['value']:.4g} (+{row['change']:.1%}{'*' if row['p'] < _SURE else ''})"
        key = tuple(row[k] for k in (*_GROUP, "calib"))
        cells.setdefault(key, {})[row["text"]] = worse if row["change"] else f"{row['value']:.4g} best"
    rows = [dict(zip([*_GROUP, "calib"], key, strict=True)) | columns for key, columns in cells.items()]
    return pd.DataFrame(rows).fillna("")


def closest(found: pd.DataFrame) -> pd.DataFrame:
    """Is a text's own set the best for it? A row for each model, algorithm, scheme and text that has one."""
    rows = []
    for key, group in found.dropna(subset=["own_p"]).groupby([*_GROUP, "text"], sort=False):
        sure = group[group["own_p"] < _SURE]
        wins, losses_ = int((sure["own_change"] < 0).sum()), int((sure["own_change"] > 0).sum())
        verdict = "yes" if wins == len(group) else "no" if losses_ else "undecided"
        row = dict(zip([*_GROUP, "text"], key, strict=True))
        row |= {"better than": f"{wins} of {len(group)}", "worse than": f"{losses_} of {len(group)}"}
        rows.append(row | {"closest is best": verdict})
    return pd.DataFrame(rows)


def show(found: pd.DataFrame, console: Console) -> None:
    """The matrix of each model, algorithm and scheme, and what it says of the closest set."""
    for key, part in table(found).groupby(_GROUP, sort=False):
        name = " ".join(filter(None, map(str, key)))
        title = f"{name}: perplexity (* worse than the column's best, p < {_SURE}, Holm)"
        print_table(part.drop(columns=_GROUP), title, console)
    if (found["draws"] < 2).any():
        console.print(
            "one draw of some sets: the luck of the draw is not in p; add seed=0,1,2", highlight=False
        )
    verdicts = closest(found)
    if not verdicts.empty:
        print_table(verdicts, f"is the text's own set better than each other one (p < {_SURE})?", console)


def write(found: pd.DataFrame, folder: Path) -> list[Path]:
    """All comparisons, the matrix and the verdicts, as CSV, Markdown and LaTeX."""
    return save(
        {"calibration": found, "calibration-matrix": table(found), "calibration-closest": closest(found)},
        folder,
    )
