"""One run of a job, from what was asked to a record."""

import contextlib
import copy
import gc
import math
import os
import platform
import shutil
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from qbench.algorithms.fp import FloatingPoint
from qbench.calib.sampling import sampled
from qbench.calib.stream import FirstInputs, first_inputs
from qbench.data.calibration import CalibrationSet
from qbench.data.library import Library
from qbench.data.overlap import overlap
from qbench.data.tokens import sha256
from qbench.deploy.size import size_metrics
from qbench.engine import Quantized, placed, quantize
from qbench.errors import first_line
from qbench.evaluate.baseline import Baselines
from qbench.evaluate.evaluator import Evaluator
from qbench.evaluate.plan import EvalPlan
from qbench.job import Job, tokenizer
from qbench.models.family import family_of
from qbench.models.load import ModelRef
from qbench.models.shape import Shape, shape_of

_KEPT_UP_TO = 2 << 30  # bytes; what is larger is made again for each job rather than kept beside it in memory

FailureKind = Literal["raised", "oom", "nan", "timeout", "killed"]


@dataclass
class Shared:
    """What jobs that follow one another have in common: the model, and what its first block is given.

    Only the last of each is kept; a sweep is ordered so that this is enough.
    """

    _ref: ModelRef | None = None
    _pristine: Any = None
    _first: tuple[tuple[CalibrationSet, Library], FirstInputs] | None = None
    _baselines: dict[Path | None, Baselines] = field(default_factory=dict)

    def model(self, ref: ModelRef) -> Any:
        """A copy of the model that the caller may change."""
        if ref != self._ref:
            self._ref = self._pristine = self._first = None
            self._baselines.clear()
            gc.collect()
            self._ref, self._pristine = ref, ref.load()
        size = sum(p.numel() * p.element_size() for p in self._pristine.parameters())
        if size <= _KEPT_UP_TO:
            return copy.deepcopy(self._pristine)
        model, self._ref, self._pristine = self._pristine, None, None
        return model

    def first(self, model: Any, job: Job) -> FirstInputs | None:
        """What the first block of the untouched `model` is given on the job's calibration data, where it is kept."""
        if job.calib is None:
            return None
        embedding = model.get_input_embeddings().weight
        n_tokens = job.calib.n_samples * job.calib.seq_len
        if n_tokens * embedding.shape[1] * embedding.element_size() > _KEPT_UP_TO:
            return None
        key = (job.calib, job.library)
        if self._first is None or self._first[0] != key:
            self._first = None
            tokens = calibration_tokens(job.model, job.calib, job.library, job.device)
            self._first = key, first_inputs(model, family_of(model), tokens, job.calib.batch_size)
        return self._first[1]

    def baselines(self, job: Job) -> Baselines:
        """What the floating-point model was found to say, by whichever job of the results folder came first."""
        results = job.settings.get("results")
        folder = Path(results) / "baselines" if results else None
        return self._baselines.setdefault(folder, Baselines(folder))


@lru_cache(maxsize=4)
def calibration_tokens(model: ModelRef, calib: CalibrationSet, library: Library, device: str) -> Tensor:
    def sampler(n_samples: int, seq_len: int, seed: int) -> Tensor:
        return sampled(model.load().to(device), n_samples, seq_len, seed)

    return calib.tokens(tokenizer(model), library, sampler)


@dataclass
class Reporter:
    """What a running job tells whoever watches; the default tells nobody."""

    phase: Callable[[str], None] = lambda name: None
    block: Callable[[int, int], None] = lambda done, total: None


@dataclass
class Outcome:
    """What a job leaves: a record, and the samples behind its metrics."""

    record: dict[str, Any]
    samples: list[dict[str, Any]] = field(default_factory=list)


