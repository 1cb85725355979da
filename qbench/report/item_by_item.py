"""Where two recipes differ: which answers changed, and on which windows of text they are furthest apart."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from qbench.report.marked import Made
from qbench.report.metrics import base, is_perplexity, kind
from qbench.report.page.content import Cell, PageTable
from qbench.report.pairs import Measured, Pair, figures, p_text, relative
from qbench.report.significance import Difference
from qbench.track.source import Source

_WINDOWS = 5
_NOT_ANSWERS = ("flips/", "agreement/")  # 0 or 1 as answers are, and yet comparisons with floating point


def shared(pair: Pair) -> pd.DataFrame:
    """The items that both have, with their means over draws: item, a, b; in the order of the items' numbers."""
    assert pair.a.draws is not None
    assert pair.b.draws is not None
    a, b = (
        pd.Series(draws.values.mean(axis=0), [int(item) for item in draws.items])
        for draws in (pair.a.draws, pair.b.draws)
    )
    both = pd.concat({"a": a, "b": b}, axis=1, join="inner").sort_index()
    return both.rename_axis("item").reset_index()


def answers(found: Measured) -> Iterator[tuple[Pair, Difference]]:
    """The metrics of which every document is right or wrong."""
    for pair in found.pairs:
        difference = pair.difference
        if difference is None or pair.metric.startswith(_NOT_ANSWERS):
            continue
        if difference.kind == "binary" and kind(pair.metric) == "binary":
            yield pair, difference


def flips(found: Measured) -> pd.DataFrame:
    """How the answers of each task changed from A to B.

    Where there are several draws, what is expected of one of each side, drawn at random.

    Returns:
        One row for each metric of 0 or 1: task, documents, right_to_wrong, wrong_to_right, both_right, both_wrong, net
        (documents), p (McNemar's exact one, or that over items and draws; not corrected), test.
    """
    rows = []
    for pair, difference in answers(found):
        items = shared(pair)
        a, b = items["a"], items["b"]
        lost, won = float((a * (1 - b)).sum()), float(((1 - a) * b).sum())
        rows.append({
            "task": pair.metric, "documents": len(items), "right_to_wrong": lost, "wrong_to_right": won,
            "both_right": float((a * b).sum()), "both_wrong": float(((1 - a) * (1 - b)).sum()),
            "net": round(won - lost, 6), "p": difference.p, "test": difference.test,
        })  # fmt: skip
    return pd.DataFrame(rows)


def changed_documents(found: Measured) -> pd.DataFrame:
    """The documents that one side answered better than the other: task, item, part, A, B.

    The last two are 1 where the answer is right, or the share of draws of which it is.
    """
    frames = []
    for pair, _ in answers(found):
        items = shared(pair)
        parts = _parts(found.source, pair)
        items = items[items["a"] != items["b"]]
        frames.append(items.assign(task=pair.metric, part=items["item"].map(parts).fillna("")))
    columns = {"task": "task", "item": "item", "part": "part", "a": "A", "b": "B"}
    frame = pd.concat(frames) if frames else pd.DataFrame(columns=list(columns))
    return frame[list(columns)].rename(columns=columns).reset_index(drop=True)


def _parts(source: Source, pair: Pair) -> dict[int, str]:
    """Of documents that belong to a part of their task, by item."""
    rows = source.sample_table(pair.a.records[:1]).select(["metric", "item", "part"]).to_pylist()
    return {r["item"]: r["part"] for r in rows if r["metric"] == base(pair.metric) and r["part"]}


def windows(found: Measured, most: int) -> pd.DataFrame:
    """The windows of text on which the two differ most: text, item, a, b (perplexities), change (of them, relative)."""
    frames = [
        shared(pair).assign(text=pair.metric)
        for pair in found.pairs
        if pair.difference is not None and pair.difference.kind == "loss" and is_perplexity(pair.metric)
    ]
    if not frames:
        return pd.DataFrame()
    frame = pd.concat(frames, ignore_index=True)
    apart = frame["b"] - frame["a"]
    frame = frame.assign(
        change=np.expm1(apart), apart=apart.abs(), a=np.exp(frame["a"]), b=np.exp(frame["b"])
    )
    return frame.sort_values("apart", ascending=False, kind="stable").head(most)[
        ["text", "item", "a", "b", "change"]
    ]


def answers_table(found: Measured, title: str) -> Made:
    """`flips` as a table; no rows where no task was answered by both."""
    frame = flips(found)
    counted = ("right_to_wrong", "wrong_to_right", "both_right", "both_wrong")
    rows = tuple(
        (
            Cell(row["task"]), Cell(str(row["documents"])),
            *(Cell(f"{row[key]:.4g}", row[key]) for key in counted),
            Cell(f"{row['net']:+.4g}" if row["net"] else "0", row["net"]), Cell(p_text(row["p"]), row["p"]),
        )
        for _, row in frame.iterrows()
    )  # fmt: skip
    columns = ("task", "n", "right to wrong", "wrong to right", "both right", "both wrong", "net", "p")
    exact = rows and set(frame["test"]) == {"McNemar"}
    note = (
        "From A to B. p: McNemar's exact test"
        if exact
        else "From A to B, as expected of one draw of each. p: over documents and draws"
    )
    notes = (f"{note}, not corrected for the number of tasks.",)
    return Made(PageTable(f"{title}: answers", columns, rows, 1, notes, anchor="compare-tasks"), frame)


def windows_table(found: Measured, title: str) -> Made:
    """`windows` as a table; no rows where not both read the same text."""
    frame = windows(found, _WINDOWS)
    rows = tuple(
        (
            Cell(row["text"]), Cell(str(row["item"])), *(Cell(figures(row[key]), row[key]) for key in "ab"),
            Cell(relative(row["a"], row["b"]), row["change"]),
        )
        for _, row in frame.iterrows()
    )  # fmt: skip
    columns = ("text", "window", "A", "B", "change")
    heading = f"{title}: windows of text that differ most"
    notes = ("Perplexity of single windows, numbered from the beginning of the text.",)
    return Made(PageTable(heading, columns, rows, 2, notes, anchor="compare-windows"), frame)
