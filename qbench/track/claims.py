"""Who is running which job: files in the results folder, so that workers need nothing but that folder in common.

    results/claims/<fingerprint>.<n>

The n-th claim of a job is a file that only one process can create, which its holder touches every few
seconds. A claim is over when its holder gives it back, dies, or has not touched it for a while; the next worker then
creates the (n+1)-th. Nothing is renamed and nothing is deleted while a sweep runs, so there is no moment in
which two workers can hold a job, on a network file system neither.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

_GIVEN_BACK, _FINISHED = 0, 1  # modification times of claims that are over, and why
_SEEN_WITHIN = 120  # seconds after which a file is seen by every machine
_OLD = 86_400  # seconds after which a claim that is over is swept up


def this_machine() -> str:
    """A name for the place where process ids mean something: host, boot and process namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


@dataclass
class Claim:
    """The right to run one job, as long as it is touched.

    Attributes:
        broken: How many holders before this one were lost since one last gave the job back.
        lost: Set once another worker has taken the job, which it does after a long silence.
    """

    path: Path
    broken: int = 0
    lost: bool = False

    def beat(self) -> None:
        """Say that the holder lives."""
        with contextlib.suppress(OSError):  # a network file system may be out of reach for a while
            if self._next.exists():  # this process slept for longer than the lease
                self.lost = True
            else:
                os.utime(self.path)

    def give_back(self) -> None:
        """Let the next worker have the job at once."""
        self._mark(_GIVEN_BACK)

    def finish(self) -> None:
        """Say that the job has a record: another machine may not see it yet, since absence is cached."""
        self._mark(_FINISHED)

    def _mark(self, how: int) -> None:
        with contextlib.suppress(OSError):
            if self.path.stat().st_mtime > _FINISHED:
                os.utime(self.path, (how, how))

    @property
    def _next(self) -> Path:
        return self.path.with_suffix(f".{int(self.path.suffix[1:]) + 1}")


@dataclass
class Claims:
    """The claims under one results folder, as one process sees them.

    Attributes:
        lease: Seconds of silence after which a claim is over; on one machine it is as soon as its holder is dead.
    """

    root: Path
    lease: float = 60.0
    worker: str = field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}")
    _offset: tuple[float, float] | None = None

    def take(self, fingerprint: str, since: float = float("inf")) -> Claim | None:
        """Claim a job; `None` while somebody else holds it, or if it was finished after `since` (by `now`)."""
        number, broken = 0, 0
        while True:
            path = self.root / f"{fingerprint}.{number}"
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                state = self._state(path)
                if state == "held" or (state == "finished" and self._is_recent(path, since)):
                    return None
                number, broken = number + 1, broken + 1 if state == "broken" else 0
                continue
            claim = Claim(path, broken)
            try:
                with os.fdopen(descriptor, "w") as file:
                    json.dump({"worker": self.worker} | this_process(), file)
            except OSError:  # the disk is full
                claim.give_back()
                raise
            return claim

    def _is_recent(self, path: Path, since: float) -> bool:
        """Whether a claim ended after `since`, and so lately that the record may not be seen everywhere yet."""
        ended = path.stat().st_ctime
        return ended >= since and self.now() - ended < _SEEN_WITHIN

    def reset(self, fingerprints: list[str]) -> None:
        """Give back what holders before this launch lost: only losses that it sees count against a job."""
        for fingerprint in fingerprints:
            for path in self._of(fingerprint):
                if self._state(path) == "broken":
                    Claim(path).give_back()

    def held(self, fingerprint: str) -> bool:
        return any(self._state(path) == "held" for path in self._of(fingerprint))

    def note_death(self, claim: Path, reason: str, log: str) -> None:
        """Leave word of how the holder of `claim` ended, for the record of the job."""
        with contextlib.suppress(OSError):
            claim.with_name(f"death-{claim.name}").write_text(json.dumps({"reason": reason, "log": log}))

    def last_death(self, claim: Claim) -> dict[str, str]:
        """What is known of the end of the holder before this one."""
        before = claim.path.with_suffix(f".{int(claim.path.suffix[1:]) - 1}")
        with contextlib.suppress(OSError, ValueError):
            return json.loads(before.with_name(f"death-{before.name}").read_text())
        holder = _read(before)
        return {"reason": f"worker {holder.get('worker', 'unknown')} was lost without a word", "log": ""}

    def sweep_up(self) -> None:
        """Delete the claims of jobs that nobody has touched for a day."""
        files: dict[str, list[Path]] = {}
        for path in self.root.iterdir() if self.root.is_dir() else ():
            files.setdefault(path.name.removeprefix("death-").partition(".")[0], []).append(path)
        for paths in files.values():
            if max(_touched(path) for path in paths) < time.time() - _OLD:
                for path in paths:
                    path.unlink(missing_ok=True)

    def _of(self, fingerprint: str) -> Iterator[Path]:
        number = 0
        while (path := self.root / f"{fingerprint}.{number}").exists():
            yield path
            number += 1

    def _state(self, path: Path) -> str:
        """`held`, `given back`, `finished`, or `broken`: its holder died or fell silent."""
        try:
            touched = path.stat().st_mtime
        except FileNotFoundError:
            return "given back"
        if touched <= _FINISHED:
            return "given back" if touched == _GIVEN_BACK else "finished"
        if is_dead(_read(path)):
            return "broken"
        return "broken" if self.now() - touched > self.lease else "held"

    def now(self) -> float:
        """The clock of the file system that holds the claims: those of two machines may differ by minutes."""
        if self._offset is None or time.monotonic() - self._offset[0] > 60:
            probe = self.root / f"clock-{self.worker}-{threading.get_ident()}"
            probe.touch()
            self._offset = time.monotonic(), probe.stat().st_mtime - time.monotonic()
            probe.unlink(missing_ok=True)
        return self._offset[1] + time.monotonic()


def _touched(path: Path) -> float:
    """When a file was last changed in any way: giving a claim back sets only the time of its modification."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return 0.0
    return max(stat.st_mtime, stat.st_ctime)


def this_process() -> dict[str, Any]:
    """What tells this process from all others, on every machine."""
    return {"machine": this_machine(), "pid": os.getpid(), "born": _born(os.getpid())}


def is_dead(holder: dict[str, Any]) -> bool:
    """Whether a process is known to be gone; of one on another machine nothing is known."""
    return holder.get("machine") == this_machine() and not _alive(holder)


def _alive(holder: dict[str, Any]) -> bool:
    try:
        # A process id may have been given to another process since.
        return _born(holder["pid"]) == holder["born"] and (
            psutil.Process(holder["pid"]).status() != psutil.STATUS_ZOMBIE
        )
    except (psutil.Error, OSError):
        return False


def _born(pid: int) -> float:
    """When a process began, in a unit of the system's own."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.is_dir():
        # Ticks since the machine started: seconds since 1970 change when somebody sets the clock.
        return float(stat.read_text().rpartition(")")[2].split()[19])
    return round(psutil.Process(pid).create_time())


def _read(path: Path) -> dict[str, Any]:
    """Whose claim it is; empty in the instant between its creation and its first content."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}
