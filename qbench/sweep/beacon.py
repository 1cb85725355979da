"""What a worker does at the moment, in a file that anybody who sees the results folder can read.

results/workers/<name>.json
"""

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qbench.track.claims import is_dead, this_process

_OLD = 86_400  # seconds after which the file of a worker that was killed is swept up


@dataclass
class Beacon:
    """One worker's file; rewritten at every phase of a job and every second or so.

    A disk that is full does not stop it: what is shown is then old, and nothing else is lost.
    """

    folder: Path
    name: str
    launch: str
    log: str | None = None
    state: dict[str, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.json"

    def __enter__(self) -> Self:
        self.state = {
            "name": self.name, "launch": self.launch, "host": socket.gethostname(), **this_process(),
            "log": self.log, "state": "starting", "since": time.time(), "job": None, "title": "", "phase": "", "memory": "",
            "block": None, "done": 0, "failed": 0,
        }  # fmt: skip
        self.write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def update(self, **fields: Any) -> None:
        self.state.update(fields)
        self.write()

    def count(self, status: str) -> None:
        """Note that a job ended; its claim is over."""
        self.state["done" if status == "done" else "failed"] += 1
        self.update(state="between jobs", job=None, claim=None)

    def write(self) -> None:
        with self._lock:
            try:
                draft = self.path.with_suffix(".tmp")
                draft.write_text(json.dumps(self.state))
                draft.replace(self.path)
            except OSError:
                with contextlib.suppress(OSError):
                    os.utime(self.path)  # takes no room, and says that the worker lives

    def remove(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def read(path: Path, now: float) -> dict[str, Any] | None:
    """What a worker says, with `age`: seconds since it said it; `None` if it says nothing.

    `now` is by the clock of the file system: `Claims.now`.
    """
    with contextlib.suppress(OSError, ValueError):
        age = now - path.stat().st_mtime
        return json.loads(path.read_text()) | {"age": age}
    return None


def beacons(folder: Path, now: float, launch: str | None = None) -> list[dict[str, Any]]:
    """What the workers (of one launch) say, by name; those that are known to be gone say nothing."""
    found = [state for path in sorted(folder.glob("*.json")) if (state := read(path, now)) is not None]
    return [state for state in found if launch in (None, state["launch"]) and not is_dead(state)]


def sweep_up(folder: Path, now: float) -> None:
    """Delete the files of workers that were killed."""
    for path in folder.glob("*.json"):
        state = read(path, now)
        if state is not None and (state["age"] > _OLD or is_dead(state)):
            path.unlink(missing_ok=True)
