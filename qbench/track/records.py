"""Where results are kept: a folder for each job, which is the truth.

    results/records/<fingerprint>/record.json, samples.parquet, speed.json (where `qbench bench` measured it)
    results/sweeps/<id>.json     which jobs a sweep asks for
    results/claims, launches, workers, logs     of running sweeps

A record is written in a temporary folder and moved into place, so that a killed job leaves nothing
half-written, resuming is "does it exist", and any number of workers can write at once.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

Record = dict[str, Any]

_LEAST_FREE = 20 << 20  # bytes without which it is no use to start
_STALE = 3600  # seconds after which a temporary folder belongs to no running job


@dataclass(frozen=True)
class RecordStore:
    """The records under one results folder."""

    root: Path

    @property
    def records(self) -> Path:
        return self.root / "records"

    def prepare(self) -> None:
        """Make the folders and sweep up what killed jobs left.

        Raises:
            ValueError: If the folder cannot be written, or its disk is as good as full.
        """
        try:
            for name in ("records", "sweeps", "claims", "launches", "workers", "logs"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            for folder in self.records.glob(".tmp-*"):
                if time.time() - folder.stat().st_mtime > _STALE:
                    shutil.rmtree(folder, ignore_errors=True)
            probe = self.records / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"results folder {str(self.root)!r} cannot be written ({error.strerror}); set results="
            ) from error
        if (free := shutil.disk_usage(self.root).free) < _LEAST_FREE:
            raise ValueError(
                f"the disk of results folder {str(self.root)!r} has {free / 1e6:.0f} MB left, "
                f"{_LEAST_FREE / 1e6:.0f} are needed; free some, or set results="
            )

    @property
    def where(self) -> str:
        """The folder of the records, for messages."""
        return str(self.records)

    def path(self, fingerprint: str) -> Path:
        return self.records / fingerprint

    def read(self, fingerprint: str) -> Record | None:
        path = self.path(fingerprint)
        return read_record(path) if (path / "record.json").is_file() else None

    def samples(self, fingerprint: str) -> list[dict[str, Any]]:
        """The values behind a record's metrics: `metric`, `item`, `value`."""
        return read_samples(self.path(fingerprint))

    def sample_table(self, fingerprints: Sequence[str]) -> "pyarrow.Table":
        """The samples of many records, in this order: fingerprint, metric, item, value, part (null where there is none)."""
        return sample_table([(fingerprint, self.path(fingerprint)) for fingerprint in fingerprints])

    def folder(self, fingerprint: str) -> Path:
        """Where the files of a record lie."""
        return self.path(fingerprint)

    def link(self, fingerprint: str) -> str | None:
        """Where a browser shows the run: a folder alone has no such place."""
        return None

    def is_done(self, fingerprint: str) -> bool:
        record = self.read(fingerprint)
        return record is not None and record["status"] == "done"

    def written(self, fingerprint: str) -> float | None:
        """When the record was written, by the clock of the file system; `None` where there is none."""
        try:
            return (self.path(fingerprint) / "record.json").stat().st_mtime
        except OSError:
            return None

    def all(self) -> Iterator[Record]:
        """Every record, in the order in which jobs began."""
        paths = self.records.glob("[!.]*/record.json")
        return iter(in_order(read_record(path.parent) for path in paths))

    def add_speed(self, fingerprint: str, machine: str, speed: dict[str, Any]) -> Path:
        """Keep what was measured of a record's speed on a machine, in the place of what was measured there before.

        A record that is written again has none: the weights are the same, but whoever forces a job trusts nothing.
        """
        path = self.path(fingerprint) / "speed.json"
        kept = json.loads(path.read_text()) if path.is_file() else {}
        text = json.dumps(kept | {machine: speed}, indent=1, allow_nan=False)
        draft = path.with_name(f".speed-{os.getpid()}")
        with draft.open("w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        return path

    def write(self, record: Record, samples: list[dict[str, Any]]) -> Path:
        """Keep a record; it takes the place of an earlier one of the same job."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        fingerprint = record["fingerprint"]
        draft = self.records / f".tmp-{fingerprint}-{os.getpid()}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        if samples:
            columns = dict.fromkeys(key for sample in samples for key in sample)
            table = pa.table({key: [sample.get(key) for sample in samples] for key in columns})
            pq.write_table(table, draft / "samples.parquet")
        for path in draft.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        with (draft / "record.json").open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        final, old = self.path(fingerprint), draft.with_name(f"{draft.name}-old")
        if final.exists():
            final.rename(old)
        try:
            draft.rename(final)
        except OSError:  # another worker finished the same job in between; its record is as good
            if not (final / "record.json").is_file():
                raise
            shutil.rmtree(draft)
        shutil.rmtree(old, ignore_errors=True)
        return final

    def open_sweep(self, command: str, fingerprints: Iterable[str]) -> str:
        """Note which jobs a sweep asks for. The same jobs are the same sweep, however often they are asked for."""
        wanted = sorted(set(fingerprints))
        id_ = hashlib.sha256("".join(wanted).encode()).hexdigest()[:12]
        path = self.root / "sweeps" / f"{id_}.json"
        if not path.exists():
            draft = path.with_suffix(f".tmp{os.getpid()}")
            draft.write_text(
                json.dumps({"id": id_, "command": command, "jobs": wanted, "started": time.time()})
            )
            draft.replace(path)
        return id_

    def sweeps(self) -> dict[str, dict[str, Any]]:
        """The sweeps by id, oldest first."""
        found = [json.loads(path.read_text()) for path in (self.root / "sweeps").glob("*.json")]
        return {about["id"]: about for about in sorted(found, key=lambda about: about["started"])}

    @property
    def id(self) -> str:
        """A name for this results folder that no other has, made when it is first asked for."""
        path = self.root / "store-id"
        if not path.exists():
            draft = path.with_name(f"store-id.{os.getpid()}")
            draft.write_text(uuid.uuid4().hex)
            with contextlib.suppress(FileExistsError):
                os.link(draft, path)  # unlike a rename, this keeps the id of whoever came first
            draft.unlink()
        return path.read_text()


def read_record(folder: Path) -> Record:
    """The record in a folder; what was measured of its speed is among its metrics."""
    record: Record = json.loads((folder / "record.json").read_text())
    speed = folder / "speed.json"
    if record["status"] == "done" and speed.is_file():
        for found in json.loads(speed.read_text()).values():
            record["metrics"] |= found["metrics"]
    return record


def in_order(records: Iterable[Record]) -> list[Record]:
    """By the time at which jobs began."""
    return sorted(records, key=lambda record: (record["started"], record["fingerprint"]))


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The samples of the record in `folder`; empty where it has none."""
    import pyarrow.parquet as pq

    path = folder / "samples.parquet"
    return pq.read_table(path).to_pylist() if path.is_file() else []


def sample_table(folders: Sequence[tuple[str, Path]]) -> "pyarrow.Table":
    """The samples of the records in these folders, by fingerprint: see `RecordStore.sample_table`."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [("metric", pa.string()), ("item", pa.int64()), ("value", pa.float64()), ("part", pa.string())]
    )
    tables = [schema.empty_table()]
    counts = []
    for _, folder in folders:
        try:
            # Files are small: a scanner's or a thread's work for each costs more than it saves.
            tables.append(
                pq.ParquetFile(folder / "samples.parquet", pre_buffer=False).read(use_threads=False)
            )
        except FileNotFoundError:
            tables.append(schema.empty_table())
        counts.append(len(tables[-1]))
    rows = pa.concat_tables(tables, promote_options="permissive").select(schema.names).cast(schema)
    names = pa.array([fingerprint for fingerprint, _ in folders], pa.string())
    return rows.add_column(0, "fingerprint", names.take(pa.array(np.repeat(np.arange(len(folders)), counts))))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}, "c": [2]}` -> `{"a.b": 1, "c.0": 2}`."""
    if isinstance(tree, dict):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list | tuple):
        items = [(str(i), value) for i, value in enumerate(tree)]
    else:
        return {prefix: tree}
    return {
        key: leaf
        for name, value in items
        for key, leaf in flatten(value, f"{prefix}.{name}" if prefix else name).items()
    }
