"""From cells to records: plan, skip what is done, run the rest, mirror, and say what came of it."""

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from qbench.errors import UsageError, first_line
from qbench.job import Job, ModelCache, command, run
from qbench.report.tables import print_summary
from qbench.sweep.grid import Cell
from qbench.sweep.progress import Progress
from qbench.sweep.settings import Settings, TrackerSettings
from qbench.track.mirror import MLflowMirror
from qbench.track.records import Record, RecordStore

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
    if any((other.results, other.tracker) != (first.results, first.tracker) for _, other in settings):
        raise UsageError("results and tracker are one for a whole sweep; give each a single value")
    store = RecordStore(first.results)
    try:
        store.prepare()
    except ValueError as error:
        raise UsageError(str(error)) from error
    plan = make_plan(settings, store, is_sweep=is_sweep)
    plan.problems[:0] = problems
    if plan.problems:
        _refuse(plan.problems, is_sweep)
    if not plan.jobs:
        return BAD_INPUT
    if is_sweep:
        store.open_sweep(command(), plan.jobs)
    with Progress(len(plan.jobs), len(plan.jobs) - len(plan.todo)) as progress:
        _run_jobs(plan, store, first, progress)
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


def make_plan(settings: list[tuple[str, Settings]], store: RecordStore, *, is_sweep: bool) -> Plan:
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
    again = any(cell.force for _, cell in settings)
    plan.todo = [job for f, job in fresh.items() if again or not store.is_done(f)] + plan.todo
    plan.jobs = fresh | plan.jobs
    # One model is held in memory at a time: its jobs follow one another.
    models = list(dict.fromkeys(job.model for job in plan.todo))
    plan.todo.sort(key=lambda job: models.index(job.model))
    return plan


def _run_jobs(plan: Plan, store: RecordStore, settings: Settings, progress: Progress) -> None:
    keep_freed_memory()
    marks = _Marks(store.root / "mirrored", settings.tracker)
    again = {job.fingerprint for job in plan.todo}  # their old records are about to be replaced
    kept = [r for f in plan.jobs if f not in again and (r := store.read(f)) is not None]
    pending = [record for record in kept if not marks.has(record)]
    mirror = _open_mirror(settings.tracker, store) if plan.todo or pending else None
    models = ModelCache()
    for job in plan.todo:
        torch.manual_seed(0)
        with progress.job(job.title) as reporter:
            outcome = run(job, models, reporter)
        store.write(outcome.record, outcome.samples)
        progress.finished(outcome.record)
        mirror = _mirror(mirror, [outcome.record], marks)
    if mirror := _mirror(mirror, pending, marks):
        _guarded(mirror.close)


@dataclass(frozen=True)
class _Marks:
    """Which records a tracker is known to hold: a file for each, so that doing nothing needs no MLflow."""

    folder: Path
    tracker: TrackerSettings

    def has(self, record: Record) -> bool:
        path = self.folder / record["fingerprint"]
        return self.tracker.uri is None or (path.is_file() and path.read_text() == self._text(record))

    def add(self, record: Record) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / record["fingerprint"]).write_text(self._text(record))

    def _text(self, record: Record) -> str:
        return f"{record['finished']} {self.tracker.uri}\n"


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
            f"MLflow at {tracker.uri} is out of reach ({first_line(error)}); `qbench sync` mirrors later"
        )
    return None


def _mirror(mirror: MLflowMirror | None, records: list[Record], marks: _Marks) -> MLflowMirror | None:
    """Copy records; returns the mirror, or `None` from its first failure on: a dead server costs minutes a call."""
    for record in records if mirror else ():
        assert mirror is not None
        if not _guarded(partial(mirror.mirror, record)):
            return None
        marks.add(record)
    return mirror


def _guarded(action: Callable[[], object]) -> bool:
    """Whether MLflow did what it was asked to. If not, the records are safe, and the mirror can be made later."""
    try:
        action()
    except Exception as error:
        _complain(f"MLflow: {first_line(error)}; `qbench sync` mirrors later")
        return False
    return True


def sync(results: Path, tracker: TrackerSettings) -> int:
    """Mirror every record that MLflow does not hold yet; returns how many.

    Raises:
        UsageError: If there is nothing to mirror, nowhere to mirror it to, or MLflow does not answer.
    """
    store = RecordStore(results)
    records = list(store.all())
    if not records:
        raise UsageError(
            f"no records under {str(store.records)!r}; run e.g. `qbench -m algo=rtn,gptq wbits=4,3`"
        )
    if tracker.uri is None:
        raise UsageError("tracker=none has nowhere to mirror to; use tracker=mlflow or set tracker.uri=")
    try:
        mirror = MLflowMirror(tracker.uri, tracker.experiment, store)
        count = sum(mirror.mirror(record) for record in records)
        mirror.close()
    except ModuleNotFoundError as error:
        raise UsageError("MLflow is not installed; `pip install mlflow`") from error
    except Exception as error:
        raise UsageError(f"MLflow at {tracker.uri} could not be written ({first_line(error)})") from error
    return count


def keep_freed_memory() -> None:
    """Ask the C library to keep what is freed: large tensors would otherwise be mapped and zeroed anew each time.

    It is worth a quarter of an evaluation's time on a CPU (`benchmarks/README.md`). Only glibc has the call.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(m_mmap_threshold, 32 << 20)  # the most it takes
        mallopt(m_trim_threshold, 256 << 20)


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