def run(job: Job, shared: Shared, reporter: Reporter | None = None) -> Outcome:
    """Quantize and evaluate; a failure becomes a record with its reason, and is not raised."""
    started = datetime.now(UTC)
    torch.manual_seed(0)  # whatever ran before in this process, a job starts from the same state
    try:
        metrics, quantized, samples, shape = _measure(job, shared, reporter or Reporter())
        data = _provenance(job, metrics)
        if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"not finite: {', '.join(bad)}")
    except Exception as error:  # whatever one job raises, the other jobs go on; the record says what it was
        # What the frames of the traceback hold would stay in memory with it.
        text = traceback.format_exc()
        return Outcome(failure(job, started, kind_of(error), first_line(error), text))
    result: dict[str, Any] = {
        "status": "done",
        "metrics": metrics,
        "block_errors": quantized.errors,
        "block_reports": quantized.reports if any(quantized.reports) else [],
        "model_report": quantized.report,
        "data": data,
        "shape": asdict(shape),
        "left_out": dict(job.evaluation.skipped),
    }
    return Outcome(_about(job, started) | result | _finished(), samples)


def failure(
    job: Job, started: datetime, kind: FailureKind, reason: str, trace: str = "", log: str = ""
) -> dict[str, Any]:
    """The record of a job that failed: why, where in the code, and what was logged last."""
    result: dict[str, Any] = {
        "status": "failed", "failure": kind, "reason": reason, "traceback": trace, "log_tail": log, "metrics": {},
    }  # fmt: skip
    return _about(job, started) | result | _finished()


def kind_of(error: Exception) -> FailureKind:
    """Whether a job ran out of memory (of the host or of a device), met NaN, or failed otherwise."""
    # torch raises a plain RuntimeError when the host has no memory left.
    host = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if host or isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "oom"
    return "nan" if isinstance(error, FloatingPointError) else "raised"


def _about(job: Job, started: datetime) -> dict[str, Any]:
    return {
        "fingerprint": job.fingerprint,
        "labels": job.labels,
        "identity": job.identity(),
        "environment": environment() | {"command": command()},
        "device": device_name(job.device),
        "config": job.settings,
        "started": started.isoformat(),
    }


def _finished() -> dict[str, Any]:
    return {"finished": datetime.now(UTC).isoformat()}


def _measure(
    job: Job, shared: Shared, reporter: Reporter
) -> tuple[dict[str, float], Quantized, list[dict[str, Any]], Shape]:
    metrics: dict[str, float] = {}
    with _phase("load", job, metrics, reporter):
        model = shared.model(job.model)
        tokens = calibration_tokens(job.model, job.calib, job.library, job.device) if job.calib else None
        first = shared.first(model, job)
        job.evaluation.prepare(tokenizer(job.model), job.library)
        evaluator = _evaluator(model, job)
        if job.settings.get("force") and evaluator.folder is not None:
            shutil.rmtree(evaluator.folder, ignore_errors=True)  # it is asked again
        with _at_work(evaluator):
            reference = evaluator.reference(job.model.identity(), shared.baselines(job))
    n_parameters = sum(p.numel() for p in model.parameters())  # tied parameters are listed once
    with _phase("calib", job, metrics, reporter):
        quantized = quantize(
            model, job.algorithm, job.scheme, tokens, first=first,
            propagate_error=job.calib.propagate_error if job.calib else True,
            batch_size=job.calib.batch_size if job.calib else 8, device=job.device, on_block=reporter.block,
        )  # fmt: skip
    metrics |= size_metrics(model, n_parameters, quantized.stored_bits, quantized.extra_bits)
    with _phase("eval", job, metrics, reporter), _at_work(evaluator):
        if reference is not None and isinstance(job.algorithm, FloatingPoint):
            result, seconds = evaluator.run_float(reference)
        else:
            result, seconds = evaluator.run(reference), 0.0
    if evaluator.streamed:
        metrics["eval_streamed"] = 1.0
    metrics["eval_time_s"] += seconds  # of what this job read, since it was computed before
    if quantized.errors:
        metrics["block_error_mean"] = sum(quantized.errors) / len(quantized.errors)
    return metrics | result.metrics, quantized, result.samples, shape_of(model.config)


