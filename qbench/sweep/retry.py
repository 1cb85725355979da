"""Run failed jobs again."""

from collections.abc import Iterable
from typing import Any

from qbench.errors import UsageError
from qbench.sweep.plan import Plan
from qbench.sweep.preview import print_plan
from qbench.sweep.progress import complain
from qbench.sweep.session import run_plan
from qbench.sweep.settings import Jobs
from qbench.track.records import Record, RecordStore

_HOW = ("results", "tracker", "launcher", "job", "plan")  # of the command, not of the record
_BATCHES = (("calib", "batch_size"), ("eval", "batch_size"), ("eval", "task_batch_size"))


def retry(config: dict[str, Any], *, smaller_batches: bool) -> int:
    """Run the failed jobs of a results folder again; returns the exit code.

    Batch sizes are no part of a job's identity: with `smaller_batches`, those of jobs that ran out of memory are halved.

    Raises:
        UsageError: If there are no records.
    """
    jobs = Jobs()
    settings = jobs.settings(config)
    store = RecordStore(settings.results)
    records = list(store.all())
    failed = [record for record in records if record["status"] == "failed"]
    if not records:
        raise UsageError(
            f"no records under {str(store.records)!r}; run e.g. `qbench -m algo=rtn,gptq wbits=4,3`"
        )
    if not failed:
        print(f"none of the {len(records)} jobs under {store.records} has failed")
        return 0
    plan = Plan(settings=settings)
    for record in _in_order(failed):
        again = record["config"] | {key: config[key] for key in _HOW}
        if smaller_batches and record.get("failure") == "oom":
            again = _halved(again)
        try:
            job = jobs.job(again)
            if job.fingerprint != record["fingerprint"]:
                raise ValueError(
                    "Python, qbench or the model's files have changed since, so that it is another job now; "
                    "run the sweep's command again"
                )
            job.check()
        except (ValueError, NotImplementedError, OSError, KeyError) as error:
            plan.problems.append((str(record["labels"]), str(error)))
            complain(f"skipped {record['fingerprint']}: {error}")
            continue
        plan.wanted[job.fingerprint] = None
        plan.todo[job.fingerprint] = job
        plan.again.add(job.fingerprint)
    if settings.plan and plan.todo:
        print_plan(plan)
        return 0
    return run_plan(plan, settings, is_sweep=True) if plan.todo else 2


def _in_order(records: Iterable[Record]) -> list[Record]:
    """One model after another."""
    return sorted(records, key=lambda r: (r["labels"]["model"], str(r["labels"]["calib"])))


def _halved(config: dict[str, Any]) -> dict[str, Any]:
    for section, key in _BATCHES:
        config = config | {section: config[section] | {key: max(1, config[section][key] // 2)}}
    return config
