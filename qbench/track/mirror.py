"""The mirror of the records in MLflow, and the marks that say what it holds; both can be made anew at any time."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from qbench.track.records import Record, RecordStore, flatten


@dataclass(frozen=True)
class Marks:
    """What a tracker holds: a small file for each run, so that MLflow, whose searches take seconds, is not asked.

    A record's mark is named by its fingerprint and reads `<when it was finished> <run id>`; a sweep's parent run is
    marked as `sweep-<id>`, `RUNNING <run id>` or `FINISHED <run id>`. Any other text, such as the `pending` that is
    written first, is an attempt that was cut off; without a mark nothing was ever tried. A run that was deleted by hand
    stays marked: delete `results/mirrored` to have it again.
    """

    store: RecordStore
    uri: str
    experiment: str

    @cached_property
    def folder(self) -> Path:
        # A local database is known by its place relative to the results: however its path is spelled, and
        # wherever both are moved to, it is the same tracker.
        path = database_of(self.uri)
        where = os.path.relpath(path, self.store.root.resolve()) if path else self.uri.rstrip("/")
        tracker = hashlib.sha256(f"{where} {self.experiment}".encode()).hexdigest()[:12]
        return self.store.root / "mirrored" / tracker

    def has(self, record: Record) -> bool:
        """Whether the tracker holds this very record; asked of the marks alone, without importing MLflow."""
        return (self.read(record["fingerprint"]) or ("", ""))[0] == record["finished"]

    def read(self, name: str) -> tuple[str, str] | None:
        """State and run id; both empty if the attempt was cut off, `None` if there was none."""
        try:
            words = (self.folder / name).read_text().split()
        except FileNotFoundError:
            return None
        return (words[0], words[1]) if len(words) == 2 else ("", "")

    def begin(self, name: str) -> None:
        (self.folder / name).write_text("pending\n")

    def end(self, name: str, state: str, run_id: str) -> None:
        draft = self.folder / f".{name}.{os.getpid()}"
        draft.write_text(f"{state} {run_id}\n")
        draft.replace(self.folder / name)

    def made_for(self, experiment: str) -> bool:
        """Whether the marks are this experiment's and not those of a namesake in a database since lost."""
        return (path := self.folder / "experiment").is_file() and path.read_text() == experiment

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)  # raises if it could not be removed


