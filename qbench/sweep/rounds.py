"""The smallest sweep that decides: candidates in rounds, on more and more windows, until the choice is sure.

Jobs of rounds are jobs like any others: a search that was interrupted takes up from its records.
"""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from qbench.errors import UsageError
from qbench.job import Job
from qbench.report.cells import Cells
from qbench.report.recommend.candidates import Field, Latency, fields
from qbench.report.recommend.decision import Limits
from qbench.report.recommend.halving import Dropped, Settled, dropped, kept, settle
from qbench.sweep.contenders import contenders, excess
from qbench.sweep.grid import Cell
from qbench.sweep.limits import Constraints, read
from qbench.sweep.plan import make_plan
from qbench.sweep.preview import print_plan
from qbench.sweep.progress import complain
from qbench.sweep.sensitivity import output, say
from qbench.sweep.session import complete
from qbench.track.records import Record, RecordStore

_WINDOWS = 64  # of the last round, where eval.max_windows says nothing
_LEAST = 8  # of the first: resamples of fewer are too much alike
_ROUNDS = 3
SURE = 0.95
_ROWS = ("scheme", "algo", "calib")
_NO_RECIPE = ("results", "tracker", "launcher", "job", "plan", "force", "device")


@dataclass(frozen=True)
class Outcome:
    """A decision and the limits that it keeps to, `max_bits` among the bytes."""

    settled: Settled
    limits: Limits


@dataclass(frozen=True)
class Search:
    """What a search is for, and where its records are."""

    asked: Constraints
    config: dict[str, Any]
    store: RecordStore
    clock: Latency | None

    def judge(self, records: Sequence[Record], texts: Sequence[str] = ()) -> Outcome | None:
        """Decide from records of one model; `None` where no two of them can be compared."""
        if not (found := self._fields(records, texts)):
            return None
        limits = self._limits(found[0])
        return Outcome(settle(found, limits, self.asked.prefer), limits)

    def _fields(self, records: Sequence[Record], texts: Sequence[str] = ()) -> list[Field]:
        done = [record for record in records if record["status"] == "done"]
        return fields(Cells.of(done, self.store, _ROWS, metrics=("ppl/*",)), self.clock, texts)

    def _limits(self, found: Field) -> Limits:
        floating = found.floating.record["metrics"]
        return self.asked.with_size(8e6 * floating["model_mb"] / floating["bits_per_weight"])

    @property
    def began(self) -> bool:
        """Whether a search of the same recipes began here and may not be over: same limits, or jobs without a record."""
        for about in self.store.sweeps().values():
            words = shlex.split(about["command"])
            if words[:2] != ["qbench", "recommend"]:
                continue
            try:
                theirs = read(words[2:])
            except UsageError:
                continue
            unfinished = any(self.store.written(fingerprint) is None for fingerprint in about["jobs"])
            alike = replace(theirs, arguments=(), search=False) == replace(
                self.asked, arguments=(), search=False
            )
            if _recipes(theirs) == _recipes(self.asked) and (alike or unfinished):
                return True
        return False

    def run(self) -> Outcome | None:
        """Run rounds of candidates until the choice is sure; `None` if there was only a plan to show.

        Raises:
            UsageError: If no candidate can run, or none was measured.
        """
        jobs = contenders(self.asked.arguments)
        over = {job.fingerprint: excess(job, self.asked, self.clock) for job in jobs}
        fitting = [job for job in jobs if over[job.fingerprint] <= 0]
        rest_may_tell = self.asked.limits.max_ppl_increase is not None
        if not fitting and not rest_may_tell:  # the nearest are known before they run
            fitting = [job for job in jobs if over[job.fingerprint] <= min(over.values())]
        outcome = self._rounds(fitting or jobs)
        if (
            outcome is None
            or outcome.settled.decision.meets
            or not rest_may_tell
            or len(fitting) in (0, len(jobs))
        ):
            return outcome
        say(output(), "nothing keeps to all limits; what is too large or slow tells how near one comes")
        return self._rounds(jobs)

    def _rounds(self, jobs: list[Job]) -> Outcome | None:
        last = self.config["eval"]["max_windows"] or _WINDOWS
        windows = sorted({max(min(_LEAST, last), math.ceil(last / 2**i)) for i in range(_ROUNDS)})
        console, outcome, gone = output(), None, list[Dropped]()
        say(
            console,
            f"{len(jobs)} candidates, on {', then '.join(map(str, windows))} windows of each text, until the choice is sure",
        )
        for number, n in enumerate(windows, 1):
            candidates = {_on(job, n).fingerprint: job for job in jobs}
            records = self._round([_on(job, n) for job in jobs])
            if records is None:
                return None
            found = self._found(records)
            if outcome is not None:
                gone += dropped(outcome.settled.found, outcome.settled.decision, found)
            limits = self._limits(found)
            outcome = Outcome(
                replace(settle([found], limits, self.asked.prefer), dropped=tuple(gone)), limits
            )
            decision = outcome.settled.decision
            _say_round(console, number, n, outcome)
            exhausted = all(text.shape[1] < n for text in found.floating.change)
            if decision.share >= SURE or exhausted:
                break
            going_on = {r["fingerprint"] for c in kept(decision) for r in c.records}
            jobs = [job for fingerprint, job in candidates.items() if fingerprint in going_on]
        return outcome

    def _round(self, jobs: Sequence[Job]) -> list[Record] | None:
        """Judge jobs; `None` if there was only a plan to show.

        Raises:
            UsageError: If nothing can run, or the launcher gave up.
        """
        plan = make_plan([Cell(job.title, job.settings) for job in jobs], is_sweep=True)
        for name, problem in plan.problems:
            complain(f"skipped {name}: {problem}")
        if plan.settings is None or not plan.wanted:
            raise UsageError("no candidate can run, as said above")
        if plan.settings.plan:
            print_plan(plan)
            return None
        records, unfinished = complete(plan, plan.settings, is_sweep=True)
        if unfinished:
            raise UsageError("the search is not over; the same command takes up from here")
        return records

    def _found(self, records: Sequence[Record]) -> Field:
        """What a round measured; what failed is said.

        Raises:
            UsageError: If there is nothing to compare.
        """
        failed = [_failure(record) for record in records if record["status"] == "failed"]
        for line in failed:
            complain(f"left out {line}")
        if not (found := self._fields(records)):
            raise UsageError(
                "no candidate was measured beside the floating-point model"
                + (f"; {failed[0]}; `qbench retry results={self.store.root}` tries again" if failed else "")
            )
        return found[0]


def _on(job: Job, windows: int) -> Job:
    """The job on so many windows."""
    section = job.settings["eval"] | {"max_windows": windows}
    return replace(
        job,
        evaluation=replace(job.evaluation, max_windows=windows),
        settings=job.settings | {"eval": section, "baseline": True},
    )


def _failure(record: Record) -> str:
    labels = record["labels"]
    title = " ".join(str(labels[key]) for key in ("model", "algo", "scheme", "calib") if labels[key])
    return f"{title}: {record['reason']}"


def _say_round(console: Console, number: int, windows: int, outcome: Outcome) -> None:
    decision = outcome.settled.decision
    say(
        console,
        f"round {number}: {len(decision.candidates) - 1} recipes on {windows} windows of each text, "
        f"{decision.chosen.title} in {decision.share:.0%} of resamples",
    )


def _recipes(asked: Constraints) -> set[str]:
    return {a for a in asked.arguments if a.partition("=")[0].partition(".")[0] not in _NO_RECIPE}
