"""From cells to records: plan, run what is left under a launcher, mirror, and say what came of it."""

import signal
from collections.abc import Generator, Iterable
from contextlib import closing

from qbench.errors import UsageError
from qbench.report.ending import print_summary
from qbench.run import command
from qbench.sweep.beacon import sweep_up
from qbench.sweep.grid import Cell
from qbench.sweep.launch import Launch, Rules
from qbench.sweep.launchers import follow, launcher_for, run_inline
from qbench.sweep.mirroring import Mirroring
from qbench.sweep.plan import Plan, make_plan
from qbench.sweep.preview import print_plan
from qbench.sweep.progress import Progress, complain
from qbench.sweep.schema import Settings
from qbench.sweep.supervisor import LaunchError
from qbench.sweep.worker import interrupt
from qbench.track.claims import Claims
from qbench.track.records import Record

OK, BAD_INPUT, SOME_FAILED = 0, 2, 3


def run_cells(cells: Iterable[Cell], *, is_sweep: bool) -> int:
    """Run what a command asks for and return its exit code.

    Raises:
        UsageError: If nothing of it can run, or the results folder cannot be written.
    """
    plan = make_plan(cells, is_sweep=is_sweep)
    alike: dict[str, list[str]] = {}
    for name, problem in plan.problems:
        alike.setdefault(problem, []).append(name)
    for problem, names in alike.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        complain(f"skipped {names[0]}{more}: {problem}" if is_sweep and names[0] else problem)
    if plan.settings is None or not plan.wanted:
        if not plan.pruned:
            return BAD_INPUT
        raise UsageError("nothing is left of the grid: " + "; ".join(plan.pruned))
    if plan.settings.plan:
        print_plan(plan)
        return BAD_INPUT if plan.problems else OK
    for task, reason in plan.left_out.items():
        complain(f"left out {task}: {reason.partition(': looked for')[0]}")
    for rule, count in plan.pruned.items():
        complain(f"pruned {count} of {plan.cells} cells: {rule}")
    return run_plan(plan, plan.settings, is_sweep=is_sweep)


def run_plan(plan: Plan, settings: Settings, *, is_sweep: bool) -> int:
    """Run what is left of a plan, and conclude.

    Raises:
        UsageError: If the results folder cannot be written, or the launcher is not to be had.
    """
    records, unfinished = complete(plan, settings, is_sweep=is_sweep)
    return _conclude(plan, records, settings, unfinished=unfinished)


def complete(plan: Plan, settings: Settings, *, is_sweep: bool) -> tuple[list[Record], bool]:
    """Run what is left of a plan; returns the records of all its jobs, and whether the launcher gave up before.

    Raises:
        UsageError: If the results folder cannot be written, or the launcher is not to be had.
    """
    store = plan.store
    try:
        store.prepare()
    except ValueError as error:
        raise UsageError(str(error)) from error
    if is_sweep:
        store.open_sweep(command(), plan.wanted)
    trouble = None
    with (
        Progress(len(plan.wanted), len(plan.wanted) - len(plan.todo)) as progress,
        Mirroring(store, settings.tracker) as mirroring,
    ):
        try:
            with closing(_launched(plan, settings, is_sweep, progress)) as finished:
                for fingerprint in finished:
                    if (record := store.read(fingerprint)) is not None:
                        progress.finished(record)
                        mirroring.add(record)
        except LaunchError as error:
            trouble = str(error)
        records = [r for f in plan.wanted if (r := store.read(f)) is not None]
        mirroring.finish(records)
    if trouble:
        complain(f"{trouble}\nqbench: the same command takes up from here")
    return records, bool(trouble)


def _launched(plan: Plan, settings: Settings, is_sweep: bool, progress: Progress) -> Generator[str]:
    """Run the jobs under the launcher; yields fingerprints as records come in."""
    if not plan.todo:
        return
    # One job needs no second process, unless it may have to be ended.
    inline = settings.launcher.kind == "inline" or (
        settings.launcher.kind == "local" and not is_sweep and settings.job.timeout is None
    )
    if inline and settings.job.timeout is not None:
        raise UsageError("job.timeout ends the process of a job that hangs; use launcher=local")
    launch = make_launch(plan, settings)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        if inline:
            yield from run_inline(launch, progress.show)
        else:
            devices = {job.device for job in plan.todo.values()}
            yield from follow(launch, launcher_for(launch, settings.launcher, devices), progress.show)
    finally:
        signal.signal(signal.SIGTERM, before)
        launch.forget()


def make_launch(plan: Plan, settings: Settings) -> Launch:
    """Write the launch file, and begin counting lost workers anew."""
    root = plan.store.root.resolve()
    claims = Claims(root / "claims", settings.launcher.lease)
    claims.sweep_up()
    sweep_up(root / "workers", claims.now())
    claims.reset(list(plan.todo))
    rules = Rules(
        claims.now(), settings.job.timeout, settings.job.attempts, settings.launcher.lease,
        settings.tracker.system_metrics,
    )  # fmt: skip
    configs = {f: job.settings | {"results": str(root)} for f, job in plan.todo.items()}
    launch = Launch(root, rules, configs, plan.groups(), plan.again, command())
    launch.save()
    return launch


def _conclude(plan: Plan, records: list[Record], settings: Settings, *, unfinished: bool) -> int:
    print_summary(
        records,
        problems=plan.problems,
        n_pruned=plan.pruned.total(),
        ran=len(plan.todo) - (len(plan.wanted) - len(records)),
        results=settings.results,
        tracker_uri=settings.tracker.uri,
    )
    if unfinished or any(record["status"] == "failed" for record in records):
        return SOME_FAILED
    return BAD_INPUT if plan.problems else OK
