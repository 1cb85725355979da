"""The model of a job once more: records keep numbers, not weights, so what is to be deployed is quantized again.

Equal inputs give equal weights, so the model is the one that was evaluated; `differences` says where it is not.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from qbench.deploy.layers import QuantizedLayer, layers_of
from qbench.deploy.size import size_metrics
from qbench.engine import Finished, Quantized
from qbench.job import Job
from qbench.measure import Reporter, Shared, calibration_tokens, quantized
from qbench.models.family import family_of
from qbench.opening import clear_partial, place_of

# Matrix products are not the same to the last bit on every processor and thread count, and rounding amplifies that; a
# mean over a block's outputs moves far less than by this.
_TOLERANCE = 0.02


@dataclass
class Remade:
    """A model that was quantized again.

    Attributes:
        layers: Its linear layers; of a model on disk without weights and grids, which are there while they are delivered.
        size: As the record's metrics have it.
    """

    model: Any
    layers: list[QuantizedLayer]
    quantized: Quantized
    size: dict[str, float]


@contextmanager
def remade(
    job: Job,
    reporter: Reporter | None = None,
    deliver: Callable[[Finished, list[QuantizedLayer]], None] = lambda finished, layers: None,
    record: Mapping[str, Any] | None = None,
) -> Iterator[Remade]:
    """Quantize a job's model again; blocks on disk are kept for the next try where the context ends by an error.

    Args:
        deliver: Given each block when it is finished.
        record: Of the job; on a CPU it is quantized with as many threads as then.

    Raises:
        MemoryError: If it does not fit; says what would make it fit.
    """
    reporter, shared, layers = reporter or Reporter(), Shared(), list[QuantizedLayer]()
    with place_of(job, reporter.memory, kept=False) as place:
        reporter.phase("load")
        model = shared.opened(job.model, place.scratch) if place.scratch else job.model.load()
        family, n_parameters = family_of(model), sum(p.numel() for p in model.parameters())
        tokens = calibration_tokens(job.model, job.calib, job.library, job.device) if job.calib else None

        def handed(finished: Finished) -> None:
            found = list(layers_of(finished, family.blocks, family.linears(finished.layer), job.scheme))
            deliver(finished, found)
            # What is on disk goes back there, and is not kept in memory by this list.
            layers.extend(
                replace(k, weight=k.weight.to("meta"), grid=None) if place.scratch else k for k in found
            )

        reporter.phase("calib")
        with _threads_as(record):
            done = quantized(job, model, tokens, None, place.progress, reporter, handed)
        size = size_metrics(model, n_parameters, done.stored_bits, done.extra_bits)
        again = Remade(model, layers, done, size)
        del model  # or whoever lets go of `again.model` would not be rid of it
        yield again
    if place.scratch:
        clear_partial(job)


@contextmanager
def _threads_as(record: Mapping[str, Any] | None) -> Iterator[None]:
    """As many threads as a record's job had on a CPU: the order of sums, and so GPTQ's roundings, depend on it."""
    before, found = (
        torch.get_num_threads(),
        re.search(r"(\d+) threads$", record["device"]) if record else None,
    )
    if found:
        torch.set_num_threads(int(found[1]))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def differences(again: Remade, record: Mapping[str, Any]) -> list[str]:
    """In what a model that was quantized again is not the one of its record; empty where it is."""
    found = []
    for name in ("bits_per_weight", "bits_per_linear_weight"):
        before, now = record["metrics"][name], again.size[name]
        if not abs(before - now) <= 1e-9 * before:
            found.append(f"{name} was {before:.6g} and is {now:.6g}")
    for index, (before, now) in enumerate(zip(record["block_errors"], again.quantized.errors, strict=True)):
        if not abs(before - now) <= _TOLERANCE * max(before, now):
            found.append(f"the error of block {index} was {before:.4g} and is {now:.4g}")
    return found