class MLflowMirror:
    """Copies records to MLflow: a parent run for each sweep, a child for each record.

    A child's parent is the first sweep that asked for its job. What is mirrored already is known from the marks, so
    mirroring twice changes nothing; marks that are missing, or another experiment's, are made anew by searching once.
    Every run is tagged with its results folder, and nobody touches the runs of another.

    Raises:
        ModuleNotFoundError: If MLflow is not installed.
    """

    def __init__(self, uri: str, experiment: str, store: RecordStore) -> None:
        self._client = connect(uri)
        self._store, self.marks = store, Marks(store, uri, experiment)
        # Only a local database needs to be told where artefacts go; a server has its own place.
        local = (store.root / "mlflow-artifacts").resolve().as_uri() if database_of(uri) else None
        found = self._client.get_experiment_by_name(experiment) or self._client.get_experiment(
            self._client.create_experiment(experiment, artifact_location=local)
        )
        self._experiment: str = found.experiment_id
        self._sweeps = store.sweeps()
        self._sweep_of: dict[str, str] = {}
        for sweep, about in reversed(self._sweeps.items()):
            self._sweep_of |= dict.fromkeys(about["jobs"], sweep)
        self._parents: dict[str, str] = {}  # run ids by sweep, of those that children were added to
        if not self.marks.made_for(identity := f"{self._experiment} {found.creation_time}\n"):
            self._make_marks(identity)

    def mirror(self, record: Record) -> bool:
        """Copy one record unless it is there; says whether it was copied."""
        if self.marks.has(record):
            return False
        fingerprint = record["fingerprint"]
        left = self._left(fingerprint, "qbench.fingerprint", fingerprint)
        self.marks.begin(fingerprint)
        for run_id in left:
            self._client.delete_run(run_id)
        run = self._create(record)
        self._log(run.info.run_id, record)
        self._copy_files(run, self._store.path(fingerprint))
        status = "FINISHED" if record["status"] == "done" else "FAILED"
        self._client.set_terminated(run.info.run_id, status, end_time=_milliseconds(record["finished"]))
        self.marks.end(fingerprint, record["finished"], run.info.run_id)
        return True

    def close(self) -> None:
        """Mark as finished the parent runs that children were added to, and those that a killed process left."""
        marks = {sweep: self.marks.read(f"sweep-{sweep}") for sweep in self._sweeps}
        running = {sweep: mark[1] for sweep, mark in marks.items() if mark and mark[0] == "RUNNING"}
        for sweep, run_id in (running | self._parents).items():
            if self._is_alive(run_id):
                self._client.set_terminated(run_id, "FINISHED")
            self.marks.end(f"sweep-{sweep}", "FINISHED", run_id)

    def _make_marks(self, experiment: str) -> None:
        self.marks.clear()
        half_made = []
        for run in self._runs():
            run_id, status, tags = run.info.run_id, run.info.status, run.data.tags
            if sweep := tags.get("qbench.sweep_parent"):
                self.marks.end(f"sweep-{sweep}", status, run_id)
            elif status == "RUNNING":
                half_made.append(run_id)
            elif "qbench.fingerprint" in tags:
                self.marks.end(tags["qbench.fingerprint"], tags["qbench.finished"], run_id)
        for run_id in half_made:  # not before: pages are counted by offset, and would skip as many runs
            self._client.delete_run(run_id)
        (self.marks.folder / "experiment").write_text(experiment)  # last: what is cut off here is done again

    def _runs(self, condition: str = "") -> Iterator[Any]:
        """The runs of this results folder, by pages."""
        query, token = f"tags.`qbench.store` = '{self._store.id}'{condition}", None
        while True:
            page = self._client.search_runs([self._experiment], query, max_results=1000, page_token=token)
            yield from page
            if not (token := page.token):
                return

    def _left(self, name: str, tag: str, value: str) -> list[str]:
        """The runs that earlier attempts left, whole or not."""
        mark = self.marks.read(name)
        if mark is None or mark[1]:
            return [mark[1]] if mark and self._is_alive(mark[1]) else []
        return [run.info.run_id for run in self._runs(f" and tags.`{tag}` = '{value}'")]

    def _is_alive(self, run_id: str) -> bool:
        """Whether a run is still there: anyone may have deleted it."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _create(self, record: Record) -> Any:
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
        at = _milliseconds(record["started"])
        return self._client.create_run(self._experiment, start_time=at, tags=tags, run_name=name)

    def _parent(self, sweep: str) -> str:
        if sweep not in self._parents:
            left = self._left(f"sweep-{sweep}", "qbench.sweep_parent", sweep)
            self._parents[sweep] = left[0] if left else self._create_parent(sweep)
        return self._parents[sweep]

    def _create_parent(self, sweep: str) -> str:
        about = self._sweeps[sweep]
        tags = {"qbench.sweep_parent": sweep, "qbench.store": self._store.id}
        tags["mlflow.source.name"] = about["command"]
        name = f"sweep {sweep} ({len(about['jobs'])} jobs)"
        at = int(about["started"] * 1000)
        self.marks.begin(f"sweep-{sweep}")
        run = self._client.create_run(self._experiment, start_time=at, tags=tags, run_name=name)
        self.marks.end(f"sweep-{sweep}", "RUNNING", run.info.run_id)
        return str(run.info.run_id)

    def _log(self, run_id: str, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

        at = _milliseconds(record["finished"])
        metrics = [Metric(_allowed(name), value, at, 0) for name, value in record["metrics"].items()]
        metrics += [Metric("block_error", e, at, i) for i, e in enumerate(record.get("block_errors", []))]
        for i, sample in enumerate(record.get("system", [])):
            metrics += [Metric(f"system/{k}", v, sample["t"], i) for k, v in sample.items() if k != "t"]
        described = record["config"] | {f"label.{key}": value for key, value in record["labels"].items()}
        params = [Param(_allowed(key), str(value)[:6000]) for key, value in flatten(described).items()]
        self._client.log_batch(run_id, metrics, params)  # it splits what exceeds MLflow's limits
        inputs = []
        for role, about in record.get("data", {}).items():
            context, name = role.split("/", 1)
            dataset = Dataset(name, about["sha256"][:16], "local", json.dumps(about))
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
        if inputs:
            self._client.log_inputs(run_id, datasets=inputs)

    def _copy_files(self, run: Any, folder: Path) -> None:
        if local := local_folder(run.info.artifact_uri):
            # What log_artifacts does, without asking for the run again (a seventh of the time). Not a hard link:
            # log_artifacts overwrites files in place, and the record must not change with them.
            shutil.copytree(folder, local, dirs_exist_ok=True)
        else:
            self._client.log_artifacts(run.info.run_id, str(folder))


def connect(uri: str) -> Any:
    """MLflow's client of a tracking server or database.

    Raises:
        ModuleNotFoundError: If MLflow is not installed.
    """
    # A sweep may run where the network hangs instead of refusing: no telemetry, and no minutes of retrying.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    # A server would be asked for each run once more, to print its address.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one for each of many runs
    from mlflow.tracking import MlflowClient

    # MLflow keeps connections by URI, whatever the working folder is by then: the full path.
    database = database_of(uri)
    return MlflowClient(tracking_uri=f"sqlite:///{database}" if database else uri)


def database_of(uri: str) -> Path | None:
    """The file of a local database."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).resolve() if uri.startswith(prefix) else None


def local_folder(artifact_uri: str) -> Path | None:
    """Where a run's artefacts lie on this machine; `None` if they are elsewhere."""
    where = urlsplit(artifact_uri)
    path = Path(url2pathname(where.path))
    return path if where.scheme in ("", "file") and not where.netloc and path.is_absolute() else None


def _milliseconds(iso: str) -> int:
    return int(datetime.fromisoformat(iso).timestamp() * 1000)


def _allowed(name: str) -> str:
    """A metric's name with what MLflow refuses written out: `pass@1/mbpp` -> `pass_at_1/mbpp`."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"), flags=re.ASCII)
