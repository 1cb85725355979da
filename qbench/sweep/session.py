"""From cells to records: plan, skip what is done, run the rest, mirror, and say what came of it."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qbench.job import Job, ModelCache, run
from qbench.report.tables import print_summary
from qbench.sweep.grid import Cell
from qbench.sweep.progress import Progress
from qbench.sweep.settings import Settings, TrackerSettings
from qbench.track import MLflowMirror, Record, RecordStore

OK, SOME_FAILED, BAD_INPUT = 0, 3, 2


@dataclass
class Plan:
    """What a command asks for.

    Attributes:
        jobs: By fingerprint, without repetition, in order.
        todo: Those of them that have no record yet.
        problems: What was asked for and cannot run: the cell, and why.
    """

    jobs: dict[str, Job] = field(default_factory=dict)
    todo: list[Job] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)


def run_cells(cells: list[Cell], *, is_sweep: bool) -> int:
    """Run what a command asks for and return its exit code."""
    settings, problems = _read(cells)
    if not settings:
        return _refuse(problems, is_sweep)
    first = settings[0][1]
    store = RecordStore(first.results)
    store.prepare()
    plan = make_plan(settings, store, is_sweep=is_sweep)
    plan.problems[:0] = problems
    if plan.problems:
        _refuse(plan.problems, is_sweep)
    if not plan.jobs:
        return BAD_INPUT
    sweep = store.open_sweep(" ".join(["qbench", *sys.argv[1:]]), plan.jobs) if is_sweep else None
    with Progress(len(plan.jobs), len(plan.jobs) - len(plan.todo)) as progress:
        mirror = _open_mirror(first.tracker, store) if plan.todo else None
        _run_jobs(plan.todo, store, sweep, mirror, progress)
    return _conclude(plan, store, first)


def _read(cells: Iterable[Cell]) -> tuple[list[tuple[str, Settings]], list[tuple[str, str]]]:
    """The cells that compose, as (name, settings), and the problems of the others."""
    settings, problems = [], []
    for cell in cells:
        try:
            if cell.config is None:
                raise ValueError(cell.problem)
            settings.append((cell.name, Settings.read(cell.config)))
        except ValueError as error:
            problems.append((cell.name, str(error)))
    return settings, problems


def make_plan(settings: Iterable[tuple[str, Settings]], store: RecordStore, *, is_sweep: bool) -> Plan:
    """Build, check and de-duplicate the jobs; what is recorded need not be checked again.

    A sweep also gets the floating-point model of each of its cells, first, unless `baseline=false`.
    """
    plan = Plan()
    baselines: dict[str, Job] = {}
    for name, cell in settings:
        try:
            job = cell.job()
            if job.fingerprint in plan.jobs:
                continue
            todo = cell.force or not store.is_done(job.fingerprint)
            if todo:
                job.check()
            if is_sweep and cell.baseline:
                baseline = cell.floating_point()
                baselines[baseline.fingerprint] = baseline
        except (ValueError, NotImplementedError, OSError) as error:
            plan.problems.append((name, " ".join(str(error).split())))
            continue
        plan.jobs[job.fingerprint] = job
        plan.todo += [job] if todo else []
    fresh = {f: job for f, job in baselines.items() if f not in plan.jobs}
    plan.jobs = fresh | plan.jobs
    plan.todo = [job for f, job in fresh.items() if not store.is_done(f)] + plan.todo
    return plan


def _run_jobs(
    jobs: list[Job], store: RecordStore, sweep: str | None, mirror: MLflowMirror | None, progress: Progress
) -> None:
    models = ModelCache()
    for job in jobs:
        torch.manual_seed(0)
        with progress.job(job.title) as reporter:
            outcome = run(job, models, reporter)
        outcome.record["sweep"] = sweep
        store.write(outcome.record, outcome.samples)
        progress.finished(outcome.record)
        if mirror is not None:
            _mirror(mirror, [outcome.record])
    if mirror is not None and sweep:
        _guarded(lambda: mirror.finish(sweep))


def _open_mirror(tracker: TrackerSettings, store: RecordStore) -> MLflowMirror | None:
    if tracker.uri is None:
        return None
    try:
        return MLflowMirror(tracker.uri, tracker.experiment, store)
    except ModuleNotFoundError:
        _complain(
            "MLflow is not installed: records are kept, nothing is mirrored (tracker=none says so on purpose)"
        )
    except Exception as error:  # whatever the tracking server's trouble is, the sweep goes on
        _complain(
            f"MLflow at {tracker.uri} is out of reach ({_first_line(error)}); `qbench sync` mirrors later"
        )
    return None


def _mirror(mirror: MLflowMirror, records: Iterable[Record]) -> int:
    return sum(bool(_guarded(lambda record=record: mirror.mirror(record))) for record in records)


def _guarded(action: Any) -> Any:
    try:
        return action()
    except Exception as error:  # as above: the record is safe, the mirror can be made later
        _complain(f"MLflow: {_first_line(error)}; `qbench sync` mirrors later")
        return None


def sync(results: Path, tracker: TrackerSettings) -> int:
    """Mirror every record that MLflow does not hold yet; returns how many.

    Raises:
        ValueError: If there is nothing to mirror to, or no record.
    """
    store = RecordStore(results)
    records = list(store.all())
    if not records:
        raise ValueError(
            f"no records under {str(store.records)!r}; run e.g. `qbench -m algo=rtn,gptq wbits=4,3`"
        )
    if tracker.uri is None:
        raise ValueError("tracker=none has nowhere to mirror to; use tracker=mlflow or set tracker.uri=")
    mirror = MLflowMirror(tracker.uri, tracker.experiment, store)
    count = sum(mirror.mirror(record) for record in records)
    for sweep in {record["sweep"] for record in records if record.get("sweep")}:
        mirror.finish(sweep)
    return count


def _conclude(plan: Plan, store: RecordStore, settings: Settings) -> int:
    records = [r for f in plan.jobs if (r := store.read(f)) is not None]
    print_summary(
        records,
        problems=plan.problems,
        ran=len(plan.todo),
        results=settings.results,
        tracker_uri=settings.tracker.uri,
    )
    if any(record["status"] == "failed" for record in records):
        return SOME_FAILED
    return BAD_INPUT if plan.problems else OK


def _refuse(problems: Iterable[tuple[str, str]], is_sweep: bool) -> int:
    for name, problem in problems:
        _complain(f"skipped {name}: {problem}" if is_sweep and name else problem)
    return BAD_INPUT


def _complain(message: str) -> None:
    print(f"qbench: {message}", file=sys.stderr)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
