"""A job: its identity, and one run from what was asked to a record."""

import contextlib
import copy
import gc
import hashlib
import json
import math
import os
import platform
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from qbench.algorithms.base import Algorithm
from qbench.data.corpora import load_text
from qbench.data.tokens import CalibrationSet, sha256
from qbench.deploy.size import size_metrics
from qbench.engine import quantize
from qbench.errors import first_line
from qbench.evaluate.plan import EvalPlan
from qbench.evaluate.result import Evaluation
from qbench.models.load import ModelRef, check_fit
from qbench.quant.scheme import Scheme

_COPIED_UP_TO = 2 << 30  # bytes; a larger model is read again from disk rather than kept twice in memory


@dataclass(frozen=True)
class Job:
    """One cell of the grid: everything that can change a number, and where to run it.

    Attributes:
        algo: The algorithm's name on the command line, for tables.
        calib: `None` exactly where no calibration data is needed.
        settings: The config as plain values, for the record; not looked at.
    """

    model: ModelRef
    algo: str
    algorithm: Algorithm
    scheme: Scheme
    calib: CalibrationSet | None
    evaluation: EvalPlan
    device: str = "cpu"
    data_root: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict, compare=False)

    def identity(self) -> dict[str, Any]:
        """What tells this job's numbers from another's. Devices, paths, batch sizes and trackers do not count."""
        return {
            "model": self.model.identity(),
            "algorithm": self.algorithm.identity(),
            "scheme": str(self.scheme),
            "calib": self.calib.identity() if self.calib else None,
            "evaluation": self.evaluation.identity(),
        }

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits of the SHA-256 of the identity; two jobs with one fingerprint are the same job."""
        canonical = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def labels(self) -> dict[str, Any]:
        """What tables group by."""
        w, a, kv = self.scheme.weight, self.scheme.activation, self.scheme.kv
        return {
            "model": self.model.name,
            "algo": self.algo,
            "scheme": str(self.scheme),
            "wbits": w.bits if w else 16,
            "abits": a.bits if a else 16,
            "kvbits": kv.bits if kv else 16,
            "group_size": w.group_size if w else None,
            "calib": self.calib.name if self.calib else None,
            "seed": self.calib.seed if self.calib else None,
        }

    @property
    def title(self) -> str:
        parts = (self.model.name, self.algo, str(self.scheme), self.calib.name if self.calib else "")
        return " ".join(part for part in parts if part)

    def check(self) -> None:
        """Refuse what cannot run, before weights are loaded.

        Raises:
            ValueError, NotImplementedError, FileNotFoundError: Saying what was found and what to do.
        """
        self.algorithm.check(self.scheme)
        check_device(self.device)
        if self.scheme.kv is not None and self.model.attn != "sdpa":
            raise ValueError(f"KV quantization needs model.attn=sdpa, model.attn is {self.model.attn}")
        check_fit(skeleton(self.model), self.scheme)
        self._check_lengths(getattr(skeleton(self.model).config, "max_position_embeddings", None))
        self.evaluation.check(tokenizer(self.model), self.data_root)
        if self.calib is not None:
            calibration_tokens(self.model, self.calib, self.data_root)

    def _check_lengths(self, most: int | None) -> None:
        lengths = {"eval.seq_len": self.evaluation.seq_len} if self.evaluation.ppl else {}
        lengths |= {"calib.seq_len": self.calib.seq_len} if self.calib else {}
        for key, length in lengths.items():
            if most is not None and length > most:
                raise ValueError(
                    f"{key} is {length}, {self.model.name} reads at most {most} tokens; lower {key}"
                )


def check_device(device: str) -> None:
    """Refuse a device that torch does not know or see.

    Raises:
        ValueError: Saying what there is.
    """
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device={device} is not a device of torch; use cpu, cuda or cuda:<number>"
        ) from error
    count = torch.cuda.device_count()
    if parsed.type == "cuda" and (parsed.index or 0) >= count:
        raise ValueError(
            f"device={device} was asked for, this torch sees {count} CUDA devices; use device=cpu"
        )


# What jobs in one process share. Each is built once and never changed.
@cache
def skeleton(model: ModelRef) -> Any:
    return model.skeleton()


@cache
def tokenizer(model: ModelRef) -> Any:
    return model.tokenizer()


@cache
def calibration_tokens(model: ModelRef, calib: CalibrationSet, root: Path | None) -> Tensor:
    return calib.tokens(tokenizer(model), root)


@dataclass
class ModelCache:
    """Hands out fresh copies of the last model asked for, so that a sweep reads it once."""

    _ref: ModelRef | None = None
    _pristine: Any = None

    def fresh(self, ref: ModelRef) -> Any:
        if ref != self._ref:
            self._ref = self._pristine = None
            gc.collect()
            self._ref, self._pristine = ref, ref.load()
        size = sum(p.numel() * p.element_size() for p in self._pristine.parameters())
        if size <= _COPIED_UP_TO:
            return copy.deepcopy(self._pristine)
        model, self._ref, self._pristine = self._pristine, None, None
        return model


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


def run(job: Job, models: ModelCache, reporter: Reporter | None = None) -> Outcome:
    """Quantize and evaluate; a failure becomes a record with its reason, and is not raised."""
    reporter = reporter or Reporter()
    started = datetime.now(UTC)
    record: dict[str, Any] = {
        "fingerprint": job.fingerprint,
        "labels": job.labels,
        "identity": job.identity(),
        "environment": environment() | {"command": command()},
        "device": device_name(job.device),
        "config": job.settings,
        "started": started.isoformat(),
    }
    try:
        metrics, errors, samples = _measure(job, models, reporter)
        if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"not finite: {', '.join(bad)}")
        record |= {"status": "done", "metrics": metrics, "block_errors": errors, "data": _provenance(job)}
    except Exception as error:  # whatever one job raises, the other jobs go on; the record says what it was
        samples = []
        record |= {
            "status": "failed",
            "reason": first_line(error),
            "traceback": traceback.format_exc(),
            "metrics": {},
        }
    record["finished"] = datetime.now(UTC).isoformat()
    return Outcome(record, samples)


def _measure(
    job: Job, models: ModelCache, reporter: Reporter
) -> tuple[dict[str, float], list[float], list[dict[str, Any]]]:
    metrics: dict[str, float] = {}
    with _phase("load", job, metrics, reporter):
        model = models.fresh(job.model)
        tokens = calibration_tokens(job.model, job.calib, job.data_root) if job.calib else None
    metrics |= size_metrics(model, job.scheme)
    with _phase("calib", job, metrics, reporter):
        errors = quantize(
            model, job.algorithm, job.scheme, tokens,
            propagate_error=job.calib.propagate_error if job.calib else True,
            device=job.device, on_block=reporter.block,
        )  # fmt: skip
    with _phase("eval", job, metrics, reporter):
        result: Evaluation = job.evaluation.run(model.to(job.device), tokenizer(job.model), job.data_root)
    if errors:
        metrics["block_error_mean"] = sum(errors) / len(errors)
    return metrics | result.metrics, errors, result.samples


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


def _provenance(job: Job) -> dict[str, Any]:
    """Which data the numbers came from: name, where it was found, SHA-256."""
    texts = {name: load_text(name, "test", job.data_root) for name in job.evaluation.ppl}
    data: dict[str, Any] = {f"eval/{n}": {"origin": t.origin, "sha256": t.sha256} for n, t in texts.items()}
    if job.calib is not None:
        tokens = calibration_tokens(job.model, job.calib, job.data_root)
        data[f"calib/{job.calib.name}"] = {"shape": list(tokens.shape), "sha256": sha256(tokens)}
    return data


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
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
