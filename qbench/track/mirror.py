"""The mirror of the records in MLflow; it can be made anew at any time."""

import json
import os
from pathlib import Path

from qbench.track.records import Record, RecordStore, flatten


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


def _milliseconds(iso: str) -> int:
    from datetime import datetime

    return int(datetime.fromisoformat(iso).timestamp() * 1000)
