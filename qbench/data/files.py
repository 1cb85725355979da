"""Rows of files: JSON lines, JSON, parquet, arrow."""

import gzip
import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from qbench.data.sources import SUFFIXES


@lru_cache(maxsize=8)
def file_rows(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows of a file, and the SHA-256 of its bytes: one file may hold the subjects of sixty tasks."""
    return list(read_rows(path)), hashlib.sha256(path.read_bytes()).hexdigest()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines (a list, with suffix .json), parquet or arrow.

    Raises:
        ValueError: If it is none of these.
    """
    if path.suffix in (".parquet", ".arrow"):
        from datasets import Dataset

        table = Dataset.from_parquet(str(path)) if path.suffix == ".parquet" else Dataset.from_file(str(path))
        yield from table
        return
    if path.suffix not in (".jsonl", ".json", ".gz"):
        raise ValueError(f"{path} has suffix {path.suffix!r}; known are {', '.join(SUFFIXES)}")
    with (
        gzip.open(path, "rt", encoding="utf-8")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8") as file
    ):
        first = file.read(1)
        file.seek(0)
        if first == "[":
            yield from json.load(file)
            return
        for number, line in enumerate(file, 1):  # not splitlines(): it also cuts at U+2028 inside a string
            try:
                if line.strip():
                    yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: {error}; one JSON object a line is needed"
                ) from error


def alike(values: list[Any]) -> list[Any]:
    """The values of a field, as JSON where they are of several kinds, which a table cannot hold."""
    import pyarrow as pa

    try:
        pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return [json.dumps(value, ensure_ascii=False) for value in values]
    return values
