"""One launch of a sweep: the jobs that are left, in a file that workers anywhere can read.

    results/launches/<id>.json

The jobs are kept as configs, of which most parts are the same: each part is stored once.
"""

import json
import os
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qbench.errors import UsageError
from qbench.job import Job
from qbench.sweep.settings import Jobs
from qbench.track.records import RecordStore

_FORGOTTEN = 60 * 86_400  # seconds after which a launch that was killed is swept up

Group = tuple[str, ...]


@dataclass(frozen=True)
class Rules:
    """How the workers of a launch treat its jobs.

    Attributes:
        since: When the launch began, by the clock of the file system.
        timeout: Seconds that a job may take; `None` for as long as it likes.
        attempts: How many workers may be lost on a job before it counts as failed.
        lease: Seconds of silence after which another machine's claim is over.
        system_metrics: Whether to record what jobs use of processor and memory.
    """

    since: float
    timeout: float | None = None
    attempts: int = 2
    lease: float = 60.0
    system_metrics: bool = False


@dataclass
class Launch:
    """The jobs of a launch, in the order in which one worker would run them.

    Attributes:
        configs: By fingerprint.
        groups: By fingerprint: jobs of one group share model, calibration data and evaluation.
        again: Jobs whose present record does not count, because it failed or was not wanted any more.
    """

    root: Path
    rules: Rules
    configs: dict[str, dict[str, Any]]
    groups: dict[str, Group]
    again: set[str] = field(default_factory=set)
    command: str = ""
    id: str = field(default_factory=lambda: f"{time.strftime('%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}")

    _jobs: Jobs = field(default_factory=Jobs)

    @property
    def store(self) -> RecordStore:
        return RecordStore(self.root)

    @property
    def path(self) -> Path:
        return self.root / "launches" / f"{self.id}.json"

    def is_over(self, fingerprint: str) -> bool:
        """Whether the job has a record that counts, whoever ran it."""
        written = self.store.written(fingerprint)
        if written is None:
            return False
        return written >= self.rules.since if fingerprint in self.again else True

    def job(self, fingerprint: str) -> Job:
        """Build a job.

        Raises:
            UsageError: If this machine makes another job of the same config.
        """
        job = self._jobs.job(self.configs[fingerprint])
        if job.fingerprint != fingerprint:
            raise UsageError(
                f"job {fingerprint} is {job.fingerprint} here ({job.title}): Python, qbench or the model's files differ "
                "from those of the machine that planned it; make them the same"
            )
        return job

    def save(self) -> None:
        """Write the file; other machines find the model and data by the paths that this one used."""
        parts: dict[str, int] = {}

        def number(part: Any) -> int:
            # In the order in which it was written: the steps of a pipeline are a mapping.
            return parts.setdefault(json.dumps(part), len(parts))

        jobs = {
            fingerprint: {key: number(value) for key, value in config.items()}
            for fingerprint, config in self.configs.items()
        }
        about = {
            "command": self.command, "folder": os.getcwd(), "rules": asdict(self.rules),
            "again": sorted(self.again), "jobs": jobs, "groups": self.groups,
            "parts": [json.loads(text) for text in parts],
        }  # fmt: skip
        draft = self.path.with_suffix(f".tmp{os.getpid()}")
        draft.write_text(json.dumps(about))
        draft.replace(self.path)

    @classmethod
    def load(cls, root: Path, id_: str | None = None) -> "Launch":
        """Read a launch, by default the newest.

        Raises:
            UsageError: If there is none.
        """
        root = root.resolve()
        paths = sorted((root / "launches").glob(f"{id_ or '*'}.json"), key=lambda p: p.stat().st_mtime)
        if not paths:
            raise UsageError(
                f"no sweep is running in {str(root)!r}; start one, e.g. `qbench -m algo=rtn,gptq wbits=4,3`"
            )
        about = json.loads(paths[-1].read_text())
        parts = about["parts"]
        configs = {
            fingerprint: {key: parts[number] for key, number in config.items()}
            for fingerprint, config in about["jobs"].items()
        }
        if Path(about["folder"]).is_dir():  # paths in the configs are meant from there
            os.chdir(about["folder"])
        groups = {fingerprint: tuple(group) for fingerprint, group in about["groups"].items()}
        return cls(
            root,
            Rules(**about["rules"]),
            configs,
            groups,
            set(about["again"]),
            about["command"],
            paths[-1].stem,
        )

    def forget(self) -> None:
        """Delete the file, and those of launches that were killed long ago."""
        self.path.unlink(missing_ok=True)
        for path in self.path.parent.iterdir():
            if time.time() - path.stat().st_mtime > _FORGOTTEN:
                path.unlink(missing_ok=True)


def by_group(groups: dict[str, Group], fingerprints: Iterable[str]) -> dict[Group, list[str]]:
    """The jobs of each group, in order."""
    found: dict[Group, list[str]] = {}
    for fingerprint in fingerprints:
        found.setdefault(groups[fingerprint], []).append(fingerprint)
    return found