def _evaluator(model: Any, job: Job) -> Evaluator:
    results = job.settings.get("results")
    return Evaluator(
        job.evaluation, model, tokenizer(job.model), job.library, job.device,
        streamed=not job.evaluation.fits(model, job.device),
        folder=_answers(job, Path(results)) if results else None,
    )  # fmt: skip


def _answers(job: Job, results: Path) -> Path:
    """Where a job keeps what the model says: by all that can change it, which the judge cannot."""
    if job.evaluation.talk is not None:
        talk = replace(job.evaluation.talk, judge=None)
        job = replace(job, evaluation=replace(job.evaluation, talk=talk))
    return results / "dialogue" / job.fingerprint


def _at_work(evaluator: Evaluator) -> contextlib.AbstractContextManager[None]:
    """While it lasts the model is on its device, unless it goes there block by block."""
    if evaluator.streamed:
        return contextlib.nullcontext()
    return placed(evaluator.model, torch.device(evaluator.device))


@contextlib.contextmanager
def _phase(name: str, job: Job, metrics: dict[str, float], reporter: Reporter) -> Iterator[None]:
    """Time a phase and watch its peak memory: `<name>_time_s`, `peak_mem_<name>_mb`, `peak_device_mem_<name>_mb`."""
    reporter.phase(name)
    cuda = torch.device(job.device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(job.device)
        torch.cuda.reset_peak_memory_stats(job.device)
    clock = time.perf_counter()
    with _peak_rss() as peak:
        yield
        if cuda:
            torch.cuda.synchronize(job.device)
    metrics[f"{name}_time_s"] = time.perf_counter() - clock
    metrics[f"peak_mem_{name}_mb"] = peak[0] / 1e6
    if cuda:
        metrics[f"peak_device_mem_{name}_mb"] = torch.cuda.max_memory_allocated(job.device) / 1e6


@contextlib.contextmanager
def _peak_rss() -> Iterator[list[float]]:
    """The largest resident set of this process while the context lasts, in bytes, sampled every 5 ms."""
    process, peak, done = psutil.Process(), [0.0], threading.Event()

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], process.memory_info().rss)
            if done.wait(0.005):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _provenance(job: Job, metrics: dict[str, float]) -> dict[str, Any]:
    """Which data the numbers came from: name, where it was found, SHA-256; `calib_overlap` goes into the metrics."""
    data: dict[str, Any] = dict(job.evaluation.provenance(job.library))
    if job.calib is not None:
        tokens = calibration_tokens(job.model, job.calib, job.library, job.device)
        shares = calibration_overlap(job.model, job.calib, job.evaluation, job.library, job.device)
        metrics["calib_overlap"] = max(shares.values(), default=0.0)
        data[f"calib/{job.calib.label}"] = {
            "shape": list(tokens.shape), "sha256": sha256(tokens), "overlap": shares,
        }  # fmt: skip
    return data


@lru_cache(maxsize=64)
def calibration_overlap(
    model: ModelRef, calib: CalibrationSet, evaluation: EvalPlan, library: Library, device: str
) -> dict[str, float]:
    """By evaluation text or task: the share of calibration samples that have a passage of it."""
    if calib.name in ("random", "self"):
        return {}
    tokens = calibration_tokens(model, calib, library, device)
    return {
        n: overlap(tokens, found) for n, found in evaluation.signatures(tokenizer(model), library).items()
    }


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        try:
            return torch.cuda.get_device_name(device)
        except (
            RuntimeError,
            AssertionError,
        ):  # gone, or never there: a failed job's record must still be written
            return device
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


@cache
def environment() -> dict[str, Any]:
    """Versions, and the commit of qbench where it runs from a repository."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("qbench", "torch", "transformers", "lm_eval", "datasets", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"versions": versions, "git_commit": _git_commit()}


def command() -> str:
    """What the user typed."""
    return os.environ.get("QBENCH_COMMAND", "not started by the command line")


def _git_commit() -> str | None:
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():  # an installed package may lie inside someone else's repository
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
