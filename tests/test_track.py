"""Records, and their mirror in MLflow."""

import json
import os
import time

import pytest

from qbench.track.mirror import MLflowMirror
from qbench.track.records import RecordStore, flatten

RECORD = {
    "fingerprint": "0123456789abcdef",
    "status": "done",
    "labels": {"model": "m", "algo": "gptq", "scheme": "w4a16g128"},
    "identity": {"model": {"id": "m"}},
    "config": {"algo": {"steps": {"round": {"damp": 0.01}}}, "wbits": 4},
    "environment": {"versions": {"torch": "2.13.0"}, "git_commit": "abc", "command": "qbench -m"},
    "metrics": {"ppl/stdlib_docs": 12.5, "ppl/stdlib_docs_stderr": 0.1, "calib_time_s": 1.0},
    "block_errors": [0.1, 0.2, 0.3],
    "data": {"eval/stdlib_docs": {"origin": "here", "sha256": "f" * 64}},
    "started": "2026-01-01T00:00:00+00:00",
    "finished": "2026-01-01T00:00:09+00:00",
}
SAMPLES = [{"metric": "ppl/stdlib_docs", "item": i, "value": 2.5 + i} for i in range(4)]


@pytest.fixture
def store(tmp_path):
    store = RecordStore(tmp_path / "results")
    store.prepare()
    return store


def test_a_record_comes_back_as_it_was_written(store):
    import pyarrow.parquet as pq

    folder = store.write(RECORD, SAMPLES)
    assert store.read(RECORD["fingerprint"]) == RECORD
    assert pq.read_table(folder / "samples.parquet").to_pylist() == SAMPLES
    assert list(store.all()) == [RECORD]


def test_a_second_run_takes_the_place_of_the_first(store):
    store.write(RECORD | {"status": "failed", "metrics": {}}, [])
    assert not store.is_done(RECORD["fingerprint"])
    store.write(RECORD, SAMPLES)
    assert store.is_done(RECORD["fingerprint"])
    assert [p.name for p in store.records.iterdir()] == [RECORD["fingerprint"]]


def test_a_record_that_cannot_be_written_leaves_nothing(store):
    with pytest.raises(ValueError, match="JSON compliant"):
        store.write(RECORD | {"metrics": {"ppl/x": float("nan")}}, SAMPLES)
    assert not list(store.all())
    assert not store.is_done(RECORD["fingerprint"])


def test_what_killed_jobs_left_is_swept_up_once_it_is_old(store):
    old, young = store.records / ".tmp-a-1", store.records / ".tmp-b-2"
    old.mkdir()
    young.mkdir()
    os.utime(old, (time.time() - 10_000,) * 2)
    store.prepare()
    assert not old.exists()
    assert young.exists()
    assert not list(store.all())


def test_a_results_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "results").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        RecordStore(tmp_path / "results").prepare()


def test_the_same_jobs_are_the_same_sweep(store):
    first = store.open_sweep("qbench -m a", ["f1", "f2"])
    assert store.open_sweep("qbench -m b", ["f2", "f1"]) == first
    assert store.open_sweep("qbench -m a", ["f1"]) != first
    assert store.sweeps()[first]["command"] == "qbench -m a"


def test_flatten_names_every_leaf():
    assert flatten({"a": {"b": 1}, "c": [2, {"d": None}]}) == {"a.b": 1, "c.0": 2, "c.1.d": None}


def runs_of(uri):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("qbench")
    return client, client.search_runs([experiment.experiment_id])


def test_the_mirror_holds_parent_and_child_once(store, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    store.open_sweep("qbench -m algo=gptq", [RECORD["fingerprint"]])
    store.write(RECORD, SAMPLES)

    mirror = MLflowMirror(uri, "qbench", store)
    assert mirror.mirror(RECORD)
    assert not mirror.mirror(RECORD)
    mirror.close()
    assert not MLflowMirror(uri, "qbench", store).mirror(RECORD), "a new process finds what is there"

    client, runs = runs_of(uri)
    parent = next(r for r in runs if "qbench.sweep_parent" in r.data.tags)
    (child,) = (r for r in runs if "qbench.fingerprint" in r.data.tags)
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.metrics["ppl/stdlib_docs"] == 12.5
    assert child.data.params["algo.steps.round.damp"] == "0.01"
    assert [m.value for m in client.get_metric_history(child.info.run_id, "block_error")] == [0.1, 0.2, 0.3]
    assert child.inputs.dataset_inputs[0].dataset.name == "stdlib_docs"
    assert {a.path for a in client.list_artifacts(child.info.run_id)} == {"record.json", "samples.parquet"}
    assert (child.info.end_time - child.info.start_time) == 9000


def test_a_job_that_was_run_again_replaces_its_run(store, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    store.write(RECORD, SAMPLES)
    MLflowMirror(uri, "qbench", store).mirror(RECORD)
    again = RECORD | {"finished": "2026-01-02T00:00:00+00:00", "metrics": {"ppl/stdlib_docs": 11.0}}
    store.write(again, SAMPLES)
    assert MLflowMirror(uri, "qbench", store).mirror(again)
    _, runs = runs_of(uri)
    assert [r.data.metrics["ppl/stdlib_docs"] for r in runs] == [11.0]


def test_nobody_touches_the_runs_of_another_results_folder(store, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    other = RecordStore(tmp_path / "other")
    other.prepare()
    assert other.id != store.id
    assert RecordStore(store.root).id == store.id
    for where, ppl in ((store, 12.5), (other, 13.5)):
        record = RECORD | {"finished": f"2026-01-0{int(ppl) - 11}T00:00:09+00:00", "metrics": {"ppl/x": ppl}}
        where.write(record, [])
        MLflowMirror(uri, "qbench", where).mirror(record)
    _, runs = runs_of(uri)
    assert sorted(r.data.metrics["ppl/x"] for r in runs) == [12.5, 13.5]


def test_a_run_cut_off_in_the_middle_is_made_again(store, tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    store.write(RECORD, SAMPLES)
    mirror = MLflowMirror(uri, "qbench", store)
    with monkeypatch.context() as patch:
        patch.setattr(mirror, "_log", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mirror.mirror(RECORD)
    assert [r.info.status for r in runs_of(uri)[1]] == ["RUNNING"]
    assert MLflowMirror(uri, "qbench", store).mirror(RECORD)
    assert [r.info.status for r in runs_of(uri)[1]] == ["FINISHED"]


def test_a_failed_job_is_mirrored_as_failed(store, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    record = RECORD | {"status": "failed", "reason": "ValueError: no", "metrics": {}, "block_errors": []}
    store.write(record, [])
    MLflowMirror(uri, "qbench", store).mirror(record)
    _, runs = runs_of(uri)
    assert [r.info.status for r in runs] == ["FAILED"]
    assert runs[0].data.tags["qbench.reason"] == "ValueError: no"
    assert (
        json.loads((store.path(record["fingerprint"]) / "record.json").read_text())["reason"]
        == "ValueError: no"
    )
