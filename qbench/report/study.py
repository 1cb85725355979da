"""The tables of a study, made of records as its specification says."""

from collections.abc import Callable, Mapping, Sequence

from qbench.report import matrix, parts
from qbench.report.agreement import pearson_table, spearman_table, variance_table
from qbench.report.beside import beside_table
from qbench.report.cells import Cells, chosen
from qbench.report.labels import check_labels, matches
from qbench.report.marked import Made, of_frame, stem
from qbench.report.metrics import base
from qbench.report.results import failures, results_table
from qbench.report.retention import retention_table
from qbench.report.spec import TableKind, TableSpec
from qbench.report.wins import wins_table
from qbench.track.records import Record
from qbench.track.source import Source

_OF_CELLS: dict[TableKind, Callable[[Cells, TableSpec, str], Made]] = {
    "results": results_table,
    "retention": retention_table,
    "wins": wins_table,
    "spearman": spearman_table,
    "pearson": pearson_table,
    "variance": variance_table,
}


def tables(
    specs: Mapping[str, TableSpec], records: Sequence[Record], source: Source, algorithms: Sequence[str] = ()
) -> tuple[dict[str, Made], dict[str, str]]:
    """All tables of a study by name of file, and those that the records do not suffice for, with the reason.

    Args:
        algorithms: Those of the study, where a table names none.
    """
    made: dict[str, Made] = {}
    lacking: dict[str, str] = {}
    for name, spec in specs.items():
        mine = chosen(records, spec.where, algorithms)
        try:
            check_labels(records, spec.labels)
            _check(mine)
            made |= _made(name, spec, mine, source)
        except ValueError as error:
            lacking[name] = str(error)
        else:
            try:
                made |= _beside(name, spec, mine, source)
            except ValueError as error:
                lacking[f"{name}-published"] = str(error)
    return made, lacking


def _check(records: Sequence[Record]) -> None:
    """Whether anything was quantized.

    Raises:
        ValueError: If not, saying whether nothing was tried or all of it failed.
    """
    quantized = [r for r in records if r["labels"]["algo"] != "fp"]
    if any(r["status"] == "done" for r in quantized):
        return
    if not quantized:
        raise ValueError("no record is of it")
    raise ValueError(f"all {len(quantized)} jobs of it failed, the first for this: {quantized[0]['reason']}")


def _cells(spec: TableSpec, records: Sequence[Record], source: Source) -> Cells:
    """What is compared must be told apart, whether or not it is among the labels of rows."""
    apart = spec.kind == "wins" and spec.factor not in (*spec.rows, *spec.columns)
    rows = (*spec.rows, spec.factor) if apart else spec.rows
    return Cells.of(records, source, rows, spec.columns, spec.metrics)


def _made(name: str, spec: TableSpec, records: Sequence[Record], source: Source) -> dict[str, Made]:
    if spec.kind == "matrix":
        return _matrix(name, spec, records, source)
    if spec.kind == "parts":
        return _parts(name, spec, records, source)
    return {name: _OF_CELLS[spec.kind](_cells(spec, records, source), spec, name)}


def _beside(name: str, spec: TableSpec, records: Sequence[Record], source: Source) -> dict[str, Made]:
    if not spec.published or spec.kind not in _OF_CELLS:
        return {}
    found = beside_table(_cells(spec, records, source), spec, f"{name}-published")
    return {} if found is None else {f"{name}-published": found}


def _matrix(name: str, spec: TableSpec, records: Sequence[Record], source: Source) -> dict[str, Made]:
    found = matrix.compare(matrix.losses(records, source.samples, spec.metrics))
    whole, closest = matrix.table(found), matrix.closest(found)
    note = "* surely worse than the best of its column (p < 0.05 over windows and over draws, corrected)."
    notes = (note, *failures([r for r in records if r["status"] == "failed"]))
    made = {name: Made(of_frame(whole, spec.title, name, 5, notes).table, found)}
    if not closest.empty:
        title = "Is the text's own set better than each other one?"
        made[f"{name}-closest"] = of_frame(closest, title, f"{name}-closest", 5)
    return made


def _parts(name: str, spec: TableSpec, records: Sequence[Record], source: Source) -> dict[str, Made]:
    frame = parts.by_part(records, source.samples)
    frame = frame[[matches(base(str(metric)), spec.metrics) for metric in frame["metric"]]]
    if frame.empty:
        raise ValueError(f"no metric like {' or '.join(spec.metrics)} has parts")
    made, failed = {}, failures([r for r in records if r["status"] == "failed"])
    for title, table in parts.tables(frame).items():
        file = stem(f"{name}-{title}")
        n_labels = len({"model", "scheme", "algo", "setting"} & set(table.columns))
        shown = f"{spec.title}: {title.removesuffix(' by all')}"
        made[file] = of_frame(table, shown, file, n_labels, failed)
    return made
