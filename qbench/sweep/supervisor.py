"""Worker processes on this machine: started, watched, replaced when they are lost, stopped."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from qbench.sweep.beacon import read
from qbench.sweep.worker import FINISHED, RENEWED, STOPPED, TIMED_OUT, UNWRITABLE, interrupt, tail
from qbench.track.claims import Claim, Claims

_GRACE = 5.0  # seconds that a worker has to stop in
_BARREN = 2  # workers in a row that may end before they ran anything


class LaunchError(RuntimeError):
    """Workers cannot be had or cannot work; what is recorded is safe."""


@dataclass
class _Slot:
    """One worker at a time, and its successors."""

    start: float
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    name: str = ""
    log: Path = Path()
    n_started: int = 0
    has_worked: bool = False
    barren: int = 0


@dataclass
class Supervisor:
    """Keeps worker processes of one launch going.

    Attributes:
        root: The results folder.
        starts: Where among the groups each worker begins, from 0 to 1.
        threads: Of each worker.
        devices: What each worker may see as CUDA devices, in turn; empty to leave it as it is.
    """

    root: Path
    launch: str
    starts: list[float]
    threads: int
    devices: list[str] = field(default_factory=list)
    lease: float = 60.0
    _slots: list[_Slot] = field(default_factory=list)
    _last_running: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._claims = Claims(self.root / "claims", self.lease)

    def __enter__(self) -> Self:
        for index, start in enumerate(self.starts):
            # Before torch is imported: worker processes that each use all cores slow each other down manifold.
            environment = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
            if self.devices:
                environment["CUDA_VISIBLE_DEVICES"] = self.devices[index % len(self.devices)]
            self._slots.append(_Slot(start, environment))
            self._spawn(self._slots[-1])
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        return any(slot.process is not None for slot in self._slots)

    def poll(self) -> None:
        """See to workers that ended or hang.

        Raises:
            LaunchError: If workers cannot start, or the results folder cannot be written.
        """
        if not self.running and time.monotonic() - self._last_running > self.lease:
            raise LaunchError(
                "all workers have ended, and jobs are left"
            )  # not just records on their way here
        for slot in self._slots:
            if slot.process is None:
                continue
            code = slot.process.poll()
            self._last_running = time.monotonic()
            if code is None:
                self._look_after(slot)
            elif code == FINISHED:
                slot.process = None
            elif code == UNWRITABLE:
                raise LaunchError(f"results cannot be written: {tail(slot.log)[-300:].strip()}")
            else:
                self._replace(slot, code)

    def _replace(self, slot: _Slot, code: int) -> None:
        state = read(self._beacon(slot), self._claims.now())
        has_worked = slot.has_worked or code in (TIMED_OUT, RENEWED) or bool(state and state["job"])
        slot.barren = 0 if has_worked else slot.barren + 1
        if slot.barren >= _BARREN:
            raise LaunchError(
                f"workers {_end_of(code)} before they ran a job; the end of {slot.log}: {_last_line(slot.log)}"
            )
        if state and state.get("claim") and code not in (TIMED_OUT, STOPPED, RENEWED):
            log = tail(Path(state["log"]), state.get("log_from", 0)) if state["log"] else ""
            self._claims.note_death(Path(state["claim"]), f"the worker {_end_of(code)}", log)
        self._beacon(slot).unlink(missing_ok=True)
        self._spawn(slot)

    def _look_after(self, slot: _Slot) -> None:
        """Kill a worker that holds a job and has not stirred for a lease: a thread of its own should have."""
        state = read(self._beacon(slot), self._claims.now())
        slot.has_worked = slot.has_worked or bool(state and (state["done"] or state["failed"]))
        if state and state["state"] == "running" and state["age"] > self.lease and slot.process is not None:
            slot.process.kill()

    def _spawn(self, slot: _Slot) -> None:
        slot.n_started += 1
        slot.has_worked = False
        slot.name = (
            f"{self.launch}-{socket.gethostname()}-{os.getpid()}-{self._slots.index(slot)}.{slot.n_started}"
        )
        slot.log = self.root / "logs" / f"{slot.name}.log"
        command = [
            sys.executable, "-m", "qbench", "worker", f"results={self.root}", f"launch={self.launch}",
            f"name={slot.name}", f"start={slot.start}", f"parent={os.getpid()}",
        ]  # fmt: skip
        with slot.log.open("ab") as log:
            slot.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=os.environ | slot.environment | {"QBENCH_LOG": str(slot.log.absolute())},
            )  # fmt: skip

    def stop(self) -> None:
        """End all workers; a job that one was at is given back."""
        processes = [slot.process for slot in self._slots if slot.process is not None]
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for slot in self._slots:
            if slot.process is not None and (state := read(self._beacon(slot), 0.0)):
                if state.get("claim"):
                    Claim(Path(state["claim"])).give_back()
                self._beacon(slot).unlink(missing_ok=True)
            slot.process = None

    def _beacon(self, slot: _Slot) -> Path:
        return self.root / "workers" / f"{slot.name}.json"


def serve_shard(root: str, launch: str, start: float, threads: int, lease: float) -> None:
    """Keep one worker going until it finds nothing left: what a Slurm task and a Ray actor do.

    The worker is a process of its own here too, so that a job that hangs or kills it does not end the task.
    """
    with contextlib.suppress(ValueError):  # Ray does not run it in the main thread, and kills
        signal.signal(signal.SIGTERM, interrupt)
    with Supervisor(Path(root), launch, [start], threads, lease=lease) as supervisor:
        while supervisor.running:
            supervisor.poll()
            time.sleep(0.5)


def spread(n: int) -> list[float]:
    """Where each of `n` workers begins."""
    return [i / n for i in range(n)]


def _end_of(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    hint = ", as the system does when memory is full" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{hint}"


def _last_line(path: Path) -> str:
    return next(iter(reversed(tail(path).strip().splitlines())), "nothing was logged")
