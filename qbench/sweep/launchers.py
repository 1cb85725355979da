"""Where workers run: in this process, beside it, under Slurm, under Ray.

Every launcher does the same: start workers on a launch, see to them now and then, stop them. Whether the
jobs are done is read from the records, never from the engine underneath.
"""

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from qbench.errors import UsageError, first_line
from qbench.memory.allocator import keep_freed_memory
from qbench.sweep.beacon import Beacon, beacons
from qbench.sweep.launch import Launch
from qbench.sweep.schema import LauncherSettings
from qbench.sweep.supervisor import LaunchError, Supervisor, serve_shard, spread
from qbench.sweep.worker import StoreTrouble, Worker
from qbench.track.claims import Claims

States = list[dict[str, Any]]


class Launcher(Protocol):
    """Workers of one launch; leaving the context stops them."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def poll(self) -> None:
        """See to the workers.

        Raises:
            LaunchError: If jobs are left and no worker can be had for them.
        """


def run_inline(launch: Launch, report: Callable[[States], None]) -> Iterator[str]:
    """Run the jobs in this process; yields each fingerprint as its record is there.

    Raises:
        LaunchError: If the results folder cannot be written.
    """
    keep_freed_memory()
    name = f"{launch.id}-{os.getpid()}"
    claims = Claims(launch.root / "claims", launch.rules.lease, name)
    beacon = Beacon(launch.root / "workers", name, launch.id)
    worker = Worker(launch, claims, beacon, own_process=False, report=lambda state: report([state]))
    ran = set()
    try:
        for fingerprint in worker.run():
            ran.add(fingerprint)
            yield fingerprint
    except StoreTrouble as error:
        raise LaunchError(
            f"results folder {str(launch.root)!r} cannot be written: {error.strerror}"
        ) from error
    yield from (f for f in launch.configs if f not in ran)  # what another launch ran meanwhile


def follow(launch: Launch, launcher: Launcher, report: Callable[[States], None]) -> Iterator[str]:
    """Start workers and yield each fingerprint as its record comes in, whoever wrote it.

    Raises:
        LaunchError: If jobs are left and no worker can be had for them.
    """
    left = list(launch.configs)
    claims = Claims(launch.root / "claims")
    with launcher:
        while True:
            clock = time.monotonic()
            over = {f for f in left if launch.is_over(f)}
            left = [f for f in left if f not in over]
            yield from sorted(over, key=lambda f: launch.store.written(f) or 0.0)
            if not left:
                return
            launcher.poll()
            report(beacons(launch.root / "workers", claims.now(), launch.id))
            # With very many jobs a look takes long itself.
            time.sleep(max(0.1, 4 * (time.monotonic() - clock)))


def launcher_for(launch: Launch, settings: LauncherSettings, devices: set[str]) -> Launcher:
    """The launcher of the settings.

    Raises:
        UsageError: If what it needs is not installed.
    """
    if settings.kind == "local":
        return local(launch, settings, devices)
    threads = settings.threads or settings.cpus
    if settings.kind == "slurm":
        return Slurm(launch, settings, threads, _library("submitit", "slurm"))
    return RayActors(launch, settings, threads, _library("ray", "ray"))


def local(launch: Launch, settings: LauncherSettings, devices: set[str]) -> Supervisor:
    """Worker processes on this machine: one for each GPU where jobs run on GPUs, else one."""
    pinned = _visible_gpus() if devices == {"cuda"} else []  # a numbered device is where the user wants it
    n = min(settings.workers or max(1, len(pinned)), len(launch.configs))
    asked = os.environ.get("OMP_NUM_THREADS")
    threads = settings.threads or (int(asked) if asked else max(1, _cores() // n))
    return Supervisor(launch.root, launch.id, spread(n), threads, pinned, launch.rules.lease)


def _visible_gpus() -> list[str]:
    import torch

    if asked := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return asked.split(",")
    return [str(i) for i in range(torch.cuda.device_count())]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(f'launcher={extra} needs {name}; `pip install "qbench[{extra}]"`') from error


def _any_alive(launch: Launch, claims: Claims) -> bool:
    """Whether some worker of the launch has said so within a lease."""
    states = beacons(launch.root / "workers", claims.now(), launch.id)
    return any(state["age"] < launch.rules.lease for state in states)


def _n_over(launch: Launch) -> int:
    return sum(launch.is_over(fingerprint) for fingerprint in launch.configs)


@dataclass
class Slurm:
    """A job array of workers by submitit.

    Slurm's own word on a task is not asked for: without accounting it never comes. A task counts as alive as long as
    its worker's file is touched.
    """

    launch: Launch
    settings: LauncherSettings
    threads: int
    submitit: Any
    _jobs: list[Any] = field(default_factory=list)
    _submitted: float = 0.0
    _seen: float | None = None
    _n_over: int = 0
    _n_respawned: int = 0

    def __post_init__(self) -> None:
        self._claims = Claims(self.launch.root / "claims")

    def __enter__(self) -> Self:
        self._submit(self.settings.workers or 1)
        return self

    def _submit(self, n: int) -> None:
        n = min(n, len(self.launch.configs))
        executor = self.submitit.AutoExecutor(
            folder=self.launch.root / "logs" / "slurm", cluster=self.settings.cluster
        )
        executor.update_parameters(
            name="qbench", timeout_min=self.settings.minutes, cpus_per_task=self.settings.cpus,
            gpus_per_node=int(self.settings.gpus), tasks_per_node=1,
        )  # fmt: skip
        if self.settings.cluster == "slurm":
            executor.update_parameters(slurm_array_parallelism=n)
        executor.update_parameters(**self.settings.options)
        shards = [
            (str(self.launch.root), self.launch.id, s, self.threads, self.launch.rules.lease)
            for s in spread(n)
        ]
        self._jobs += executor.map_array(serve_shard, *zip(*shards, strict=True))
        self._submitted, self._seen, self._n_over = time.monotonic(), None, _n_over(self.launch)

    def poll(self) -> None:
        now, patience = time.monotonic(), 2 * self.launch.rules.lease
        if _any_alive(self.launch, self._claims):
            self._seen = now
        elif self._seen is None and now - self._submitted > self.settings.queue_minutes * 60:
            raise LaunchError(
                f"no worker has started within launcher.queue_minutes={self.settings.queue_minutes:g}"
            )
        elif self._seen is not None and now - self._seen > patience:
            n_over = _n_over(self.launch)
            self._n_respawned = (
                0 if n_over > self._n_over else self._n_respawned + 1
            )  # time limits end tasks too
            if self._n_respawned > self.settings.respawns:
                raise LaunchError(f"workers end before they have done a job; see {self.launch.root / 'logs'}")
            self._submit(self.settings.workers or 1)

    def __exit__(self, *_: object) -> None:
        for job in self._jobs:
            with contextlib.suppress(Exception):  # it may be over, or Slurm out of reach
                job.cancel(check=False) if self.settings.cluster == "slurm" else job.cancel()


@dataclass
class RayActors:
    """Ray actors, each of which keeps one worker process going."""

    launch: Launch
    settings: LauncherSettings
    threads: int
    ray: Any
    _actors: dict[Any, tuple[Any, float]] = field(default_factory=dict)
    _n_respawned: int = 0
    _started_here: bool = False
    _seen: float | None = None
    _began: float = field(default_factory=time.monotonic)
    _last_actor: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._claims = Claims(self.launch.root / "claims")

    def __enter__(self) -> Self:
        if not self.ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            n = self.settings.workers or 1
            local = {} if self.settings.address else {"num_cpus": max(_cores(), n * self.settings.cpus)}
            self.ray.init(
                address=self.settings.address, log_to_driver=False, logging_level="ERROR",
                include_dashboard=None if self.settings.address else False, **local,
            )  # fmt: skip
            self._started_here = True
        for start in spread(min(self.settings.workers or 1, len(self.launch.configs))):
            self._start(start)
        return self

    def _start(self, start: float) -> None:
        remote = self.ray.remote(num_cpus=self.settings.cpus, num_gpus=self.settings.gpus, max_restarts=0)
        actor = remote(_Shard).remote()
        arguments = (str(self.launch.root), self.launch.id, start, self.threads, self.launch.rules.lease)
        self._actors[actor.serve.remote(*arguments)] = actor, start

    def poll(self) -> None:
        now = time.monotonic()
        if self._seen is None and _any_alive(self.launch, self._claims):
            self._seen = now
        if self._seen is None and now - self._began > self.settings.queue_minutes * 60:
            raise LaunchError(
                f"no worker has started within launcher.queue_minutes={self.settings.queue_minutes:g}; "
                "has the cluster launcher.cpus and launcher.gpus for one?"
            )
        self._last_actor = now if self._actors else self._last_actor
        if now - self._last_actor > self.launch.rules.lease:  # not just records on their way here
            raise LaunchError(f"the actors ended before all jobs were done; see {self.launch.root / 'logs'}")
        if not self._actors:
            return
        ended, _ = self.ray.wait(list(self._actors), num_returns=len(self._actors), timeout=0)
        for future in ended:
            start = self._actors.pop(future)[1]
            try:
                self.ray.get(future)
            except Exception as error:  # the actor, or the node that it was on, is gone
                if self._n_respawned >= self.settings.respawns:
                    raise LaunchError(f"actors are lost again and again: {first_line(error)}") from error
                self._n_respawned += 1
                print(
                    f"qbench: an actor was lost ({type(error).__name__}); another takes its place",
                    file=sys.stderr,
                )
                self._start(start)

    def __exit__(self, *_: object) -> None:
        for actor, _start in self._actors.values():
            with contextlib.suppress(Exception):  # it may be gone with its node
                self.ray.kill(actor)
        if self._started_here:
            self.ray.shutdown()


class _Shard:
    """What becomes an actor; Ray wants a class of its own process."""

    def serve(self, root: str, launch: str, start: float, threads: int, lease: float) -> None:
        serve_shard(root, launch, start, threads, lease)
