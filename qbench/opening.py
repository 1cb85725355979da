"""Where a job's model is while it is worked on: in memory, or its decoder blocks on disk; and whether that fits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import torch

from qbench.calib.spill import spilling
from qbench.data.library import Library
from qbench.engine import needs_data
from qbench.evaluate.plan import EvalPlan
from qbench.job import Job, skeleton, tokenizer
from qbench.memory.allocator import freed_memory_returned
from qbench.memory.check import check, describe
from qbench.memory.estimate import Estimate, Work, estimated
from qbench.memory.free import free_memory
from qbench.memory.sizes import Sizes, sizes_of
from qbench.models.family import family_of
from qbench.models.load import ModelRef
from qbench.progress import Progress

Say = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where a job's model is.

    Attributes:
        scratch: The folder of its blocks on disk; `None` of a model in memory.
        progress: Where finished blocks are noted, so that a job that was killed goes on; `None` for nowhere.
    """

    scratch: Path | None = None
    progress: Progress | None = None


def partial_folder(job: Job) -> Path | None:
    """Where a job that is worked on block by block keeps what is done, until its record is written."""
    results = job.settings.get("results")
    return Path(results) / "partial" / job.fingerprint if results else None


@contextmanager
def place_of(job: Job, say: Say, kept: bool) -> Iterator[Place]:
    """Decide where a job's model is, and check that it fits; `say` is told what it will take.

    Args:
        kept: A copy of the model and its first inputs are kept for the next job.

    Raises:
        MemoryError: If it does not fit; says what would make it fit.
        Unsuitable: If blocks on disk are asked for, for an algorithm that runs the whole model.
    """
    free = free_memory(job.device)
    found = _estimate(job, on_disk=False, kept=kept)
    on_disk = job.model.offload == "disk"
    if job.model.offload == "auto" and not job.needs_all and found.host.total > free[0]:
        on_disk = True
    if on_disk:
        found = _estimate(job, on_disk=True, kept=False)
    say(describe(found, *free) + (_where(job) if on_disk else ""))
    if job.model.offload != "memory":
        check(found, *free)
    with spilling(*_spill(job)):
        if not on_disk:
            yield Place()
            return
        folder, temporary = partial_folder(job), None
        if folder is None:
            folder = temporary = Path(mkdtemp(prefix="qbench-"))
        resumable = temporary is None and job.algorithm.resumable
        try:
            with freed_memory_returned():
                yield Place(folder / "blocks", Progress(folder) if resumable else None)
        finally:
            if temporary is not None:
                rmtree(temporary, ignore_errors=True)


def _where(job: Job) -> str:
    folder = partial_folder(job)
    state = Progress(folder).read() if folder is not None and job.algorithm.resumable else None
    return ", blocks on disk" + (f", going on behind block {state['done']}" if state else "")


def _spill(job: Job) -> tuple[int | None, Path | None]:
    calib = job.calib
    if calib is None or calib.spill_above is None:
        return None, None
    return int(calib.spill_above * 1e9), Path(calib.spill_folder) if calib.spill_folder else None


def _estimate(job: Job, on_disk: bool, kept: bool) -> Estimate:
    plan, calib, reads = job.evaluation, job.calib, needs_data(job.algorithm, job.scheme)
    work = Work(
        dtype=getattr(torch, job.model.dtype), device=job.device, streamed=on_disk,
        eval_streamed=bool(plan.streamed or plan.device_map) or on_disk,
        needs_data=reads, needs_float_path=job.algorithm.needs_float_path, runs_model=job.algorithm.runs_model,
        n_samples=calib.n_samples if calib and reads else 0, seq_len=calib.seq_len if calib and reads else 0,
        batch_size=calib.batch_size if calib else 1,
        eval_windows=_n_windows(job.model, plan, job.library), eval_seq_len=plan.seq_len,
        eval_batch_size=plan.batch_size, compared=plan.against_fp, copies=2 if kept else 1, keeps_inputs=kept,
        spill_above=_spill(job)[0],
    )  # fmt: skip
    return estimated(model_sizes(job.model), work)


@lru_cache(maxsize=8)
def _n_windows(model: ModelRef, plan: EvalPlan, library: Library) -> int:
    """Of all texts together."""
    return sum(len(plan.windows(name, tokenizer(model), library).tokens) for name in plan.ppl)


@lru_cache(maxsize=8)
def model_sizes(model: ModelRef) -> Sizes:
    shell = skeleton(model)
    return sizes_of(shell, family_of(shell))


def clear_partial(job: Job) -> None:
    """Forget what a finished job kept of its blocks."""
    if (folder := partial_folder(job)) is not None and folder.is_dir():
        rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # other jobs' are there
            folder.parent.rmdir()
