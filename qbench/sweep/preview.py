"""What `plan=true` shows: jobs, what was left out and why, the time and the disk that they will take."""

import shutil
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qbench.job import Job
from qbench.run import device_name
from qbench.sweep.costs import Costs
from qbench.sweep.plan import Plan
from qbench.sweep.progress import duration

_BYTES = 12_000  # of a record, where there is none yet to measure


def print_plan(plan: Plan) -> None:
    """Print the plan; nothing is asked and nothing is run."""
    assert plan.settings is not None
    console = Console()
    done = len(plan.wanted) - len(plan.todo)
    lines = [f"{plan.cells} cells"]
    lines += [f"  {count} pruned: {rule}" for rule, count in plan.pruned.items()]
    lines += [f"  {len(plan.problems)} cannot run, as said above"] if plan.problems else []
    lines += [f"  {plan.duplicates} are a job of another cell"] if plan.duplicates else []
    lines += [
        f"{len(plan.wanted)} jobs, floating-point baselines included: {done} done, {len(plan.todo)} to run"
    ]
    if plan.again:
        lines += [f"  {len(plan.again)} of them again: they failed, or force=true"]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    if plan.todo:
        console.print(_by_model(list(plan.todo.values())))
        console.print(
            f"time  {_time(plan)}\ndisk  {_disk(plan)}", markup=False, highlight=False, soft_wrap=True
        )


def _by_model(jobs: list[Job]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("model", "jobs", "algorithms", "schemes", "calibration sets"):
        table.add_column(column, justify="right" if column == "jobs" else "left", overflow="fold")
    for model, count in Counter(job.model.name for job in jobs).items():
        mine = [job for job in jobs if job.model.name == model]
        distinct = [
            dict.fromkeys(values)
            for values in (
                [job.algo for job in mine],
                [str(job.scheme) for job in mine],
                [f"{job.calib.name}" for job in mine if job.calib],
            )
        ]
        table.add_row(model, str(count), *(_listed(list(values)) for values in distinct))
    return table


def _listed(values: list[str]) -> str:
    return ", ".join(values) if len(values) <= 6 else f"{', '.join(values[:5])} and {len(values) - 5} more"


def _time(plan: Plan) -> str:
    costs = Costs.learn(plan.store.all())
    estimates = [costs.seconds(job, device_name(job.device)) for job in plan.todo.values()]
    known = [seconds for seconds in estimates if seconds is not None]
    if not known:
        return "unknown: nothing alike was recorded on this device; it is known after a few jobs"
    total = sum(known) / len(known) * len(estimates)
    rough = f", of which {len(estimates) - len(known)} are guessed by the mean of the others"
    return f"about {duration(total)} of one worker, from recorded jobs" + (
        rough if len(known) < len(estimates) else ""
    )


def _disk(plan: Plan) -> str:
    root = plan.store.root
    folders = list(plan.store.records.glob("[!.]*"))[:50] if root.is_dir() else []
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in folders]
    # MLflow keeps a copy of each record's files.
    copies = 1 if plan.settings is None or plan.settings.tracker.uri is None else 2
    size = (sum(sizes) / len(sizes) if sizes else _BYTES) * copies * len(plan.todo)
    home: Path = next(p for p in (root, *root.resolve().parents) if p.is_dir())
    return f"about {size / 1e6:.1f} MB, {shutil.disk_usage(home).free / 1e9:.0f} GB are free"
