"""A study's published numbers beside ours."""

from typing import Any

import pandas as pd

from qbench.report.cells import Cells
from qbench.report.ledger import cells_of
from qbench.report.marked import Made
from qbench.report.metrics import base
from qbench.report.page.content import Cell, PageTable
from qbench.report.published import beside
from qbench.report.spec import TableSpec


def beside_table(cells: Cells, spec: TableSpec, anchor: str) -> Made | None:
    """Every number of the published tables that a study names, ours, and whether it is within the tolerance."""
    mine = cells_of(
        (record for recipe in cells.recipes for record in recipe.records), map(base, cells.metrics)
    )
    parts = []
    for reference in spec.published:
        source, _, table = (part.strip() for part in reference.partition(" :: "))
        parts.append(beside(mine, source, table or None))
    found = pd.concat(parts, ignore_index=True)
    if found.empty:
        return None
    labels = ("model", "method", "scheme", "calib", "dataset", "metric")
    rows = []
    for _, row in found.iterrows():
        has = not pd.isna(row["ours"])
        records = (str(row["fingerprint"]),) if has else ()
        cells_ = [Cell("" if pd.isna(row[name]) else str(row[name])) for name in labels]
        cells_ += [
            _published(row, has),
            Cell(f"{row['ours']:.4g}", float(row["ours"]), "", records) if has else Cell(""),
            Cell(_apart(row, row["difference"], "+") if has else ""),
            Cell(_apart(row, row["tolerance"]) if has else ""),
            Cell({True: "yes", False: "no"}.get(row["within"], "")),
        ]
        rows.append(tuple(cells_))
    n = int(found["ours"].notna().sum())
    note = f"{n} of {len(found)} published numbers have a run of the same model, recipe and protocol here."
    columns = (*labels, "published", "ours", "difference", "tolerance", "within")
    title = f"{spec.title}: published and ours"
    return Made(PageTable(title, columns, tuple(rows), len(labels), (note,), anchor=anchor), found)


def _apart(row: "pd.Series[Any]", value: float, sign: str = "") -> str:
    """A difference or tolerance: relative of perplexities, points of rates."""
    if pd.isna(value):
        return ""
    if str(row["our_metric"]).startswith("ppl/"):
        return f"{value:{sign}.2%}"
    return f"{100 * value:{sign}.2f} points"


def _published(row: "pd.Series[Any]", has_ours: bool) -> Cell:
    """As printed; beside a number of ours, in our unit."""
    if pd.isna(row["value"]):
        return Cell(str(row["printed"]))
    if has_ours and row["our_value"] != row["value"]:
        return Cell(f"{row['our_value']:.4g}", float(row["our_value"]))
    return Cell(str(row["printed"]), float(row["value"]))
