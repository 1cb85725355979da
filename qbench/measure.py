"""One job measured: the model opened, quantized and evaluated, with time and memory of each phase."""

import contextlib
import copy
import gc
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qbench.algorithms.fp import FloatingPoint
from qbench.calib.sampling import sampled
from qbench.calib.stream import FirstInputs, first_inputs
from qbench.data.calibration import CalibrationSet
from qbench.data.library import Library
from qbench.deploy.size import size_metrics
from qbench.engine import Finished, Quantized, placed, quantize
from qbench.evaluate.baseline import Baselines
from qbench.evaluate.dispatch import dispatched
from qbench.evaluate.evaluator import Evaluator
from qbench.job import Job, skeleton, tokenizer
from qbench.memory.watch import peak_rss
from qbench.models.about import about
from qbench.models.disk import on_disk
from qbench.models.family import family_of
from qbench.models.load import ModelRef
from qbench.models.shape import shape_of
from qbench.opening import model_sizes, place_of
from qbench.progress import Progress

_KEPT_UP_TO = 2 << 30  # bytes; what is larger is made again for each job rather than kept beside it in memory


@dataclass
class Shared:
    """What jobs that follow one another have in common: the model, and what its first block is given.

    Only the last of each is kept; a sweep is ordered so that this is enough.
    """

    _ref: ModelRef | None = None
    _pristine: Any = None
    _first: tuple[tuple[ModelRef, CalibrationSet, Library], FirstInputs] | None = None
    _baselines: dict[Path | None, Baselines] = field(default_factory=dict)

    def model(self, ref: ModelRef) -> Any:
        """A copy of the model that the caller may change."""
        if ref != self._ref:
            self._forget()
            self._ref, self._pristine = ref, ref.load()
        size = sum(p.numel() * p.element_size() for p in self._pristine.parameters())
        if size <= _KEPT_UP_TO:
            return copy.deepcopy(self._pristine)
        model, self._ref, self._pristine = self._pristine, None, None
        return model

    def opened(self, ref: ModelRef, scratch: Path) -> Any:
        """The model with its blocks on disk; what was kept of others is let go, since memory is short then."""
        self._forget()
        return ref.open(scratch)

    def _forget(self) -> None:
        self._ref = self._pristine = self._first = None
        self._baselines.clear()
        gc.collect()

    def kept_beside(self, ref: ModelRef) -> bool:
        """Whether a copy of the model stays in memory while a job works on another."""
        sizes = model_sizes(ref)
        return (sizes.outside + sizes.blocks) * getattr(torch, ref.dtype).itemsize <= _KEPT_UP_TO

    def first(self, model: Any, job: Job) -> FirstInputs | None:
        """What the first block of the untouched `model` is given on the job's calibration data, where it is kept."""
        if job.calib is None:
            return None
        embedding = model.get_input_embeddings().weight
        n_tokens = job.calib.n_samples * job.calib.seq_len
        if n_tokens * embedding.shape[1] * embedding.element_size() > _KEPT_UP_TO:
            return None
        key = (replace(job.model, offload="auto"), job.calib, job.library)
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
    memory: Callable[[str], None] = lambda line: None


@dataclass
class Measured:
    """What was found of a job.

    Attributes:
        shape: The model's sizes, as a record keeps them; `None` where `why_no_shape` says why.
        model: What `about` says of it.
    """

    metrics: dict[str, float]
    quantized: Quantized
    samples: list[dict[str, Any]]
    shape: dict[str, Any] | None
    model: dict[str, Any]
    why_no_shape: str = ""


