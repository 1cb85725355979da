"""The loop that runs jobs: claim one, run it, record it. The same on every machine and under every launcher."""

import contextlib
import errno
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import psutil
import torch

from qbench.errors import first_line
from qbench.job import Job
from qbench.measure import Reporter, Shared
from qbench.opening import clear_partial
from qbench.run import Outcome, failure, run
from qbench.sweep.beacon import Beacon
from qbench.sweep.launch import Group, Launch, by_group
from qbench.track.claims import Claim, Claims

# Exit codes of a worker process, for its supervisor.
FINISHED, TIMED_OUT, UNWRITABLE, STOPPED, RENEWED = 0, 75, 74, 76, 77

Result = TypeVar("Result")

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EFBIG}
_LOADING = 1800.0  # seconds of loading that do not count towards job.timeout
_PATIENCE = 60.0  # seconds to wait for a results folder that cannot be written
_LOG_TAIL = 4000  # characters of a worker's log that a failed record keeps


class StoreTrouble(OSError):
    """The results folder could not be written for as long as a worker waits."""


@dataclass
class Worker:
    """Runs the jobs of a launch until all are over, sharing them with whoever else does.

    Attributes:
        start: Where among the groups to begin, from 0 to 1, so that several workers begin apart.
        own_process: Whether the process does nothing else and may be ended to end a job that hangs.
        parent: The process that must stay alive for this one to go on.
        log: The file that this process's output goes to.
        report: Told of every phase and block.
    """

    launch: Launch
    claims: Claims
    beacon: Beacon
    start: float = 0.0
    own_process: bool = True
    parent: int | None = None
    log: Path | None = None
    report: Callable[[dict[str, Any]], None] = lambda state: None
    _shared: Shared = field(default_factory=Shared)
    _left: dict[Group, list[str]] = field(default_factory=dict)
    _group: Group | None = None
    is_spoiled: bool = False

    def run(self) -> Iterator[str]:
        """Run jobs until none is left; yields the fingerprint of each record that it writes.

        Raises:
            StoreTrouble: If a record could not be written.
        """
        self._left = by_group(self.launch.groups, self.launch.configs)
        names = list(self._left)
        first = int(self.start * len(names))
        self._left = {name: self._left[name] for name in names[first:] + names[:first]}
        with self.beacon:
            while (taken := self._patiently(self._next)) is not None and not self.is_spoiled:
                fingerprint, claim = taken
                try:
                    if self._execute(fingerprint, claim):
                        claim.finish()
                        yield fingerprint
                finally:
                    claim.give_back()  # unless it is finished

    def _next(self) -> tuple[str, Claim] | None:
        """Claim a job: of the group at hand, of one that nobody works on, or of the longest; waits for claims to end."""
        while not self.is_spoiled:
            if self.is_orphan():
                raise KeyboardInterrupt
            if self._group in self._left and (taken := self._take(self._group)):
                return taken
            self._left = {g: left for g, jobs in self._left.items() if (left := self._not_over(jobs))}
            if not self._left:
                return None
            for group in self._untouched():
                if taken := self._take(group):
                    self._group = group
                    return taken
            for group in sorted(self._left, key=lambda g: -len(self._left[g])):
                # A stolen job comes from the far end of its group, where its owner arrives last.
                if taken := self._take(group, backwards=True):
                    return taken
            self.beacon.update(state="waiting", job=None, title="", phase="")
            time.sleep(0.5)
        return None

    def is_orphan(self) -> bool:
        """Whether the launcher that started this worker is gone."""
        return self.parent is not None and os.getppid() != self.parent

    def _not_over(self, fingerprints: list[str]) -> list[str]:
        return [f for f in fingerprints if not self.launch.is_over(f)]

    def _untouched(self) -> list[Group]:
        """The groups that nobody works on."""
        return [g for g, jobs in self._left.items() if not any(self.claims.held(f) for f in jobs)]

    def _take(self, group: Group, *, backwards: bool = False) -> tuple[str, Claim] | None:
        jobs = self._left[group]
        for fingerprint in list(reversed(jobs) if backwards else jobs):
            if self.launch.is_over(fingerprint):
                jobs.remove(fingerprint)
            elif (claim := self.claims.take(fingerprint, self.launch.rules.since)) is not None:
                jobs.remove(fingerprint)
                if not self.launch.is_over(fingerprint):
                    return fingerprint, claim
                claim.give_back()  # its record came between the two looks
        return None

    def _execute(self, fingerprint: str, claim: Claim) -> bool:
        """Run one job and keep its record; says whether it was kept."""
        job = self.launch.job(fingerprint)
        started = datetime.now(UTC)
        log_from = self.log.stat().st_size if self.log else 0
        if claim.broken >= self.launch.rules.attempts:
            death = self.claims.last_death(claim)
            reason = f"{death['reason']}; {claim.broken} workers were lost on this job"
            self.keep(Outcome(failure(job, started, "killed", reason, log=death["log"])), claim)
            return True
        self.beacon.update(
            state="running", job=fingerprint, title=job.title, phase="load", memory="", job_since=time.time(),
            block=None, claim=str(claim.path), log_from=log_from,
        )  # fmt: skip
        watch = _Watch(self, job, claim, started, log_from)
        with watch:
            outcome = run(job, self._shared, Reporter(self._on_phase, self._on_block, self._on_memory))
        if claim.lost:
            print(f"{job.title}: another worker took the job during a long silence; dropped here", flush=True)
            self._left.setdefault(self.launch.groups[fingerprint], []).append(
                fingerprint
            )  # it may be lost there too
            return False
        if outcome.record["status"] == "failed":
            outcome.record["log_tail"] = self.log_tail(log_from)
            if self.log is not None:
                print(f"{job.title}: failed\n{outcome.record['traceback']}", flush=True)
        outcome.record["worker"] = self.claims.worker
        if watch.system:
            outcome.record["system"] = watch.system
        try:
            self.keep(outcome, claim)
            if outcome.record["status"] == "done":
                clear_partial(job)
        except (TypeError, ValueError) as error:  # a result that cannot be stored is a failure of its job
            outcome = Outcome(failure(job, started, "raised", first_line(error), traceback.format_exc()))
            self.keep(outcome, claim)
        # After such an error nothing works on the device any more, until a new process opens it anew.
        self.is_spoiled = self.own_process and "CUDA error" in outcome.record.get("reason", "")
        self.beacon.count(outcome.record["status"])
        return True

    def _on_phase(self, name: str) -> None:
        self.beacon.update(phase=name, block=None)
        self.report(self.beacon.state)

    def _on_block(self, done: int, total: int) -> None:
        self.beacon.state["block"] = [done, total]  # written with the next beat
        self.report(self.beacon.state)

    def _on_memory(self, line: str) -> None:
        self.beacon.update(memory=line)
        self.report(self.beacon.state)

    def keep(self, outcome: Outcome, claim: Claim) -> None:
        """Write a record, waiting for room if there is none.

        Raises:
            StoreTrouble: If there is none for long.
        """
        self._patiently(lambda: self.launch.store.write(outcome.record, outcome.samples), claim)

    def _patiently(self, action: Callable[[], Result], claim: Claim | None = None) -> Result:
        """Do it again for a while where the results folder cannot be written, keeping `claim` alive."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return action()
            except OSError as error:
                if error.errno not in _UNWRITABLE:
                    raise
                if time.monotonic() > deadline:
                    raise StoreTrouble(error.errno, error.strerror or "cannot be written") from error
                print(f"results cannot be written ({error.strerror}); waiting", file=sys.stderr, flush=True)
            if claim is not None:
                claim.beat()
            self.beacon.write()
            time.sleep(2.0)

    def log_tail(self, log_from: int) -> str:
        """What this process has logged since the job began."""
        return tail(self.log, log_from) if self.log else ""


@dataclass
class _Watch:
    """Keeps a claim alive while a job runs, and ends what hangs."""

    worker: Worker
    job: Job
    claim: Claim
    started: datetime
    log_from: int
    system: list[dict[str, float]] = field(default_factory=list)
    _process: psutil.Process = field(default_factory=psutil.Process)
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> "_Watch":
        self._thread = threading.Thread(target=self._beat, args=(threading.get_ident(),), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _beat(self, runner: int) -> None:
        timeout, lease = self.worker.launch.rules.timeout, self.worker.launch.rules.lease
        began = counted = time.monotonic()
        while not self._over.wait(min(1.0, lease / 4, (timeout or 4.0) / 4)):
            self.claim.beat()
            self.worker.beacon.write()
            if self.worker.launch.rules.system_metrics:
                self._sample()
            if self.worker.is_orphan():
                self.claim.give_back()
                self.worker.beacon.remove()
                os._exit(STOPPED)
            now = time.monotonic()
            # What a job loads serves those after it too, and may come over a network: it has a limit of its own.
            if self.worker.beacon.state["phase"] == "load" and now - began < _LOADING:
                counted = now
            if timeout is not None and now - counted > timeout and self.worker.own_process:
                self._end(runner, timeout)

    def _sample(self) -> None:
        """Note what the process uses, under the names that MLflow gives such numbers."""
        now = {
            "t": int(time.time() * 1000),
            "cpu_utilization_percentage": self._process.cpu_percent(),
            "system_memory_usage_megabytes": self._process.memory_info().rss / 1e6,
        }
        if self.job.device != "cpu":
            now["gpu_memory_usage_megabytes"] = torch.cuda.memory_allocated(self.job.device) / 1e6
        self.system.append(now)

    def _end(self, runner: int, timeout: float) -> None:
        """Record that the job took too long, and end the process: a call into a library cannot be interrupted."""
        frame: FrameType | None = sys._current_frames().get(runner)
        trace = "".join(traceback.format_stack(frame)) if frame else ""
        log = self.worker.log_tail(self.log_from)
        reason = f"job.timeout: still running after {timeout:g} s"
        if self._over.is_set():  # it ended at the last moment, and its runner waits for this thread
            return
        with contextlib.suppress(OSError):
            self.worker.keep(
                Outcome(failure(self.job, self.started, "timeout", reason, trace, log)), self.claim
            )
        self.claim.finish()
        self.worker.beacon.remove()
        os._exit(TIMED_OUT)


def serve(root: Path, launch: str | None, name: str | None, start: float, parent: int | None) -> int:
    """Be a worker process; returns its exit code.

    Raises:
        UsageError: If there is nothing to work on.
    """
    from qbench.memory.allocator import keep_freed_memory

    if parent is not None:  # a terminal sends it to workers too, and stopping them is the launcher's
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, interrupt)
    log = Path(os.environ["QBENCH_LOG"]).absolute() if "QBENCH_LOG" in os.environ else None
    found = Launch.load(root, launch)
    os.environ["QBENCH_COMMAND"] = found.command
    name = name or f"{socket.gethostname()}-{os.getpid()}"
    claims = Claims(found.root / "claims", found.rules.lease, name)
    beacon = Beacon(found.root / "workers", name, found.id, str(log) if log else None)
    worker = Worker(found, claims, beacon, start, parent=parent, log=log)
    keep_freed_memory()
    try:
        for _ in worker.run():
            pass
    except KeyboardInterrupt:
        return STOPPED
    except StoreTrouble as error:
        print(
            f"results folder {str(found.root)!r} cannot be written: {error.strerror}",
            file=sys.stderr,
            flush=True,
        )
        return UNWRITABLE
    return RENEWED if worker.is_spoiled else FINISHED


def interrupt(*_: object) -> None:
    """A signal handler that ends what runs as Ctrl-C does."""
    raise KeyboardInterrupt


def tail(path: Path, start: int = 0) -> str:
    """The end of what a log says from `start` on."""
    with contextlib.suppress(OSError), path.open(errors="replace") as file:
        file.seek(start)
        return file.read()[-_LOG_TAIL:]
    return ""
