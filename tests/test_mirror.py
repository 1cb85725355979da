"""The mirror of records in MLflow, and the marks of what it holds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from qbench.track.mirror import Marks, MLflowMirror
from qbench.track.records import RecordStore

from .test_track import RECORD, SAMPLES

NAME = "qbench"


@pytest.fixture
def store(tmp_path):
    store = RecordStore(tmp_path / "results")
    store.prepare()
    store.write(RECORD, SAMPLES)
    return store


@pytest.fixture
def searches(monkeypatch):
    """The queries that MLflow was asked to search for."""
    asked, search = [], MlflowClient.search_runs

    def listening(self, experiments, query, **kwargs):
        asked.append(query)
        return search(self, experiments, query, **kwargs)

    monkeypatch.setattr(MlflowClient, "search_runs", listening)
    return asked


def client_and_runs(uri):
    client = MlflowClient(tracking_uri=uri)
    return client, list(client.search_runs([client.get_experiment_by_name(NAME).experiment_id], ""))


def runs_of(uri):
    return client_and_runs(uri)[1]


def others(n):
    """More records, all finished at the same time."""
    return [RECORD | {"fingerprint": f"{i:016x}"} for i in range(n)]


def test_the_mirror_holds_parent_and_child_once(store, uri):
    store.open_sweep("qbench -m algo=gptq", [RECORD["fingerprint"]])
    mirror = MLflowMirror(uri, NAME, store)
    assert mirror.mirror(RECORD)
    assert not mirror.mirror(RECORD)
    mirror.close()
    assert not MLflowMirror(uri, NAME, store).mirror(RECORD), "a new process finds what is there"

    client, runs = client_and_runs(uri)
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


def test_names_that_mlflow_refuses_are_written_out(store, uri):
    record = RECORD | {
        "metrics": {"pass@1/mbpp": 0.5},
        "config": {"data": {"files": {"c4/train*": "a.jsonl"}}},
    }
    mirror = MLflowMirror(uri, NAME, store)
    assert mirror.mirror(record)
    mirror.close()
    (run,) = (r for r in runs_of(uri) if "qbench.fingerprint" in r.data.tags)
    assert run.data.metrics["pass_at_1/mbpp"] == 0.5
    assert run.data.params["data.files.c4/train_"] == "a.jsonl"


def test_a_job_that_was_run_again_replaces_its_run(store, uri, searches):
    MLflowMirror(uri, NAME, store).mirror(RECORD)
    again = RECORD | {"finished": "2026-01-02T00:00:00+00:00", "metrics": {"ppl/stdlib_docs": 11.0}}
    store.write(again, SAMPLES)
    mirror = MLflowMirror(uri, NAME, store)
    searches.clear()
    assert mirror.mirror(again)
    assert not searches, "the mark says which run it was"
    assert [r.data.metrics["ppl/stdlib_docs"] for r in runs_of(uri)] == [11.0]


def test_nobody_touches_the_runs_of_another_results_folder(store, uri, tmp_path):
    other = RecordStore(tmp_path / "other")
    other.prepare()
    assert other.id != store.id
    assert RecordStore(store.root).id == store.id
    for where, ppl in ((store, 12.5), (other, 13.5)):
        record = RECORD | {"finished": f"2026-01-0{int(ppl) - 11}T00:00:09+00:00", "metrics": {"ppl/x": ppl}}
        where.write(record, [])
        MLflowMirror(uri, NAME, where).mirror(record)
    assert sorted(r.data.metrics["ppl/x"] for r in runs_of(uri)) == [12.5, 13.5]
    shutil.rmtree(store.root / "mirrored")
    MLflowMirror(uri, NAME, store)
    assert sorted(r.data.metrics["ppl/x"] for r in runs_of(uri)) == [12.5, 13.5]


def test_a_failed_job_is_mirrored_as_failed(store, uri):
    record = RECORD | {"status": "failed", "reason": "ValueError: no", "metrics": {}, "block_errors": []}
    store.write(record, [])
    MLflowMirror(uri, NAME, store).mirror(record)
    (run,) = runs_of(uri)
    assert run.info.status == "FAILED"
    assert run.data.tags["qbench.reason"] == "ValueError: no"
    artefact = Path(run.info.artifact_uri.removeprefix("file://")) / "record.json"
    assert json.loads(artefact.read_text())["reason"] == "ValueError: no"


@pytest.mark.parametrize("step", ["_create", "_log", "_copy_files"])
@pytest.mark.parametrize("lose_the_marks", [False, True])
def test_a_run_cut_off_in_the_middle_is_made_again(step, lose_the_marks, store, uri, monkeypatch):
    mirror, (other,) = MLflowMirror(uri, NAME, store), others(1)
    store.write(other, [])
    mirror.mirror(other)
    with monkeypatch.context() as patch:
        patch.setattr(mirror, step, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mirror.mirror(RECORD)
    assert not mirror.marks.has(RECORD)
    if lose_the_marks:
        shutil.rmtree(mirror.marks.folder)
    mirror = MLflowMirror(uri, NAME, store)
    assert mirror.mirror(RECORD)
    assert not mirror.mirror(other)
    runs = runs_of(uri)
    assert [r.info.status for r in runs] == ["FINISHED"] * 2
    assert {r.data.tags["qbench.fingerprint"] for r in runs} == {r["fingerprint"] for r in (RECORD, other)}


@pytest.mark.parametrize("text", ["pending\n", "", "\0" * 60])
def test_a_whole_run_whose_mark_was_cut_off_is_there_once(text, store, uri):
    mirror = MLflowMirror(uri, NAME, store)
    mirror.mirror(RECORD)
    (mirror.marks.folder / RECORD["fingerprint"]).write_text(text)
    assert mirror.mirror(RECORD)
    assert [r.info.status for r in runs_of(uri)] == ["FINISHED"]
    assert mirror.marks.has(RECORD)


@pytest.mark.parametrize("text", ["pending\n", "", "\0" * 60])
def test_a_parent_whose_mark_was_cut_off_is_taken_up(text, store, uri):
    records = others(2)
    sweep = store.open_sweep("qbench -m", [r["fingerprint"] for r in records])
    for record in records:
        store.write(record, [])
        mirror = MLflowMirror(uri, NAME, store)
        mirror.mirror(record)
        (mirror.marks.folder / f"sweep-{sweep}").write_text(text)
    mirror.close()
    (parent,) = (r for r in runs_of(uri) if "qbench.sweep_parent" in r.data.tags)
    assert parent.info.status == "FINISHED"


def test_a_sweep_killed_while_its_parent_was_made_has_one_parent(store, uri, monkeypatch):
    store.open_sweep("qbench -m", [RECORD["fingerprint"]])
    mirror = MLflowMirror(uri, NAME, store)
    with monkeypatch.context() as patch:
        patch.setattr(Marks, "end", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mirror.mirror(RECORD)
    assert len(runs_of(uri)) == 1
    mirror = MLflowMirror(uri, NAME, store)
    mirror.mirror(RECORD)
    mirror.close()
    assert [r.info.status for r in runs_of(uri)] == ["FINISHED"] * 2


def test_neither_opening_nor_copying_searches_once_there_are_marks(store, uri, searches):
    mirror = MLflowMirror(uri, NAME, store)
    searches.clear()
    for record in others(3):
        store.write(record, [])
        assert mirror.mirror(record)
        assert not MLflowMirror(uri, NAME, store).mirror(record)
    assert not searches


def test_asking_the_marks_does_not_import_mlflow(store, uri):
    code = (
        "import sys, json; from pathlib import Path; from qbench.track.mirror import Marks, MLflowMirror\n"
        "from qbench.track.records import RecordStore\n"
        "marks = Marks(RecordStore(Path(sys.argv[1])), sys.argv[2], 'qbench')\n"
        "print(marks.has(json.loads(sys.argv[3])), 'mlflow' in sys.modules)"
    )
    command = [sys.executable, "-c", code, store.root, uri, json.dumps(RECORD)]
    assert subprocess.check_output(command, text=True).split() == ["False", "False"]
    MLflowMirror(uri, NAME, store).mirror(RECORD)
    assert subprocess.check_output(command, text=True).split() == ["True", "False"]


def test_marks_that_were_lost_are_made_anew_from_the_runs(store, uri, monkeypatch):
    records = others(5)
    store.open_sweep("qbench -m", [r["fingerprint"] for r in records])
    mirror = MLflowMirror(uri, NAME, store)
    for record in records:
        store.write(record, [])
        mirror.mirror(record)
    mirror.close()
    before = {p.name: p.read_text() for p in mirror.marks.folder.iterdir()}
    client, runs = client_and_runs(uri)
    half_made = client.create_run(runs[0].info.experiment_id, tags={"qbench.store": store.id}).info.run_id
    shutil.rmtree(store.root / "mirrored")

    search = MlflowClient.search_runs  # pages of two: what is deleted in one must not hide the next
    paged = lambda *a, **k: search(*a, **k | {"max_results": 2})  # noqa: E731
    monkeypatch.setattr(MlflowClient, "search_runs", paged)
    MLflowMirror(uri, NAME, store)
    assert {p.name: p.read_text() for p in mirror.marks.folder.iterdir()} == before
    assert client.get_run(half_made).info.lifecycle_stage == "deleted"


def test_marks_that_were_half_made_are_made_again(store, uri, monkeypatch):
    MLflowMirror(uri, NAME, store).mirror(RECORD)
    shutil.rmtree(store.root / "mirrored")
    with monkeypatch.context() as patch:
        patch.setattr(Marks, "end", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            MLflowMirror(uri, NAME, store)
    assert not MLflowMirror(uri, NAME, store).mirror(RECORD)


def test_marks_of_an_experiment_that_was_lost_are_void(store, uri):
    store.open_sweep("qbench -m", [RECORD["fingerprint"]])
    mirror = MLflowMirror(uri, NAME, store)
    mirror.mirror(RECORD)
    client, runs = client_and_runs(uri)
    client.rename_experiment(runs[0].info.experiment_id, "elsewhere")
    mirror = MLflowMirror(uri, NAME, store)
    assert not mirror.marks.has(RECORD)
    assert mirror.mirror(RECORD)
    assert len(runs_of(uri)) == len(runs)


def test_trackers_have_marks_of_their_own(store, uri):
    MLflowMirror(uri, NAME, store).mirror(RECORD)
    assert Marks(store, uri, NAME).has(RECORD)
    assert not Marks(store, uri, "another").has(RECORD)
    assert not Marks(store, "http://localhost:5000", NAME).has(RECORD)


def test_marks_do_not_depend_on_how_the_paths_are_spelled(store, uri, tmp_path, monkeypatch):
    MLflowMirror(uri, NAME, store).mirror(RECORD)
    monkeypatch.chdir(store.root)
    assert Marks(RecordStore(Path("../results")), "sqlite:///../mlflow.db", NAME).has(RECORD)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("results", "mlflow.db"):
        os.rename(tmp_path / name, moved / name)
    assert Marks(RecordStore(moved / "results"), f"sqlite:///{moved}/mlflow.db", NAME).has(RECORD)


def test_parents_of_killed_sweeps_are_ended_by_whoever_closes_next(store, uri):
    records = others(2)
    for record in records:
        store.write(record, [])
        store.open_sweep("qbench -m", [record["fingerprint"]])
    MLflowMirror(uri, NAME, store).mirror(records[0])
    mirror = MLflowMirror(uri, NAME, store)
    mirror.mirror(records[1])
    assert [r.info.status for r in runs_of(uri)].count("RUNNING") == 2
    mirror.close()
    assert {r.info.status for r in runs_of(uri)} == {"FINISHED"}


def test_closing_leaves_the_parents_that_nothing_was_added_to(store, uri):
    store.open_sweep("qbench -m", [RECORD["fingerprint"]])
    mirror = MLflowMirror(uri, NAME, store)
    mirror.mirror(RECORD)
    mirror.close()
    ended = {r.info.run_id: r.info.end_time for r in runs_of(uri)}
    mirror = MLflowMirror(uri, NAME, store)
    mirror.mirror(RECORD)
    mirror.close()
    assert {r.info.run_id: r.info.end_time for r in runs_of(uri)} == ended


def test_what_was_deleted_by_hand_stops_nobody(store, uri):
    records = others(2)
    store.open_sweep("qbench -m", [r["fingerprint"] for r in records])
    mirror = MLflowMirror(uri, NAME, store)
    store.write(records[0], [])
    mirror.mirror(records[0])
    client, runs = client_and_runs(uri)
    for run in runs:
        client.delete_run(run.info.run_id)
    mirror.close()

    mirror = MLflowMirror(uri, NAME, store)
    for record in (records[0] | {"finished": "2026-01-02T00:00:00+00:00"}, records[1]):
        store.write(record, [])
        assert mirror.mirror(record)
    mirror.close()
    runs = runs_of(uri)
    assert [r.info.status for r in runs] == ["FINISHED"] * 3
    (parent,) = (r.info.run_id for r in runs if "qbench.sweep_parent" in r.data.tags)
    assert {r.data.tags.get("mlflow.parentRunId", parent) for r in runs} == {parent}


def test_a_record_may_exceed_what_one_call_takes(store, uri):
    record = RECORD | {
        "config": {f"key{i}": i for i in range(250)},
        "metrics": {f"acc/task_{i}": i / 2 for i in range(1200)},
    }
    store.write(record, [])
    MLflowMirror(uri, NAME, store).mirror(record)
    (run,) = runs_of(uri)
    assert run.data.metrics == record["metrics"] | {"block_error": 0.3}
    assert run.data.params.items() >= {f"key{i}": str(i) for i in range(250)}.items()


def test_system_samples_keep_their_times(store, uri):
    samples = [{"t": 1_767_225_600_000 + 1000 * i, "cpu_percent": 10.0 * i, "ram_mb": 5.0} for i in range(3)]
    record = RECORD | {"system": samples}
    store.write(record, [])
    MLflowMirror(uri, NAME, store).mirror(record)
    client, (run,) = client_and_runs(uri)
    history = client.get_metric_history(run.info.run_id, "system/cpu_percent")
    assert [(m.timestamp, m.value) for m in history] == [(s["t"], s["cpu_percent"]) for s in samples]
    assert "system/t" not in run.data.metrics


def test_a_record_does_not_change_with_its_artefact(store, uri, tmp_path):
    MLflowMirror(uri, NAME, store).mirror(RECORD)
    client, (run,) = client_and_runs(uri)
    (tmp_path / "note").mkdir()
    (tmp_path / "note" / "record.json").write_text("something else")
    client.log_artifacts(run.info.run_id, str(tmp_path / "note"))
    assert store.read(RECORD["fingerprint"]) == RECORD


def test_artefacts_go_wherever_the_experiment_keeps_them(store, uri, monkeypatch):
    sent = []
    monkeypatch.setattr(
        MlflowClient, "log_artifacts", lambda self, run_id, folder: sent.append((run_id, folder))
    )
    MlflowClient(tracking_uri=uri).create_experiment(NAME, artifact_location="s3://bucket/somewhere")
    MLflowMirror(uri, NAME, store).mirror(RECORD)
    (run,) = runs_of(uri)
    assert sent == [(run.info.run_id, str(store.path(RECORD["fingerprint"])))]
