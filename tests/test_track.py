"""Records."""

import os
import time

import pytest

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
