"""The sweep engine with real processes: failures, kills, interruptions, several launchers."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from qbench.track.records import RecordStore

ROOT = Path(__file__).parents[1]
SMALL = ["model=nano-llama", "eval=quick", "eval.ppl=[stdlib_docs]", "eval.max_windows=2", "tracker=none"]
FAULTY = ["algo=rtn", "algo._target_=tests.faults.Faulty"]


def environment() -> dict[str, str]:
    # One thread each: equal numbers to the last bit, and no two processes in each other's way.
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(folder: Path, *arguments: str, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qbench", *arguments], cwd=folder, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    process = start(folder, *arguments)
    out, _ = process.communicate()
    return process.returncode, out


def records(folder: Path) -> list[dict]:
    return list(RecordStore(folder / "results").all())


def n_records(folder: Path) -> int:
    return len(list((folder / "results" / "records").glob("[!.]*/record.json")))


def wait_until(condition, process=None, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def test_every_way_to_fail_is_recorded_and_the_sweep_goes_on(tmp_path):
    code, out = run(
        tmp_path, "-m", *FAULTY, "+algo.how=none,raise,oom,not-finite,kill,exit,hang", *SMALL, "job.timeout=3",
    )  # fmt: skip
    assert code == 3, out
    found = {r["identity"]["algorithm"].get("how"): r for r in records(tmp_path)}
    assert {how: (r["status"], r.get("failure")) for how, r in found.items()} == {
        None: ("done", None), "none": ("done", None), "raise": ("failed", "raised"), "oom": ("failed", "oom"),
        "not-finite": ("failed", "nan"), "kill": ("failed", "killed"), "exit": ("failed", "killed"),
        "hang": ("failed", "timeout"),
    }  # fmt: skip
    assert found["raise"]["reason"] == "RuntimeError: out of luck"
    assert "tests/faults.py" in found["raise"]["traceback"]
    assert "time.sleep(0.1)" in found["hang"]["traceback"], "where it hung"
    assert found["kill"]["reason"].startswith("the worker was ended by SIGKILL")
    assert "2 workers were lost" in found["kill"]["reason"]
    assert "about to be killed" in found["kill"]["log_tail"]
    assert "exit code 9" in found["exit"]["reason"]
    assert "8 run, 0 already done, 6 failed" in out
    assert "qbench retry" in out
    assert not list((tmp_path / "results" / "workers").iterdir())
    assert not list((tmp_path / "results" / "launches").iterdir())


def test_a_job_whose_worker_was_killed_is_taken_by_another(tmp_path):
    (tmp_path / "marks").mkdir()
    code, out = run(
        tmp_path, "-m", *FAULTY, "+algo.how=kill,none", f"+algo.once={tmp_path}/marks", *SMALL, "baseline=false",
    )  # fmt: skip
    assert code == 0, out
    assert [r["status"] for r in records(tmp_path)] == ["done", "done"]
    assert (tmp_path / "marks" / "kill-0").exists()


def test_an_interrupted_sweep_says_how_to_go_on_and_leaves_no_process(tmp_path):
    command = ["-m", *FAULTY, "+algo.how=slow", "+algo.tag=range(30)", *SMALL]
    process = start(tmp_path, *command, start_new_session=True)
    wait_until(lambda: n_records(tmp_path) >= 3, process)
    code, status = run(tmp_path, "status")
    assert code == 0
    assert "31" in status, status
    assert "nano-llama rtn" in status, "what the worker does"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "the same command takes up from here" in out
    before = {r["fingerprint"]: r["started"] for r in records(tmp_path)}
    assert 3 <= len(before) < 31
    assert not list((tmp_path / "results" / "workers").iterdir())
    code, out = run(tmp_path, *command)
    assert code == 0, out
    after = {r["fingerprint"]: r["started"] for r in records(tmp_path)}
    assert len(after) == 31
    assert before.items() <= after.items()
    assert all(r["status"] == "done" for r in records(tmp_path)), "an interruption counts against no job"


@pytest.mark.slow
def test_workers_end_when_their_launcher_is_killed(tmp_path):
    process = start(tmp_path, "-m", *FAULTY, "+algo.how=slow", "+algo.tag=range(200)", *SMALL)
    wait_until(lambda: n_records(tmp_path) >= 1, process)
    (beacon,) = (tmp_path / "results" / "workers").glob("*.json")
    worker = json.loads(beacon.read_text())["pid"]
    process.kill()
    process.wait()
    wait_until(lambda: not Path(f"/proc/{worker}").exists(), seconds=60)
    wait = n_records(tmp_path)
    time.sleep(1)
    assert n_records(tmp_path) == wait


def check_store(folder: Path, expected: int) -> None:
    """Exactly the planned records, each whole."""
    store = RecordStore(folder / "results")
    (sweep,) = store.sweeps().values()
    names = sorted(path.name for path in store.records.glob("[!.]*"))
    assert names == sweep["jobs"]
    assert len(names) == expected
    for name in names:
        record = json.loads((store.records / name / "record.json").read_text())
        assert record["status"] == "done"
        assert record["fingerprint"] == name
        assert (store.records / name / "samples.parquet").is_file()


@pytest.mark.slow
def test_a_sweep_killed_at_random_moments_ends_with_exactly_the_planned_records(tmp_path):
    """Forty jobs, two workers; kill -9 of the whole process group, three times; faults happen once as well."""
    (tmp_path / "marks").mkdir()
    command = [
        "-m", *FAULTY, "+algo.how=mixed", "+algo.tag=range(40)", f"+algo.once={tmp_path}/marks",
        *SMALL, "baseline=false", "launcher.workers=2",
    ]  # fmt: skip
    draw = random.Random(0)
    started: dict[str, str] = {}
    for _ in range(3):
        process = start(tmp_path, *command, start_new_session=True)
        goal = n_records(tmp_path) + draw.randint(2, 8)
        wait_until(lambda: n_records(tmp_path) >= goal, process)  # noqa: B023
        time.sleep(draw.random())
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        for record in records(tmp_path):
            assert started.setdefault(record["fingerprint"], record["started"]) == record["started"], (
                "ran twice"
            )
    code, out = run(tmp_path, *command)
    assert code == 0, out
    for record in records(tmp_path):
        assert started.setdefault(record["fingerprint"], record["started"]) == record["started"], "ran twice"
    check_store(tmp_path, 40)


@pytest.mark.slow
def test_two_launchers_on_one_folder_share_a_sweep(tmp_path):
    """No job is run twice: each run leaves a line in a log that all workers append to."""
    command = ["-m", *FAULTY, "+algo.how=slow", "+algo.tag=range(24)", *SMALL, "baseline=false"]
    command += [f"+algo.runs={tmp_path}/runs"]
    first, second = start(tmp_path, *command), start(tmp_path, *command)
    outputs = [process.communicate()[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    runs = Counter((tmp_path / "runs").read_text().splitlines())
    assert runs == {str(tag): 1 for tag in range(24)}
    check_store(tmp_path, 24)
    workers = {path.name.rsplit("-", 1)[0] for path in (tmp_path / "results" / "logs").glob("*.log")}
    assert len(workers) == 2
    for output in outputs:
        assert "[24/24]" in output, "each follows all of the sweep"


@pytest.mark.slow
def test_anybody_can_help_with_a_sweep_that_runs(tmp_path):
    command = ["-m", *FAULTY, "+algo.how=slow", "+algo.tag=range(24)", *SMALL, "baseline=false"]
    command += [f"+algo.runs={tmp_path}/runs"]
    process = start(tmp_path, *command)
    wait_until(lambda: list((tmp_path / "results" / "launches").glob("*.json")), process)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code, out = run(elsewhere, "worker", f"results={tmp_path}/results", "name=helper", "start=0.5")
    assert code == 0, out
    assert process.wait() == 0
    assert {r["worker"] for r in records(tmp_path)} > {"helper"}
    assert Counter((tmp_path / "runs").read_text().splitlines()) == {str(tag): 1 for tag in range(24)}


@pytest.mark.slow
def test_memory_does_not_grow_from_job_to_job(tmp_path):
    """A hundred jobs of three algorithms in one process: at most 5 % after the tenth."""
    code = """
import sys, psutil
from qbench import cli
from qbench.track.records import RecordStore
write = RecordStore.write
def watched(self, *arguments):
    print("RSS", psutil.Process().memory_info().rss, flush=True)
    return write(self, *arguments)
RecordStore.write = watched
cli.main()
"""
    command = [
        "-m",
        "algo=rtn,gptq,awq",
        "seed=range(50)",
        "calib.n_samples=4",
        "calib.seq_len=64",
        "launcher=inline",
    ]
    out = subprocess.run(
        [sys.executable, "-c", code, *command, *SMALL], cwd=tmp_path, env=environment(), capture_output=True,
        text=True, check=True,
    ).stdout  # fmt: skip
    sizes = [int(line.split()[1]) for line in out.splitlines() if line.startswith("RSS")]
    assert len(sizes) >= 100
    assert max(sizes[10:]) <= 1.05 * sizes[9], f"{sizes[9] / 1e6:.0f} MB -> {max(sizes[10:]) / 1e6:.0f} MB"
