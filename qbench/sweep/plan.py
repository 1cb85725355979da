"""What a command asks for: cells to jobs, without those that cannot be, that are the same, or that are recorded."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from qbench.errors import Unsuitable, UsageError
from qbench.job import Job, canonical
from qbench.sweep.grid import Cell
from qbench.sweep.launch import Group
from qbench.sweep.schema import Settings
from qbench.sweep.settings import Jobs, floating_point
from qbench.track.records import RecordStore

_SHARED = ("results", "tracker", "launcher", "job", "plan")  # one for a whole sweep


@dataclass
class Plan:
    """What a command asks for.

    Attributes:
        settings: Of the first cell; what concerns the whole sweep is the same in all.
        wanted: The fingerprints of all jobs, without repetition, in order.
        todo: The jobs without a record that counts, ordered so that what they share is loaded once.
        again: Those of `todo` whose present record does not count: it failed, or `force=true`.
        cells: How many the grid has.
        pruned: How many cells each rule left out.
        duplicates: How many cells were a job that is wanted already.
        problems: What was asked for and cannot run: the cell, and why.
        left_out: Tasks whose data are missing, and why, where they may be.
    """

    settings: Settings | None = None
    wanted: dict[str, None] = field(default_factory=dict)
    todo: dict[str, Job] = field(default_factory=dict)
    again: set[str] = field(default_factory=set)
    cells: int = 0
    pruned: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def store(self) -> RecordStore:
        assert self.settings is not None
        return RecordStore(self.settings.results)

    def groups(self) -> dict[str, Group]:
        """The group of each job to do: jobs of one group share model, calibration data and evaluation."""
        return {fingerprint: group_of(job) for fingerprint, job in self.todo.items()}


def make_plan(cells: Iterable[Cell], *, is_sweep: bool) -> Plan:
    """Build, prune, de-duplicate and check jobs; what is recorded need not be checked again.

    A sweep also gets the floating-point model of each of its cells, first, unless `baseline=false`. In a single
    job, choices that do not go together are a problem; a sweep leaves the cell out.

    Raises:
        UsageError: If the cells do not share one results folder, tracker and launcher.
    """
    plan, jobs = Plan(), Jobs()
    baselines: dict[str, Job] = {}
    seen: set[tuple[Any, ...]] = set()
    recorded: set[str] = set()
    first: dict[str, Any] = {}
    for cell in cells:
        plan.cells += 1
        try:
            if cell.config is None:
                raise ValueError(cell.problem)
            config = cell.config
            job = jobs.job(config)
            if plan.settings is None:
                first, plan.settings = config, jobs.settings(config)
                recorded = _names(plan.store.records)
            if any(config[key] is not first[key] and config[key] != first[key] for key in _SHARED):
                raise UsageError(
                    f"{', '.join(_SHARED[:-1])} are one for a whole sweep; give each a single value"
                )
            if rule := _excluded(cell.exclude, job, config):
                raise Unsuitable(rule)
            if job.fingerprint in plan.wanted:
                plan.duplicates += 1
                continue
            _want(plan, job, recorded, force=config["force"])
            plan.left_out |= dict(job.evaluation.skipped)
            shared = (*(id(config[key]) for key in ("model", "eval", "data")), config["device"])
            if is_sweep and config["baseline"] and shared not in seen:
                seen.add(shared)
                baseline = jobs.job(floating_point(config))
                baselines[baseline.fingerprint] = baseline
        except UsageError:
            raise
        except Unsuitable as error:
            if is_sweep:
                plan.pruned[error.rule] += 1
            else:
                plan.problems.append((cell.name, str(error)))
        except (ValueError, NotImplementedError, OSError) as error:
            plan.problems.append((cell.name, " ".join(str(error).split())))
    _put_first(plan, baselines, recorded)
    _order(plan)
    return plan


def _want(plan: Plan, job: Job, recorded: set[str], *, force: bool) -> None:
    """Put a job on the plan, and on the list of what is to do unless its record counts.

    Raises:
        ValueError, NotImplementedError, OSError: If it cannot run.
    """
    fingerprint = job.fingerprint
    if fingerprint in recorded and not force and plan.store.is_done(fingerprint):
        plan.wanted[fingerprint] = None
        return
    job.check()
    plan.wanted[fingerprint] = None
    plan.todo[fingerprint] = job
    if fingerprint in recorded:
        plan.again.add(fingerprint)


def _put_first(plan: Plan, baselines: dict[str, Job], recorded: set[str]) -> None:
    wanted, todo = plan.wanted, plan.todo
    plan.wanted, plan.todo = {}, {}
    for fingerprint, job in baselines.items():
        if fingerprint not in wanted:
            try:
                _want(plan, job, recorded, force=job.settings["force"])
            except (ValueError, NotImplementedError, OSError) as error:
                plan.problems.append((job.title, " ".join(str(error).split())))
    plan.wanted |= wanted
    plan.todo |= todo


def _order(plan: Plan) -> None:
    """One model after another, and in each one calibration set after another: what is shared is loaded once."""
    groups = plan.groups()
    ranks = [
        {part: i for i, part in enumerate(dict.fromkeys(g[axis] for g in groups.values()))}
        for axis in range(3)
    ]
    plan.todo = dict(
        sorted(
            plan.todo.items(),
            key=lambda item: tuple(rank[part] for rank, part in zip(ranks, groups[item[0]], strict=True)),
        )
    )


def group_of(job: Job) -> Group:
    """What a job shares with others: its model, calibration data and evaluation, as short digests."""
    return _digest(job.model), _digest(job.calib) if job.calib else "", _digest(job.evaluation)


@lru_cache(maxsize=1 << 16)
def _digest(part: Any) -> str:
    return hashlib.sha256(canonical(part).encode()).hexdigest()[:8]


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _excluded(exclude: Sequence[dict[str, Any]], job: Job, config: dict[str, Any]) -> str | None:
    """The first exclusion of the sweep that the cell meets, in words."""
    for rule in exclude:
        values = {key: _value(key, job, config) for key in rule}
        if all(str(values[key]) in {str(v) for v in _as_list(rule[key])} for key in rule):
            return "left out by the sweep: " + " ".join(f"{key}={value}" for key, value in rule.items())
    return None


def _value(key: str, job: Job, config: dict[str, Any]) -> Any:
    if key in job.labels:
        return job.labels[key]
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
