"""What is planned, what fails, and how to go on; in this process, with the smallest model."""

import errno
import time
from pathlib import Path

import pytest
import torch

from qbench.track.claims import this_machine
from qbench.track.records import RecordStore
from tests.test_cli import QUIET, records


def test_a_plan_is_shown_and_nothing_is_run(qbench, capfd):
    grid = ("-m", "algo=rtn,gptq,smoothquant", "wbits=4,3", "seed=0,1", *QUIET)
    assert qbench(*grid, "plan=true") == 0
    out = capfd.readouterr().out
    assert "12 cells" in out
    assert "4 pruned: SmoothQuant needs activation bits" in out
    assert "2 are a job of another cell" in out
    assert "7 jobs, floating-point baselines included: 0 done, 7 to run" in out
    assert "unknown: nothing alike was recorded" in out
    assert not Path("results").exists()
    qbench("-m", "algo=rtn,gptq", "wbits=4", *QUIET)
    capfd.readouterr()
    assert qbench(*grid, "plan=true") == 0
    out = capfd.readouterr().out
    assert "3 done, 4 to run" in out
    assert "of one worker, from recorded jobs" in out


def test_the_floating_point_model_runs_first_and_groups_follow(qbench):
    qbench("-m", "algo=gptq,rtn", "wbits=4", "calib=stdlib_docs,random", *QUIET)
    ran = [(r["labels"]["algo"], r["labels"]["calib"]) for r in records()]
    assert ran == [("fp", None), ("rtn", None), ("gptq", "stdlib_docs"), ("gptq", "random")]


def test_retry_runs_failed_jobs_with_smaller_batches_after_running_out_of_memory(qbench, monkeypatch, capfd):
    from qbench.evaluate.evaluator import Evaluator

    evaluate, sizes = Evaluator.run, []

    def large_batches_do_not_fit(self, *arguments):
        sizes.append(self.plan.batch_size)
        if self.plan.batch_size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return evaluate(self, *arguments)

    monkeypatch.setattr(Evaluator, "run", large_batches_do_not_fit)
    assert qbench("-m", "algo=rtn", "wbits=4,3", *QUIET) == 3
    before = {r["fingerprint"] for r in records()}
    assert {r["failure"] for r in records()} == {"oom"}
    assert qbench("retry", "launcher=inline", "tracker=none") == 3
    assert qbench("retry", "launcher=inline", "tracker=none", "smaller_batches=true") == 0
    assert sizes == [4] * 6 + [2] * 3
    assert {r["fingerprint"] for r in records()} == before, "batch sizes are no part of a job's identity"
    assert {r["status"] for r in records()} == {"done"}
    capfd.readouterr()
    assert qbench("retry", "launcher=inline") == 0
    assert "none of the 3 jobs under results/records has failed" in capfd.readouterr().out


def test_a_full_disk_is_waited_for(qbench, monkeypatch):
    write, times = RecordStore.write, []

    def full_at_first(self, record, samples):
        times.append(1)
        if len(times) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, record, samples)

    monkeypatch.setattr(RecordStore, "write", full_at_first)
    monkeypatch.setattr("qbench.sweep.worker.time.sleep", lambda seconds: None)
    assert qbench("-m", "algo=rtn", "wbits=4", *QUIET) == 0
    assert [r["status"] for r in records()] == ["done", "done"]


def test_a_disk_that_stays_full_ends_the_sweep_with_every_earlier_record_safe(qbench, monkeypatch, capfd):
    write = RecordStore.write

    def full_after_one(self, record, samples):
        if list(self.all()):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, record, samples)

    monkeypatch.setattr(RecordStore, "write", full_after_one)
    monkeypatch.setattr("qbench.sweep.worker._PATIENCE", 0.0)
    assert qbench("-m", "algo=rtn", "wbits=4,3", *QUIET) == 3
    assert [r["labels"]["algo"] for r in records()] == ["fp"]
    err = capfd.readouterr().err
    assert "cannot be written: No space left on device" in err
    assert "the same command takes up from here" in err
    monkeypatch.undo()


