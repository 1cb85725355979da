"""What two recipes were, and what each block of the model made of it: settings that differ, and errors by depth."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from qbench.report.marked import Made
from qbench.report.page.content import Cell, PageTable
from qbench.report.pairs import relative
from qbench.report.sides import Side
from qbench.track.records import Record, flatten

_MISSING = "–"
_SAID = ("_target_", "algo_name")  # by the names of algorithms in the identity
_COMMIT = 12  # digits


def settings_table(a: Side, b: Side, title: str) -> Made:
    """The keys of the identity that differ, then those of the config, then what is of the machine and the code.

    A side that has several values, as of the seed, differs where not all are the other's. What the identity says is not
    repeated where the config says it in the same words; nor is a part that one has and the other has not, where its keys
    are listed.
    """
    rows, equal, said = [], [], set(_SAID)
    sides = [_settings(side.records) for side in (a, b)]
    for part in ("identity", "config", "environment"):
        of_a, of_b = sides[0][part], sides[1][part]
        keys = dict.fromkeys([*of_a, *of_b])
        parents = {key.rpartition(".")[0] for key in keys}
        differing = [key for key in keys if of_a.get(key) != of_b.get(key)]
        equal.append(f"{len(keys) - len(differing)} of the {part}")
        for key in differing:
            values = of_a.get(key, _MISSING), of_b.get(key, _MISSING)
            name = key.rpartition(".")[2]
            short = " ".join((name, *values))
            if short not in said and name not in said and key not in parents:
                rows.append((part, key, *values))
            said.add(short)
    columns = ("of", "setting", "A", "B")
    cells = tuple(tuple(map(Cell, row)) for row in rows)
    notes = (f"Equal in both: {', '.join(equal)}.",)
    table = PageTable(f"{title}: settings that differ", columns, cells, 2, notes, anchor="compare-settings")
    return Made(table)


def _settings(records: Iterable[Record]) -> dict[str, dict[str, str]]:
    """By part and key, in the order of the first job: all values of these jobs, as text."""
    found: dict[str, dict[str, dict[Any, None]]] = {"identity": {}, "config": {}, "environment": {}}
    for record in records:
        about = record["environment"]
        environment = {
            "device": record.get("device"), **about["versions"],
            "git_commit": (about.get("git_commit") or "")[:_COMMIT] or None,
        }  # fmt: skip
        trees = (record["identity"], record["config"], environment)
        for part, tree in zip(found.values(), trees, strict=True):
            for key, value in flatten(_with_lists_as_text(tree)).items():
                part.setdefault(key, {})[value] = None
    return {part: {key: _text(values) for key, values in keys.items()} for part, keys in found.items()}


def _with_lists_as_text(tree: Any) -> Any:
    """Lists of plain values as one value, since what is at a place in them is no setting of its own."""
    if isinstance(tree, Mapping):
        return {key: _with_lists_as_text(value) for key, value in tree.items()}
    if isinstance(tree, list) and not any(isinstance(value, list | Mapping) for value in tree):
        return ", ".join(map(str, tree)) or "none"
    return [_with_lists_as_text(value) for value in tree] if isinstance(tree, list) else tree


def _text(values: Iterable[Any]) -> str:
    ordered = sorted(
        values, key=lambda v: (isinstance(v, str), v) if isinstance(v, int | float | str) else (2, "")
    )
    return ", ".join("none" if value is None else str(value) for value in ordered)


def blocks_table(a: Side, b: Side, title: str) -> Made:
    """The relative error of every block's output, mean over draws; no rows where not both have such."""
    errors = [_errors(side.records) for side in (a, b)]
    rows: list[tuple[str, float, float]] = []
    notes = ["Relative error of what each block puts out, on calibration data; blocks from the first, 0."]
    if all(len(of) for of in errors):
        rows.append(("mean", float(errors[0].mean()), float(errors[1].mean())))
        if len(errors[0]) == len(errors[1]):
            rows += [(str(i), float(x), float(y)) for i, (x, y) in enumerate(zip(*errors, strict=True))]
            at = int(np.abs(errors[1] - errors[0]).argmax())
            notes.append(f"They differ most in block {at}.")
        else:
            notes.append(f"A has {len(errors[0])} blocks and B {len(errors[1])}: only means are compared.")
    cells = tuple(
        (
            Cell(block, -1 if block == "mean" else int(block)), Cell(f"{x:.3g}", x), Cell(f"{y:.3g}", y),
            Cell(relative(x, y), y / x if x > 0 else None),
        )
        for block, x, y in rows
    )  # fmt: skip
    table = PageTable(
        f"{title}: block errors",
        ("block", "A", "B", "change"),
        cells,
        1,
        tuple(notes),
        anchor="compare-blocks",
    )
    return Made(table, pd.DataFrame(rows, columns=["block", "a", "b"]))


def _errors(records: Iterable[Record]) -> np.ndarray:
    known = [record["block_errors"] for record in records if record.get("block_errors")]
    return np.mean(known, axis=0) if known else np.empty(0)
