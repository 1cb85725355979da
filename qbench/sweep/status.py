"""What `qbench status` shows, from any shell and any machine that sees the results folder."""

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qbench.errors import UsageError
from qbench.sweep.beacon import beacons
from qbench.sweep.progress import activity, duration
from qbench.track.claims import Claims
from qbench.track.records import RecordStore

_SILENT = 60.0  # seconds after which a worker that holds a job is shown as silent
_SHOWN = 10  # sweeps


def print_status(results: Path) -> None:
    """Print the last sweeps of a results folder, and the workers that are at work.

    Raises:
        UsageError: If there has been no sweep.
    """
    store, console = RecordStore(results), Console()
    if not console.is_terminal:
        console = Console(width=200)
    sweeps = list(store.sweeps().values())[-_SHOWN:]
    try:
        now = Claims(results / "claims").now()
    except OSError:  # a folder that may only be read
        now = time.time()
    workers = beacons(results / "workers", now)
    if not sweeps and not workers:
        raise UsageError(
            f"no sweep under {str(results)!r}; start one, e.g. `qbench -m algo=rtn,gptq wbits=4,3`"
        )
    records = {record["fingerprint"]: record for record in store.all()}
    running = {worker["job"] for worker in workers if worker["job"]}
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("sweep", "jobs", "done", "failed", "running", "left", "time left", "command"):
        table.add_column(
            column, justify="left" if column in ("sweep", "command") else "right", overflow="fold"
        )
    for about in sweeps:
        jobs = about["jobs"]
        statuses = [records[job]["status"] for job in jobs if job in records]
        done, failed, busy = (
            statuses.count("done"),
            statuses.count("failed"),
            sum(job in running for job in jobs),
        )
        left = len(jobs) - done - failed - busy
        table.add_row(
            about["id"], *(str(n) for n in (len(jobs), done, failed, busy, max(left, 0))),
            _time_left(store, jobs, len(workers)) if busy else "", about["command"],
        )  # fmt: skip
    console.print(table)
    for worker in workers:
        seen = f", silent for {duration(worker['age'])}" if worker["age"] > _SILENT else ""
        console.print(
            f"worker {worker['name']} on {worker['host']}: {activity(worker)}{seen}; "
            f"{worker['done']} done, {worker['failed']} failed",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    if not workers:
        console.print("no worker is running; the sweep's command takes up from here", markup=False)


def _time_left(store: RecordStore, jobs: list[str], n_workers: int) -> str:
    """From the pace at which the last records came in."""
    written = sorted(at for job in jobs if (at := store.written(job)) is not None)
    recent = [at for at in written if at > time.time() - 3600][-20 * max(1, n_workers) :]
    if len(recent) < 3:
        return ""
    pace = (recent[-1] - recent[0]) / (len(recent) - 1)
    return duration(pace * (len(jobs) - len(written)))
