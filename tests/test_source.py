"""Records and samples are the same, whether they are read from the results folder or from its mirror in MLflow."""

import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from qbench.errors import UsageError
from qbench.track import source as module
from qbench.track.mirror import Marks, MLflowMirror
from qbench.track.records import RecordStore
from qbench.track.source import MLflowSource, link_to_copy, source_of

from .test_track import RECORD, SAMPLES

NAME = "qbench"
COLUMNS = ["fingerprint", "metric", "item", "value", "part"]
PARTS = [{"metric": "acc/mmlu", "item": i, "value": 1.0, "part": f"subject {i % 2}"} for i in range(3)]


def record(name, began="2026-01-01T00:00:00+00:00", **changes):
    return RECORD | {"fingerprint": name * 16, "started": began} | changes


RECORDS = {
    "a": (record("a", "2026-01-03T00:00:00+00:00", metrics={"ppl/x": 0.1 + 0.2}), SAMPLES),
    "b": (record("b", "2026-01-02T00:00:00+00:00"), PARTS + SAMPLES),
    "c": (record("c", status="failed", reason="ValueError: no", metrics={}, block_errors=[]), []),
    "d": (record("d", metrics={"Größe/λ": 1e-300}), [{"metric": "acc/y", "item": 7, "value": 0.0}]),
}


def fill(root: Path, uri: str, records) -> RecordStore:
    """A results folder with these records, all mirrored as a sweep's."""
    store = RecordStore(root)
    store.prepare()
    store.open_sweep("qbench -m", [found["fingerprint"] for found, _ in records])
    mirror = MLflowMirror(uri, NAME, store)
    for found, samples in records:
        store.write(found, samples)
        mirror.mirror(found)
    mirror.close()
    return store


@pytest.fixture
def store(tmp_path, uri):
    return fill(tmp_path / "results", uri, RECORDS.values())


@pytest.fixture
def copies(store, uri):
    return source_of(store.root, uri, NAME)


def run_of(uri, fingerprint):
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(NAME).experiment_id
    return client.search_runs([experiment], f"tags.`qbench.fingerprint` = '{fingerprint}'")[0]


def test_both_sources_give_equal_records_and_samples_in_the_same_order(store, copies):
    names = [found["fingerprint"] for found in store.all()]
    assert names == ["c" * 16, "d" * 16, "b" * 16, "a" * 16]
    assert list(copies.all()) == list(store.all())
    asked = ["b" * 16, "no such job", "c" * 16, "a" * 16, "b" * 16]
    assert copies.sample_table(asked).equals(store.sample_table(asked))
    for name in [*names, "no such job"]:
        assert copies.samples(name) == store.samples(name)


def test_a_sample_table_has_all_samples_in_the_order_asked_for(store):
    table = store.sample_table(["d" * 16, "c" * 16, "b" * 16])
    expected = [
        {"fingerprint": name * 16, "part": None} | sample for name in "dcb" for sample in RECORDS[name][1]
    ]
    assert table.to_pylist() == expected
    assert table.column_names == COLUMNS


def test_a_table_of_no_samples_has_the_same_columns(store):
    for asked in ([], ["c" * 16]):
        assert store.sample_table(asked).schema == store.sample_table(["b" * 16]).schema


def test_of_one_job_in_several_results_folders_the_last_one_counts(tmp_path, uri):
    late = record("a", finished="2026-01-09T00:00:00.5+00:00", metrics={"ppl/x": 2.0})
    # As text this one would come last.
    early = record("a", finished="2026-01-09T01:00:00+02:00", metrics={"ppl/x": 1.0})
    fill(tmp_path / "late", uri, [(late, SAMPLES)])
    fill(tmp_path / "early", uri, [(early, [])])
    copies = source_of(tmp_path / "none", uri, NAME)
    assert list(copies.all()) == [late]
    assert copies.samples("a" * 16) == SAMPLES


def test_sweeps_and_deleted_and_half_made_runs_are_left_out(store, uri):
    client = MlflowClient(tracking_uri=uri)
    run = run_of(uri, "a" * 16)
    client.delete_run(run.info.run_id)
    tags = {"qbench.fingerprint": "e" * 16, "qbench.finished": "2026-01-01T00:00:00+00:00"}
    client.create_run(run.info.experiment_id, tags=tags)
    client.create_run(run.info.experiment_id, tags={"qbench.fingerprint": "f" * 16})
    names = [found["fingerprint"] for found in source_of(store.root, uri, NAME).all()]
    assert names == ["c" * 16, "d" * 16, "b" * 16]


def test_more_runs_than_a_page_holds_are_all_found(store, copies, monkeypatch):
    monkeypatch.setattr(module, "_PAGE", 2)
    assert list(copies.all()) == list(store.all())


