"""One run of a job, from what was asked to a record."""

import contextlib
import math
import os
import platform
import subprocess
import traceback
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from qbench.data.calibration import CalibrationSet
from qbench.data.library import Library
from qbench.data.overlap import overlap
from qbench.data.tokens import sha256
from qbench.errors import first_line
from qbench.evaluate.plan import EvalPlan
from qbench.job import Job, tokenizer
from qbench.measure import Reporter, Shared, calibration_tokens, measure
from qbench.models.load import ModelRef

FailureKind = Literal["raised", "oom", "nan", "timeout", "killed"]


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
        found = measure(job, shared, reporter or Reporter())
        data = _provenance(job, found.metrics)
        if bad := [name for name, value in found.metrics.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"not finite: {', '.join(bad)}")
    except Exception as error:  # whatever one job raises, the other jobs go on; the record says what it was
        # What the frames of the traceback hold would stay in memory with it.
        text = traceback.format_exc()
        return Outcome(failure(job, started, kind_of(error), first_line(error), text))
    quantized = found.quantized
    result: dict[str, Any] = {
        "status": "done",
        "metrics": found.metrics,
        "block_errors": quantized.errors,
        "block_seconds": quantized.seconds,
        "block_reports": quantized.reports if any(quantized.reports) else [],
        "model_report": quantized.report,
        "data": data,
        "model": found.model,
        "shape": found.shape,
        "left_out": dict(job.evaluation.skipped)
        | ({"shape": found.why_no_shape} if found.why_no_shape else {}),
    }
    return Outcome(_about(job, started) | result | _finished(), found.samples)


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
