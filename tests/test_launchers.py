"""Slurm and Ray run the worker loop too, and equal jobs give equal numbers whoever runs them."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.test_sweep import FAULTY, SMALL, n_records, records, run, start, wait_until

pytestmark = pytest.mark.slow

GRID = ["-m", "algo=rtn,gptq,awq", "wbits=4,2", "calib.n_samples=4", "calib.seq_len=64", *SMALL]


def numbers(folder: Path) -> dict[str, dict[str, float]]:
    """What must not depend on who ran a job."""
    assert {r["status"] for r in records(folder)} == {"done"}
    timed = ("_time_s", "_mb")
    return {
        r["fingerprint"]: {k: v for k, v in r["metrics"].items() if not k.endswith(timed)}
        | {"b": r["block_errors"]}
        for r in records(folder)
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inline")
    code, out = run(folder, *GRID, "launcher=inline")
    assert code == 0, out
    return numbers(folder)


def cluster() -> str:
    """A real Slurm where there is one (`.ci/slurm` makes one), else submitit's stand-in."""
    if shutil.which("sinfo") is None:
        return "local"
    answer = subprocess.run(["sinfo", "-h", "-o", "%t"], capture_output=True, text=True)
    return (
        "slurm"
        if answer.returncode == 0 and {"idle", "mix", "alloc", "comp"} & set(answer.stdout.split())
        else "local"
    )


def needs(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


def test_numbers_depend_on_neither_processes_nor_their_number_nor_order(tmp_path, expected):
    code, out = run(tmp_path, *GRID, "launcher=local", "launcher.workers=2")
    assert code == 0, out
    assert numbers(tmp_path) == expected
    reverse = tmp_path / "reverse"
    reverse.mkdir()
    code, out = run(reverse, *(a.replace("rtn,gptq,awq", "awq,gptq,rtn").replace("4,2", "2,4") for a in GRID))
    assert code == 0, out
    assert numbers(reverse) == expected


def test_slurm_runs_the_same_sweep(tmp_path, expected, record_property):
    needs("submitit")
    where = cluster()
    print(f"Slurm: {'a real cluster' if where == 'slurm' else 'submitit local, there is no Slurm here'}")
    record_property("cluster", where)
    code, out = run(tmp_path, *GRID, "launcher=slurm", f"launcher.cluster={where}", "launcher.minutes=20")
    assert code == 0, out
    assert numbers(tmp_path) == expected
    logs = list((tmp_path / "results" / "logs" / "slurm").glob("*.out"))
    assert logs, "tasks ran"


def test_slurm_tasks_that_are_lost_are_replaced(tmp_path):
    needs("submitit")
    if cluster() != "slurm":
        pytest.skip("there is no Slurm here; submitit's stand-in cannot lose a task")
    command = ["-m", *FAULTY, "+algo.how=slow", "+algo.tag=range(40)", *SMALL, "baseline=false"]
    process = start(
        tmp_path, *command, "launcher=slurm", "launcher.workers=1", "launcher.lease=4", "launcher.minutes=20"
    )
    wait_until(lambda: n_records(tmp_path) >= 3, process)
    subprocess.run(["scancel", "--signal=KILL", "--full", "--name=qbench"], check=True)
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    assert len(records(tmp_path)) == 40
    assert {r["status"] for r in records(tmp_path)} == {"done"}


def test_ray_runs_the_same_sweep_and_replaces_an_actor_that_was_killed(tmp_path, expected):
    needs("ray")
    process = start(tmp_path, *GRID, "launcher=ray", "launcher.workers=2")
    wait_until(lambda: n_records(tmp_path) >= 1, process)
    # An actor is the parent of its worker.
    (beacon, *_) = (tmp_path / "results" / "workers").glob("*.json")
    os.kill(psutil.Process(json.loads(beacon.read_text())["pid"]).ppid(), signal.SIGKILL)
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    assert numbers(tmp_path) == expected
    assert "an actor was lost" in out


def test_what_a_launcher_needs_is_named(tmp_path):
    code = "import sys; sys.modules['ray'] = None; sys.modules['submitit'] = None; from qbench import cli; cli.main()"
    for launcher in ("ray", "slurm"):
        result = subprocess.run(
            [sys.executable, "-c", code, *GRID, f"launcher={launcher}"],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 2
        assert f'pip install "qbench[{launcher}]"' in result.stderr