def test_local_files_are_read_in_place(store, copies):
    list(copies.all())
    assert not copies.cache.exists()


def test_remote_files_are_fetched_once(store, uri, monkeypatch):
    # What the client downloads is a file of this machine; to the source it is somewhere else.
    monkeypatch.setattr(module, "local_folder", lambda _: None)
    names = [found["fingerprint"] for found in store.all()]
    copies = source_of(store.root, uri, NAME)
    assert list(copies.all()) == list(store.all())
    assert {path.name for path in copies.cache.iterdir()} == {run_of(uri, n).info.run_id for n in names}

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", lambda **_: 1 / 0)
    again = source_of(store.root, uri, NAME)
    assert list(again.all()) == list(store.all())
    assert again.sample_table(names).equals(store.sample_table(names))


def test_files_that_cannot_be_fetched_name_their_run_and_leave_nothing(store, uri, monkeypatch):
    monkeypatch.setattr(module, "local_folder", lambda _: None)
    run = run_of(uri, "b" * 16).info
    shutil.rmtree(run.artifact_uri.removeprefix("file://"))
    copies = source_of(store.root, uri, NAME)
    with pytest.raises(UsageError, match=f"run {run.run_id} .* could not be fetched"):
        copies.samples("b" * 16)
    assert not list(copies.cache.glob(".tmp-*"))


def test_a_run_whose_record_is_lost_is_named(store, uri, copies):
    run = run_of(uri, "b" * 16).info
    (Path(run.artifact_uri.removeprefix("file://")) / "record.json").unlink()
    with pytest.raises(UsageError, match=f"run {run.run_id} of job {'b' * 16} has no record.json at"):
        list(copies.all())
    with pytest.raises(UsageError, match=run.run_id):
        copies.sample_table(["b" * 16])
    assert copies.samples("a" * 16) == SAMPLES


def test_an_unknown_experiment_is_told_those_that_are_there(store, uri):
    with pytest.raises(UsageError, match=r"no experiment 'mine'; there are Default, qbench; set tracker"):
        list(source_of(store.root, uri, "mine").all())


def test_a_deleted_experiment_is_unknown(store, uri):
    client = MlflowClient(tracking_uri=uri)
    client.delete_experiment(client.get_experiment_by_name(NAME).experiment_id)
    with pytest.raises(UsageError, match="there are Default;"):
        list(source_of(store.root, uri, NAME).all())


def test_reading_makes_no_database(tmp_path):
    with pytest.raises(UsageError, match="no MLflow database at"):
        list(source_of(tmp_path, f"sqlite:///{tmp_path}/none.db", NAME).all())
    assert not list(tmp_path.iterdir())


def test_a_tracker_out_of_reach_is_named_without_its_password(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    copies = source_of(tmp_path, "http://me:secret@127.0.0.1:9", NAME)  # the port that discards what it gets
    with pytest.raises(UsageError, match=r"MLflow at http://127.0.0.1:9 could not be read") as error:
        list(copies.all())
    assert "secret" not in str(error.value) + copies.where


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "notes.db").write_text("dear diary " * 100)
    with pytest.raises(UsageError, match="could not be read"):
        list(source_of(tmp_path, f"sqlite:///{tmp_path}/notes.db", NAME).all())


def test_a_run_has_a_link_to_its_server_or_to_where_a_database_is_shown(store, uri, copies, monkeypatch):
    assert store.link("a" * 16) is None
    run = run_of(uri, "a" * 16).info
    assert (
        copies.link("a" * 16) == f"http://127.0.0.1:5000/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    )
    server = MLflowSource("https://me:secret@host:5000/mlflow/", NAME, store.root / "cache")
    monkeypatch.setattr(module, "connect", lambda _: MlflowClient(tracking_uri=uri))
    expected = f"https://host:5000/mlflow/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    assert server.link("a" * 16) == expected
    assert server.link("no such job") is None


def test_marks_know_the_link_of_a_copy(store, uri):
    run, marks = run_of(uri, "a" * 16).info, Marks(store, uri, NAME)
    where = f"/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    assert link_to_copy(marks, "a" * 16) == f"http://127.0.0.1:5000{where}"  # while `mlflow ui` runs
    server = Marks(store, "http://host:5000", NAME)
    assert link_to_copy(server, "a" * 16) is None
    shutil.copytree(marks.folder, server.folder)
    assert link_to_copy(server, "a" * 16) == f"http://host:5000{where}"
    assert link_to_copy(server, "no such job") is None


def test_without_a_uri_the_results_folder_is_the_source(tmp_path):
    source = source_of(tmp_path, None, NAME)
    assert source == RecordStore(tmp_path)
    assert source.where == str(tmp_path / "records")
