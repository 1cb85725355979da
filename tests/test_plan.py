"""What a command asks for: every cell is a job, the same as another, pruned by a rule, or a problem."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from qbench.sweep.costs import Costs
from qbench.sweep.grid import unite
from qbench.sweep.plan import group_of, make_plan
from qbench.sweep.study import Part, parts
from qbench.track.records import RecordStore
from tests.test_grid import LOADER, MASTER

SMALL = ["eval=quick", "calib.n_samples=4", "calib.seq_len=64"]


def plan_of(folder: Path, *arguments: str, exclude=()):
    part = Part([*SMALL, f"results={folder}", *arguments], tuple(exclude))
    return make_plan(unite([part], LOADER, MASTER), is_sweep=True)


def record_of(job, status="done", **metrics):
    return {
        "fingerprint": job.fingerprint, "status": status, "labels": job.labels, "identity": job.identity(),
        "config": job.settings, "device": "x86_64 CPU, 2 threads", "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:00:09+00:00", "metrics": metrics,
    }  # fmt: skip


def keep(folder: Path, records):
    store = RecordStore(folder)
    store.prepare()
    for record in records:
        store.write(record, [])


def test_every_cell_is_accounted_for(tmp_path):
    plan = plan_of(
        tmp_path, "algo=rtn,gptq,smoothquant,gtpq", "scheme=w4a16g128,w8a8,w16a16kv4", "calib=stdlib_docs,random",
        "model=nano-llama", "seed=0,1",
    )  # fmt: skip
    jobs = len(plan.wanted) - 1  # the baseline is nobody's cell
    assert plan.cells == 48 == jobs + plan.pruned.total() + plan.duplicates + len(plan.problems)
    assert plan.pruned == {"SmoothQuant needs activation bits": 8, "GPTQ works on weights": 4}
    assert len(plan.problems) == 12
    assert plan.duplicates == 9, (
        "rounding to nearest reads no calibration data: three of its twelve cells differ"
    )
    algos = Counter(job.algo for job in plan.todo.values())
    assert algos == {"fp": 1, "rtn": 3, "gptq": 8, "smoothquant": 4}


def test_what_is_recorded_is_subtracted_and_what_failed_is_not(tmp_path):
    first = plan_of(tmp_path, "algo=rtn,gptq", "wbits=4,3", "model=nano-llama")
    jobs = list(first.todo.values())
    keep(tmp_path, [record_of(jobs[0]), record_of(jobs[1]), record_of(jobs[2], "failed")])
    plan = plan_of(tmp_path, "algo=rtn,gptq", "wbits=4,3", "model=nano-llama")
    assert list(plan.wanted) == list(first.wanted)
    assert set(plan.todo) == set(first.todo) - {jobs[0].fingerprint, jobs[1].fingerprint}
    assert plan.again == {jobs[2].fingerprint}


def test_force_runs_again_what_is_recorded(tmp_path):
    first = plan_of(tmp_path, "algo=rtn", "wbits=4,3", "model=nano-llama")
    keep(tmp_path, [record_of(job) for job in first.todo.values()])
    plan = plan_of(tmp_path, "algo=rtn", "wbits=4,3", "model=nano-llama", "force=true")
    assert set(plan.todo) == plan.again == set(first.todo)


def test_jobs_of_one_group_follow_one_another(tmp_path):
    plan = plan_of(
        tmp_path, "algo=gptq,rtn", "wbits=4,3", "calib=stdlib_docs,random", "model=nano-llama,micro-opt",
        "eval.seq_len=128,256",
    )  # fmt: skip
    groups = [group_of(job) for job in plan.todo.values()]
    changes = sum(a != b for a, b in pairwise(groups))
    assert changes == len(set(groups)) - 1
    models = [group[0] for group in groups]
    assert sum(a != b for a, b in pairwise(models)) == 1


def test_a_study_leaves_out_what_it_says(tmp_path):
    exclude = [{"algo": "gptq", "wbits": [3, 2]}, {"scheme": "w2a16g128"}, {"calib.n_samples": 99}]
    plan = plan_of(tmp_path, "algo=rtn,gptq", "wbits=4,3,2", "model=nano-llama", exclude=exclude)
    left = [(job.algo, job.labels["wbits"]) for job in plan.todo.values()]
    assert left == [("fp", 16), ("rtn", 4), ("rtn", 3), ("gptq", 4)]
    assert plan.pruned.total() == 3
    assert "left out by the sweep: algo=gptq wbits=[3, 2]" in plan.pruned


def test_time_is_estimated_from_recorded_costs_scaled_by_parameters(tmp_path):
    plan = plan_of(tmp_path, "algo=gptq,awq", "wbits=4", "model=nano-llama,micro-llama")
    jobs = {(job.model.name, job.algo): job for job in plan.todo.values()}
    small, large = jobs["nano-llama", "gptq"], jobs["micro-llama", "gptq"]
    size = {"bits_per_weight": 8.0, "model_mb": 1.0}  # a million parameters
    costs = Costs.learn([record_of(small, calib_time_s=3.0, eval_time_s=1.0, **size)])
    from qbench.job import skeleton

    for job in (small, large):
        n = sum(p.numel() for p in skeleton(job.model).parameters())
        assert costs.seconds(job, "x86_64 CPU, 1 threads") == pytest.approx(4.0 * n / 1e6)
    assert costs.seconds(large, "NVIDIA H100") is None
    assert Costs.learn([]).seconds(large, "x86_64 CPU") is None


def test_the_full_sweep_is_five_hundred_jobs_and_more(tmp_path):
    asked = parts(["-m", "+sweep=full", f"results={tmp_path}"])
    plan = make_plan(unite(asked, LOADER, MASTER), is_sweep=True)
    assert len(plan.todo) >= 500
    assert not plan.problems
    labels = [job.labels for job in plan.todo.values()]
    for axis, least in (("model", 3), ("algo", 5), ("scheme", 18), ("calib", 3), ("seed", 2)):
        assert len({label[axis] for label in labels} - {None}) >= least, axis
    assert plan.pruned.keys() == {
        "SmoothQuant needs activation bits", "GPTQ works on weights", "AWQScale works on weights",
    }  # fmt: skip


def test_a_launch_file_gives_the_jobs_that_were_planned(tmp_path):
    from qbench.sweep.launch import Launch
    from qbench.sweep.session import make_launch

    plan = plan_of(tmp_path, "algo=rtn,awq", "wbits=4,3", "model=nano-llama", "seed=0,1")
    RecordStore(tmp_path).prepare()
    made = make_launch(plan, plan.settings)
    read = Launch.load(tmp_path, made.id)
    assert list(read.configs) == list(plan.todo)
    for fingerprint, job in plan.todo.items():
        assert read.job(fingerprint) == job
        assert list(read.configs[fingerprint]["algo"]) == list(job.settings["algo"])
    assert len(json.loads(made.path.read_text())["parts"]) < 60, "what jobs share is stored once"
