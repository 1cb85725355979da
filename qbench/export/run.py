"""Export a recipe: check, quantize again, write, load back, compare, publish."""

import gc
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qbench.deploy.formats import FORMATS, Format
from qbench.deploy.formats.format import Source
from qbench.deploy.layers import QuantizedLayer
from qbench.deploy.writer import Writer
from qbench.engine import Finished
from qbench.errors import Unsuitable
from qbench.export.card import card
from qbench.export.parity import InEngine, Parity, difference, logits, perplexity_of, rounding_floor
from qbench.job import Job, skeleton, tokenizer
from qbench.measure import Reporter
from qbench.models.attention import quantize_attention
from qbench.models.disk import on_disk
from qbench.models.family import family_of
from qbench.models.hooks import quantize_input, requantize_inputs
from qbench.models.norms import centres
from qbench.remade import Remade, differences, remade

_WINDOWS, _LENGTH = 8, 256
_TEXT = "stdlib_docs"  # embedded, where a job reads no text of its own


class NotTheSame(RuntimeError):
    """What was quantized again, or is loaded back, is not the model that was evaluated."""


@dataclass
class Export:
    """What was exported.

    Attributes:
        bytes: Of all tensors; `expected_bytes`: what the record's honest bits say of them, its 16-bit numbers in the
            checkpoint's dtype.
        bits: Of the tensors, per parameter of the original model; `honest_bits`: `bits_per_weight`, whose numbers that are
            not quantized have 16 bits.
        parity: `None` where `not_compared` says why.
        notes: What whoever loads it should know.
    """

    folder: Path
    bytes: int
    expected_bytes: float
    bits: float
    honest_bits: float
    parity: Parity | None
    not_compared: str = ""
    notes: list[str] = field(default_factory=list)


def prepared(job: Job, name: str, dtype: str | None = None) -> Format:
    """The format by its name, checked for a job before anything is loaded.

    Raises:
        ValueError: If there is no such format or dtype.
        Unsuitable: If it cannot hold the recipe; says what can.
    """
    if name not in FORMATS:
        raise ValueError(f"there is no format {name!r}; there are {', '.join(FORMATS)}")
    wanted = dtype or job.model.dtype
    if wanted not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype is {wanted!r}, it must be float32, float16 or bfloat16")
    model = skeleton(job.model)
    if job.algorithm.folds_norms:
        _check_norms(model)
    found = FORMATS[name](Source(model, job.algorithm, job.scheme, getattr(torch, wanted)))
    found.check()
    found.check_tokenizer(tokenizer(job.model))
    return found


def _check_norms(model: Any) -> None:
    """Refuse what a rotation makes of norms that subtract a mean; `model` has no weights."""
    final = family_of(model).final_norm
    if final is not None and centres(deepcopy(model.get_submodule(final)).to_empty(device="cpu")):
        raise Unsuitable(
            f"the rotation makes RMSNorms of the LayerNorms of {type(model).__name__}, which no checkpoint of it has",
            "export a recipe without rotations",
        )