def test_a_disk_without_room_is_refused_at_the_start(qbench, monkeypatch, capfd):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("qbench.track.records.shutil.disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    assert qbench("algo=rtn", *QUIET) == 2
    assert "has 1 MB left" in capfd.readouterr().err


def test_a_result_that_cannot_be_stored_is_a_failure_of_its_job(qbench, monkeypatch):
    monkeypatch.setattr("qbench.run._provenance", lambda job, metrics: {"eval/x": object()})
    assert qbench("-m", "algo=rtn", "wbits=4", *QUIET) == 3
    assert {r["failure"] for r in records()} == {"raised"}
    assert all("not JSON serializable" in r["reason"] for r in records())


def test_a_timeout_needs_a_process_that_can_be_ended(qbench, capfd):
    assert qbench("algo=rtn", "job.timeout=5", *QUIET) == 2
    assert "use launcher=local" in capfd.readouterr().err


def test_what_jobs_use_of_the_machine_is_recorded_where_it_is_asked_for(qbench, monkeypatch):
    from mlflow.tracking import MlflowClient

    from qbench.algorithms.rtn import RTN

    process = RTN.process
    monkeypatch.setattr(RTN, "process", lambda *arguments: (time.sleep(0.6), process(*arguments)))
    small = [argument for argument in QUIET if argument != "tracker=none"]
    assert qbench("algo=rtn", "tracker.system_metrics=true", *small) == 0
    (record,) = records()
    names = ["cpu_utilization_percentage", "system_memory_usage_megabytes"]
    assert [sorted(sample) for sample in record["system"]] == [[*names, "t"]] * len(record["system"])
    client = MlflowClient(tracking_uri=f"sqlite:///{Path.cwd()}/results/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("qbench").experiment_id])
    shown = client.get_metric_history(run.info.run_id, "system/system_memory_usage_megabytes")
    assert [metric.value for metric in shown] == [sample[names[1]] for sample in record["system"]]


def test_a_setting_that_is_no_number_is_refused(qbench, capfd):
    assert qbench("algo=gptq", "algo.damp=nan", *QUIET) == 2
    assert "damp" in capfd.readouterr().err


def test_status_without_a_sweep_says_what_to_do(qbench, capfd):
    assert qbench("status") == 2
    assert "no sweep under 'results'" in capfd.readouterr().err


def test_status_counts_what_is_done_and_what_failed(qbench, monkeypatch, capfd):
    from qbench.algorithms.gptq import GPTQ

    monkeypatch.setattr(GPTQ, "process", lambda self, block: 1 / 0)
    qbench("-m", "algo=rtn,gptq", "wbits=4,3", *QUIET)
    capfd.readouterr()
    assert qbench("status") == 0
    out = capfd.readouterr().out
    row = next(line for line in out.splitlines() if "algo=rtn" in line)
    assert row.split()[1:6] == ["5", "3", "2", "0", "0"]
    assert "no worker is running" in out


def test_a_worker_that_was_killed_is_not_shown_as_running(tmp_path):
    from qbench.sweep.beacon import Beacon, beacons, sweep_up

    beacon = Beacon(tmp_path, "one", "launch").__enter__()
    now = time.time()
    assert [state["name"] for state in beacons(tmp_path, now)] == ["one"]
    beacon.update(born=0.0)  # this process id belonged to another process
    assert not beacons(tmp_path, now)
    beacon.update(machine="elsewhere")  # of which nothing is known here
    assert len(beacons(tmp_path, now)) == 1
    sweep_up(tmp_path, now)
    assert beacon.path.exists()
    beacon.update(machine=this_machine())
    sweep_up(tmp_path, now)
    assert not beacon.path.exists()


@pytest.mark.parametrize("argument", ["speed=11", "results"])
def test_a_worker_refuses_what_it_does_not_know(argument, qbench, capfd):
    assert qbench("worker", argument) == 2
    assert argument in capfd.readouterr().err


def test_a_worker_without_a_sweep_says_so(qbench, capfd):
    assert qbench("worker") == 2
    assert "no sweep is running in" in capfd.readouterr().err


def test_one_failed_job_of_many_is_explained_below_the_table(qbench, monkeypatch, capfd):
    from qbench.algorithms.gptq import GPTQ

    def fail(self, block):
        raise RuntimeError("a reason so long that it would push the numbers of the table off the screen")

    monkeypatch.setattr(GPTQ, "process", fail)
    assert qbench("-m", "algo=rtn,gptq", "wbits=4", *QUIET) == 3
    out = capfd.readouterr().out
    table, _, rest = out.partition("nano-llama gptq w4a16g128 failed: ")
    assert "push the numbers" not in table
    assert rest.startswith("RuntimeError: a reason so long")
    assert qbench("tables") == 0
    assert "failed: RuntimeError: a reason so long" in capfd.readouterr().out
