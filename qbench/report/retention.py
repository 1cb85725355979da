"""What is kept of an accuracy: the share above chance of the floating-point model's (arXiv:2402.18158, Section 3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from qbench.report.cells import Cells, Result
from qbench.report.marked import Made
from qbench.report.metrics import base, is_cost, lower_is_better
from qbench.report.page.content import Cell, PageTable
from qbench.report.result import same_items
from qbench.report.results import failures, heading
from qbench.report.spec import TableSpec
from qbench.report.tables import number

# What guessing scores: one over the number of answers, or 0 where an answer is written freely. A task that is not
# here, or whose questions have different numbers of answers, is said to be left out.
CHANCE = {
    "stdlib_cloze": 0.25, "stdlib_copy": 0.0, "stdlib_recall": 0.0, "stdlib_passkey": 0.0, "stdlib_lines": 0.0,
    "lambada_openai": 0.0, "winogrande": 0.5, "piqa": 0.5, "race": 0.25, "social_iqa": 1 / 3, "rte": 0.5,
    "boolq": 0.5, "openbookqa": 0.25, "sciq": 0.25, "chid": 1 / 7, "mmlu": 0.25, "ceval-valid": 0.25, "cmmlu": 0.25,
    "hellaswag": 0.25, "gsm8k": 0.0, "bbh_fewshot": 0.0, "strategyqa": 0.5, "ethics_cm": 0.5, "ethics_deontology": 0.5,
    "ethics_justice": 0.5, "advglue_sst2": 0.5, "advglue_qqp": 0.5, "advglue_mnli": 1 / 3, "advglue_mnli_mm": 1 / 3,
    "advglue_qnli": 0.5, "advglue_rte": 0.5, "longeval_lines": 0.0, "longeval_topics": 0.0, "litm_kv": 0.0,
    "litm_qa": 0.0, "passkey": 0.0, "ruler_niah": 0.0, "humaneval": 0.0, "mbpp": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """`max((x - chance) / (fp - chance), 0)`, and its standard error."""

    value: float
    stderr: float | None


def kept(mine: Result, floating: Result, chance: float) -> Kept | None:
    """The share that is kept; `None` where the floating-point model itself is not above chance."""
    room = floating.value - chance
    if room <= 0:
        return None
    ratio = (mine.value - chance) / room
    stderr = None
    if same_items(mine, floating) and mine.draws is not None and floating.draws is not None:
        # The ratio of two means of the same items, to first order in each item.
        one, other = mine.draws.values.mean(0) - chance, floating.draws.values.mean(0) - chance
        stderr = float(np.std((one - ratio * other) / room, ddof=1) / np.sqrt(len(one)))
    return Kept(max(ratio, 0.0), stderr)


def retention(cells: Cells) -> tuple[pd.DataFrame, list[str]]:
    """The shares that recipes keep, and what had to be left out.

    Returns:
        A row for each recipe and task: the labels, metric, value, stderr, chance, records.
    """
    rows, out = [], dict[str, None]()
    for metric in cells.metrics:
        if is_cost(metric) or lower_is_better(metric):
            continue
        task = base(metric).partition("/")[2]
        if (chance := CHANCE.get(task)) is None:
            out[f"{task} (what guessing scores is not known)"] = None
            continue
        for recipe in cells.recipes:
            mine = cells.result(recipe, metric)
            if mine is None or recipe.is_float:
                continue
            model = recipe.records[0]["labels"]["model"]
            floating = cells.floating(recipe, metric)
            if floating is None:
                out[
                    f"{heading((), metric)} ({model} in floating point has no such result of the same text)"
                ] = None
            elif (share := kept(mine, floating, chance)) is None:
                out[f"{heading((), metric)} ({model} in floating point is not above chance)"] = None
            else:
                rows.append({
                    **dict(zip(cells.names, recipe.labels, strict=True)), "across": recipe.across,
                    "metric": metric, "value": share.value, "stderr": share.stderr, "chance": chance,
                    "records": " ".join((*mine.records, *floating.records)),
                })  # fmt: skip
    return pd.DataFrame(rows), list(out)


def tasks(metrics: "pd.Series[str]") -> list[str]:
    """The task alone where one metric of it is there; a task may have several, and each several protocols."""
    short = {metric: base(metric).partition("/")[2] for metric in dict.fromkeys(metrics)}
    several = {task for task in short.values() if list(short.values()).count(task) > 1}
    return [metric if short[metric] in several else short[metric] for metric in metrics]


def polygons(found: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """What each share is of: algorithm and scheme, and of the other labels those in which some differ."""
    more = [key for key in names if key not in ("model", "algo", "scheme") and found[key].nunique() > 1]
    return [" ".join(filter(None, row)) for row in found[["algo", "scheme", *more]].itertuples(index=False)]


def retention_table(cells: Cells, spec: TableSpec, anchor: str) -> Made:
    """Recipes down, tasks across, the share of each that is kept.

    Raises:
        ValueError: If nothing can be said of any task.
    """
    found, out = retention(cells)
    if found.empty:
        raise ValueError(
            f"no share can be told: {'; '.join(out) or 'there is no accuracy beside floating point'}"
        )
    columns = list(dict.fromkeys(zip(found["across"], found["metric"], strict=True)))
    rows: dict[tuple[str, ...], dict[object, Cell]] = {}
    for _, row in found.iterrows():
        labels = tuple(row[name] for name in cells.names)
        cell = Cell(
            number(row["value"], row["stderr"]), float(row["value"]), "", tuple(row["records"].split())
        )
        rows.setdefault(labels, {})[row["across"], row["metric"]] = cell
    notes = [
        "1 is what the floating-point model scores, 0 is guessing; ± is the standard error over documents, "
        "those of both models."
    ]
    notes += [f"Left out: {', '.join(out)}."] if out else []
    table = PageTable(
        spec.title,
        (*cells.names, *(heading(across, metric) for across, metric in columns)),
        tuple((*map(Cell, labels), *(row.get(c, Cell("")) for c in columns)) for labels, row in rows.items()),
        len(cells.names),
        (*notes, *failures(cells.failed)),
        anchor=anchor,
    )
    return Made(table, found.drop(columns="across"))