def measure(job: Job, shared: Shared, reporter: Reporter) -> Measured:
    """Open, quantize and evaluate the job's model.

    Raises:
        MemoryError: If it does not fit; says what would make it fit.
    """
    metrics: dict[str, float] = {}
    with place_of(job, reporter.memory, shared.kept_beside(job.model)) as place:
        with _phase("load", job, metrics, reporter):
            model = shared.opened(job.model, place.scratch) if place.scratch else shared.model(job.model)
            tokens = calibration_tokens(job.model, job.calib, job.library, job.device) if job.calib else None
            first = shared.first(model, job)
            job.evaluation.prepare(tokenizer(job.model), job.library)
            evaluator = _evaluator(model, job)
            if job.settings.get("force") and evaluator.folder is not None:
                shutil.rmtree(evaluator.folder, ignore_errors=True)  # it is asked again
            with _at_work(evaluator):
                reference = evaluator.reference(job.model.identity(), shared.baselines(job))
        known = about(job.model, model)  # before quantization edits it
        n_parameters = sum(p.numel() for p in model.parameters())  # tied parameters are listed once
        with _phase("calib", job, metrics, reporter):
            done = quantized(job, model, tokens, first, place.progress, reporter)
        # A run that was broken off is timed as if it had not been.
        metrics["calib_time_s"] += sum(done.seconds[: done.resumed_at])
        metrics |= size_metrics(model, n_parameters, done.stored_bits, done.extra_bits)
        with _phase("eval", job, metrics, reporter), _at_work(evaluator):
            if reference is not None and isinstance(job.algorithm, FloatingPoint):
                result, seconds = evaluator.run_float(reference)
            else:
                result, seconds = evaluator.run(reference), 0.0
    metrics["eval_time_s"] += seconds  # of what this job read, since it was computed before
    metrics |= _noted(done) | ({"eval_streamed": 1.0} if evaluator.streamed else {}) | result.metrics
    shape, why = _shape(job.model)
    return Measured(metrics, done, result.samples, shape, known, why)


def quantized(
    job: Job,
    model: Any,
    tokens: Tensor | None,
    first: FirstInputs | None,
    progress: Progress | None,
    reporter: Reporter,
    deliver: Callable[[Finished], None] = lambda finished: None,
) -> Quantized:
    """Quantize a model in place, as a job says."""
    calib = job.calib
    return quantize(
        model, job.algorithm, job.scheme, tokens, first=first,
        propagate_error=calib.propagate_error if calib else True,
        batch_size=calib.batch_size if calib else 8, device=job.device, on_block=reporter.block,
        experts=calib.experts if calib else "routed", progress=progress, deliver=deliver,
    )  # fmt: skip


def _noted(quantized: Quantized) -> dict[str, float]:
    """What of a quantization is a metric: errors, experts that saw too little, a run that was broken off."""
    metrics = {}
    if quantized.errors:
        metrics["block_error_mean"] = sum(quantized.errors) / len(quantized.errors)
    if experts := [report["experts"] for report in quantized.reports if "experts" in report]:
        for name in ("unseen", "few"):
            metrics[f"experts_{name}"] = float(sum(len(x) for found in experts for x in found[name].values()))
        metrics["experts_unseen"] += sum(len(found["missed"]) for found in experts)
        tokens = [n for found in experts for counts in found["tokens"].values() for n in counts]
        metrics["expert_tokens_min"] = float(min(tokens))
    if quantized.resumed_at:
        metrics["resumed_at_block"] = float(quantized.resumed_at)
    return metrics


def _evaluator(model: Any, job: Job) -> Evaluator:
    results = job.settings.get("results")
    return Evaluator(
        job.evaluation, model, tokenizer(job.model), job.library, job.device,
        streamed=on_disk(model) or not job.evaluation.fits(model, job.device),
        folder=_answers(job, Path(results)) if results else None,
    )  # fmt: skip


def _answers(job: Job, results: Path) -> Path:
    """Where a job keeps what the model says: by all that can change it, which the judge cannot."""
    if job.evaluation.talk is not None:
        talk = replace(job.evaluation.talk, judge=None)
        job = replace(job, evaluation=replace(job.evaluation, talk=talk))
    return results / "dialogue" / job.fingerprint


def _at_work(evaluator: Evaluator) -> contextlib.AbstractContextManager[None]:
    """While it lasts the model is on its device, or on several, unless it goes there block by block."""
    if evaluator.plan.device_map:
        return dispatched(evaluator.model)
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
    with peak_rss() as peak:
        yield
        if cuda:
            torch.cuda.synchronize(job.device)
    metrics[f"{name}_time_s"] = time.perf_counter() - clock
    metrics[f"peak_mem_{name}_mb"] = peak[0] / 1e6
    if cuda:
        metrics[f"peak_device_mem_{name}_mb"] = torch.cuda.max_memory_allocated(job.device) / 1e6


@lru_cache(maxsize=8)
def _shape(ref: ModelRef) -> tuple[dict[str, Any] | None, str]:
    """The model's sizes, or why they cannot be read; sending a token through a skeleton takes up to seconds."""
    try:
        return asdict(shape_of(skeleton(ref).config, ref.trust_remote_code)), ""
    except NotImplementedError as refusal:  # only predictions of speed need it
        return None, str(refusal)
