"""Where results are kept: a folder for each job, which is the truth, and MLflow, which mirrors it.

    results/records/<fingerprint>/record.json, samples.parquet
    results/sweeps/<id>.json

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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]

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
            ValueError: If the folder cannot be written.
        """
        try:
            (self.root / "sweeps").mkdir(parents=True, exist_ok=True)
            self.records.mkdir(exist_ok=True)
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

    def path(self, fingerprint: str) -> Path:
        return self.records / fingerprint

    def read(self, fingerprint: str) -> Record | None:
        path = self.path(fingerprint) / "record.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def is_done(self, fingerprint: str) -> bool:
        record = self.read(fingerprint)
        return record is not None and record["status"] == "done"

    def all(self) -> Iterator[Record]:
        """Every record, in the order in which jobs began."""
        paths = self.records.glob("[!.]*/record.json")
        return iter(
            sorted((json.loads(p.read_text()) for p in paths), key=lambda r: (r["started"], r["fingerprint"]))
        )

    def write(self, record: Record, samples: list[dict[str, Any]]) -> Path:
        """Keep a record; it takes the place of an earlier one of the same job."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        fingerprint = record["fingerprint"]
        draft = self.records / f".tmp-{fingerprint}-{os.getpid()}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        if samples:
            pq.write_table(pa.Table.from_pylist(samples), draft / "samples.parquet")
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


class MLflowMirror:
    """Copies records to MLflow: a parent run for each sweep, a child for each record.

    A child's parent is the first sweep that asked for its job. What is mirrored already is found by the
    fingerprint and the results folder that every run is tagged with, so mirroring twice changes nothing and
    nobody touches the runs of another folder.

    Raises:
        ModuleNotFoundError: If MLflow is not installed.
    """

    def __init__(self, uri: str, experiment: str, store: RecordStore) -> None:
        # A sweep may run where the network hangs instead of refusing: no telemetry, and no minutes of retrying.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow.tracking import MlflowClient

        self._store, self._client = store, MlflowClient(tracking_uri=_absolute(uri))
        found = self._client.get_experiment_by_name(experiment)
        if found is not None:
            self._experiment = found.experiment_id
        else:
            # Only a local database needs to be told where artefacts go; a server has its own place.
            local = (
                (store.root / "mlflow-artifacts").resolve().as_uri() if uri.startswith("sqlite:") else None
            )
            self._experiment = self._client.create_experiment(experiment, artifact_location=local)
        self._sweep_of: dict[str, str] = {}
        for sweep, about in store.sweeps().items():
            self._sweep_of = dict.fromkeys(about["jobs"], sweep) | self._sweep_of
        self._parents = self._tagged("qbench.sweep_parent")
        self._children = self._tagged("qbench.fingerprint")

    def _tagged(self, tag: str) -> dict[str, tuple[str, str]]:
        """Value of `tag` -> (run id, when the record that it shows was finished)."""
        found: dict[str, tuple[str, str]] = {}
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self._experiment],
                f"tags.`{tag}` != '' and tags.`qbench.store` = '{self._store.id}'",
                max_results=1000,
                page_token=token,
            )
            for run in page:
                tags = run.data.tags
                if run.info.status == "RUNNING" and tag == "qbench.fingerprint":
                    self._client.delete_run(run.info.run_id)  # cut off in the middle of an earlier mirroring
                else:
                    found[tags[tag]] = (run.info.run_id, tags.get("qbench.finished", ""))
            token = page.token
            if not token:
                return found

    def mirror(self, record: Record) -> bool:
        """Copy one record unless it is there; says whether it was copied."""
        fingerprint, finished = record["fingerprint"], record["finished"]
        if fingerprint in self._children:
            run_id, mirrored = self._children[fingerprint]
            if mirrored == finished:
                return False
            self._client.delete_run(run_id)  # the job has been run again since
        run_id = self._create(record)
        self._log(run_id, record)
        self._client.set_terminated(
            run_id, "FINISHED" if record["status"] == "done" else "FAILED", end_time=_milliseconds(finished)
        )
        self._children[fingerprint] = (run_id, finished)
        return True

    def close(self) -> None:
        """Mark the sweeps' parent runs as finished."""
        for run_id, _ in self._parents.values():
            self._client.set_terminated(run_id, "FINISHED")

    def _create(self, record: Record) -> str:
        labels, environment = record["labels"], record["environment"]
        tags = {f"version.{name}": value for name, value in environment["versions"].items()}
        tags |= {
            "qbench.fingerprint": record["fingerprint"],
            "qbench.finished": record["finished"],
            "qbench.store": self._store.id,
            "git_commit": environment["git_commit"] or "unknown",
            "mlflow.source.name": environment["command"],
        }
        if record["status"] == "failed":
            tags["qbench.reason"] = record["reason"]
        if sweep := self._sweep_of.get(record["fingerprint"]):
            tags |= {"qbench.sweep": sweep, "mlflow.parentRunId": self._parent(sweep)}
        name = " ".join(str(labels[key]) for key in ("model", "algo", "scheme"))
        return self._client.create_run(
            self._experiment, start_time=_milliseconds(record["started"]), tags=tags, run_name=name
        ).info.run_id

    def _parent(self, sweep: str) -> str:
        if sweep not in self._parents:
            about = self._store.sweeps()[sweep]
            tags = {
                "qbench.sweep_parent": sweep,
                "qbench.store": self._store.id,
                "mlflow.source.name": about["command"],
            }
            run = self._client.create_run(
                self._experiment, start_time=int(about["started"] * 1000), tags=tags,
                run_name=f"sweep {sweep} ({len(about['jobs'])} jobs)",
            )  # fmt: skip
            self._parents[sweep] = (run.info.run_id, "")
        return self._parents[sweep][0]

    def _log(self, run_id: str, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

        at = _milliseconds(record["finished"])
        metrics = [Metric(name, value, at, 0) for name, value in record["metrics"].items()]
        metrics += [Metric("block_error", e, at, i) for i, e in enumerate(record.get("block_errors", []))]
        described = record["config"] | {f"label.{key}": value for key, value in record["labels"].items()}
        params = [Param(key, str(value)[:6000]) for key, value in flatten(described).items()]
        for start in range(0, max(len(metrics), len(params)), 100):  # the most that one call takes
            self._client.log_batch(run_id, metrics[start : start + 100], params[start : start + 100])
        inputs = [
            DatasetInput(
                Dataset(name.split("/", 1)[1], about["sha256"][:16], "local", json.dumps(about)),
                [InputTag("mlflow.data.context", name.split("/", 1)[0])],
            )
            for name, about in record.get("data", {}).items()
        ]
        if inputs:
            self._client.log_inputs(run_id, datasets=inputs)
        self._client.log_artifacts(run_id, str(self._store.path(record["fingerprint"])))


def _absolute(uri: str) -> str:
    """A local database by its full path: MLflow keeps connections by URI, whatever the working folder is by then."""
    prefix = "sqlite:///"
    return prefix + str(Path(uri.removeprefix(prefix)).resolve()) if uri.startswith(prefix) else uri


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


def _milliseconds(iso: str) -> int:
    from datetime import datetime

    return int(datetime.fromisoformat(iso).timestamp() * 1000)