def export(
    job: Job, record: Mapping[str, Any] | None, made: Format, folder: Path, reporter: Reporter | None = None
) -> Export:
    """Write a job's quantized model in a format, as `prepared` made it.

    Args:
        record: Of the job, with which the model that is quantized again is compared; `None` where there is none.

    Raises:
        FileExistsError: If `folder` exists.
        NotTheSame: If the model is not that of the record, or what is loaded is not what was written; nothing is left.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it, or choose another folder with out=")
    reporter, blocks = reporter or Reporter(), family_of(made.source.skeleton).blocks
    with Writer(folder) as writer:

        def deliver(finished: Finished, layers: list[QuantizedLayer]) -> None:
            made.block(writer, f"{blocks}.{finished.index}", finished.layer, layers, finished.fixed)

        with remade(job, reporter, deliver, record) as again:
            if record is not None and (changed := differences(again, record)):
                raise NotTheSame(
                    f"quantizing again gave another model than the record {record['fingerprint']} has: "
                    f"{'; '.join(changed)}; nothing was exported. Other versions, processors or thread counts "
                    "do that: run the job again (force=true), and export that"
                )
            made.finish(writer, again.model, tokenizer(job.model))
            n_bytes, expected = writer.close_tensors(), _expected(made, again.model, again.layers)
            reporter.phase("compare")
            parity, why = _parity(job, made, again, writer.folder)
        if parity is not None and not parity.holds:
            raise NotTheSame(_not_the_same(parity))
        if parity is not None and parity.engine is not None and not parity.engine.holds:
            raise NotTheSame(_engine_differs(parity.engine))
        honest = again.size["bits_per_weight"]
        bits = 8 * n_bytes / (8e6 * again.size["model_mb"] / honest)
        done = Export(folder, n_bytes, expected, bits, honest, parity, why, made.notes())
        (writer.folder / "README.md").write_text(card(job, record, made, done))
        writer.publish()
    return done


def _parity(job: Job, made: Format, again: Remade, folder: Path) -> tuple[Parity | None, str]:
    """Compare what is loaded with what was evaluated; the model is changed on the way."""
    if on_disk(again.model):
        return (
            None,
            "the model is larger than the memory, so that none was loaded beside it; every layer was unpacked and compared",
        )
    text, windows = _windows(job)
    model = again.model
    evaluated = logits(model, windows)
    _adopt(made, again)
    requantize_inputs(model, made.as_read)
    if not made.reads_kv:
        for block in model.get_submodule(family_of(model).blocks):
            quantize_attention(block, None, None)
    expected = logits(model, windows)
    floor = rounding_floor(model, windows, expected)
    engine, no_engine = made.engine(folder)
    inputs_kl = _kl_of_inputs(made, again, windows, expected) if engine is not None else 0.0
    again.layers.clear()
    again.model = model = None
    gc.collect()
    read, why = made.reader(folder, None if job.model.attn == "auto" else job.model.attn)
    if read is None:
        return None, why
    loaded = torch.cat([read(ids) for ids in windows.split(4)])
    del read
    inside = None
    if engine is not None:
        found = engine(windows)
        inside = InEngine(
            made.title, difference(evaluated, found), difference(expected, found).kl, inputs_kl, floor.kl,
            perplexity_of(found, windows),
        )  # fmt: skip
    parity = Parity(
        text, windows.shape[0], windows.shape[1], difference(evaluated, loaded), difference(expected, loaded), floor.mean,
        perplexity_of(evaluated, windows), perplexity_of(loaded, windows), inside,
    )  # fmt: skip
    return parity, no_engine


def _kl_of_inputs(made: Format, again: Remade, windows: Tensor, expected: Tensor) -> float:
    """How far rounding inputs as the format's engine does moves the expected model, which stays so."""
    for layer in again.layers:
        if layer.spec is not None:
            quantize_input(again.model.get_submodule(layer.name), made.engine_input(layer))
    return difference(expected, logits(again.model, windows)).kl


@torch.no_grad()
def _adopt(made: Format, again: Remade) -> None:
    """Give the model the weights that are stored, in the checkpoint's dtype."""
    for layer in again.layers:
        if layer.spec is not None:
            layer.weight.data = made.stored(layer).to(layer.weight.device)
    # Buffers, such as rotary frequencies, keep their precision when a checkpoint is loaded.
    for parameter in again.model.parameters():
        parameter.data = parameter.data.to(made.source.dtype)


def _windows(job: Job) -> tuple[str, Tensor]:
    """The text that the job's perplexity is of, else the embedded one; and windows of it."""
    plan = job.evaluation
    name = plan.ppl[0] if plan.ppl else _TEXT
    length = min(_LENGTH, plan.seq_len or _LENGTH)
    short = replace(plan, seq_len=length, max_windows=_WINDOWS, stride=None)
    return name, short.windows(name, tokenizer(job.model), job.library).tokens


def _expected(made: Format, model: Any, layers: list[QuantizedLayer]) -> float:
    """Bytes by the honest count, in which what is not quantized is as wide as the checkpoint's dtype."""
    rest = sum(p.numel() for p in model.parameters()) - sum(layer.weight.numel() for layer in layers)
    bits = sum(made.stored_bits(layer) for layer in layers)
    return (bits + rest * made.source.dtype.itemsize * 8) / 8


def _not_the_same(parity: Parity) -> str:
    gap = parity.expected
    return (
        f"the checkpoint, loaded, is not what was written: logits differ by {gap.largest:.3g} at most and {gap.mean:.3g} in "
        f"the mean, rounding explains {parity.floor:.3g}; KL {gap.kl:.3g}, the same likeliest token for "
        f"{gap.agreement:.1%}. Nothing was exported; please report it with the command and the versions of torch, "
        "transformers and compressed-tensors"
    )


def _engine_differs(found: InEngine) -> str:
    return (
        f"{found.name}, makes another model of the file: KL {found.expected_kl:.3g} nats, of which rounding inputs to 8 "
        f"bits explains {found.allowed:.3g} at most. Nothing was exported; please report it with the command and "
        "the version of llama-cpp-python"
    )
