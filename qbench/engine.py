"""Quantize a model, one block after another; the only place where blocks move between devices."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qbench.algorithms.base import Algorithm
from qbench.algorithms.rtn import round_to_nearest
from qbench.calib.activations import Fixed, fixed_attention, fixed_parts, quantize_inputs, quantize_products
from qbench.calib.block import Block
from qbench.calib.routing import routed_tokens, routing_report
from qbench.calib.stream import FirstInputs, Stream, first_inputs, to_device
from qbench.models.attention import use_quantized_attention
from qbench.models.blocks import at_hand
from qbench.models.disk import finish, use_finished
from qbench.models.experts import all_experts, experts_in
from qbench.models.family import Family, family_of
from qbench.models.parking import parked
from qbench.progress import Progress, load_tensors, save_tensors
from qbench.quant.grid import QParams
from qbench.quant.scheme import Scheme
from qbench.quant.storage import layer_bits

REVISION = 2  # raised when a change here changes numbers; part of a job's identity

Experts = Literal["routed", "all"]


def needs_data(algorithm: Algorithm, scheme: Scheme) -> bool:
    """Whether calibration data can change the result: for the algorithm, or for static ranges."""
    return algorithm.needs_data or scheme.needs_data


@dataclass
class Quantized:
    """What was done to a model.

    Attributes:
        errors: Of each block: `‖y − ŷ‖² / ‖y‖²`, of its output after quantization against its output before, on
            the same input; empty without data.
        stored_bits: By layer (`<block>.<name>`): bits of its weight as stored.
        extra_bits: Of what must be stored beside the model's own parameters.
        reports: What the steps had to tell of each block.
        report: What they had to tell of the whole model.
        seconds: That each block took, its reading and writing included.
        resumed_at: The block that a run went on with which was broken off before; 0 for one that was not.
    """

    errors: list[float] = field(default_factory=list)
    stored_bits: dict[str, float] = field(default_factory=dict)
    extra_bits: float = 0.0
    reports: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    resumed_at: int = 0


@dataclass(frozen=True)
class Finished:
    """A block as quantization leaves it, and what its weights were rounded to.

    Attributes:
        layer: The block itself; of a model on disk, its weights are in memory only while it is handed over.
        grids, kept, group_bits: As `Block` has them, of the layers that were rounded.
        fixed: The grids of inputs, keys and values that calibration data decided.
    """

    index: int
    layer: nn.Module
    grids: dict[str, QParams]
    kept: dict[str, Tensor]
    group_bits: dict[str, Tensor]
    fixed: Fixed

    def tensors(self) -> dict[str, Tensor]:
        """All but the block's own, by name; `of` reads them."""
        parts = {f"{name}|fixed": tensor for name, tensor in self.fixed.items()}
        for name, grid in self.grids.items():
            parts |= {f"{name}|grid_scale": grid.scale, f"{name}|grid_zero": grid.zero}
        for kind, found in (("mask", self.kept), ("widths", self.group_bits)):
            parts |= {f"{name}|{kind}": tensor for name, tensor in found.items()}
        return parts

    @classmethod
    def of(cls, index: int, layer: nn.Module, tensors: dict[str, Tensor]) -> "Finished":
        def part(kind: str) -> dict[str, Tensor]:
            return {n.removesuffix(f"|{kind}"): t for n, t in tensors.items() if n.endswith(f"|{kind}")}

        zeros = part("grid_zero")
        grids = {name: QParams(scale, zeros[name]) for name, scale in part("grid_scale").items()}
        return cls(index, layer, grids, part("mask"), part("widths"), part("fixed"))


@dataclass
class _Run:
    """A quantization under way.

    Attributes:
        inputs, clean: What has reached the next block, on the path that is calibrated on and on that of the original
            model.
    """

    model: Any
    family: Family
    algorithm: Algorithm
    scheme: Scheme
    device: torch.device
    propagate_error: bool
    samples: int
    experts: Experts
    deliver: Callable[[Finished], None]
    result: Quantized
    inputs: Stream | None = None
    clean: Stream | None = None


def quantize(
    model: Any,
    algorithm: Algorithm,
    scheme: Scheme,
    tokens: Tensor | None = None,
    *,
    propagate_error: bool = True,
    batch_size: int = 2,
    error_samples: int = 4,
    first: FirstInputs | None = None,
    device: torch.device | str = "cpu",
    on_block: Callable[[int, int], None] = lambda done, total: None,
    experts: Experts = "routed",
    progress: Progress | None = None,
    deliver: Callable[[Finished], None] = lambda finished: None,
) -> Quantized:
    """Fake-quantize `model` in place.

    Args:
        tokens: Calibration samples, `(n_samples, seq_len)`; used only by what needs data.
        propagate_error: Feed each block the output of the quantized blocks before it; otherwise that
            of the original ones.
        batch_size: Samples run together.
        error_samples: How many samples, the first ones, the blocks' errors are measured on.
        first: What `first_inputs` gave for this model and these tokens, where it is known already.
        device: Where one block at a time is processed.
        on_block: Called with (blocks done, blocks in all).
        experts: Whether experts are calibrated on the tokens that are routed to them, or each on all.
        progress: Where finished blocks are noted, of a model whose blocks are on disk; what was noted there before is
            taken over.
        deliver: Given each block when it is finished, in order; those that are taken over too.

    Raises:
        ValueError: If the algorithm rounds nothing, or data is needed and there is none.
        FloatingPointError: If quantization produced a value that is not finite; names the block.
    """
    if algorithm.kind != "round":
        raise ValueError(f"{type(algorithm).__name__} rounds nothing; end the pipeline with a rounder")
    reads = needs_data(algorithm, scheme)
    if reads and tokens is None:
        raise ValueError(
            f"{type(algorithm).__name__} with {scheme} needs calibration tokens; choose a calib set"
        )
    device, family, result = torch.device(device), family_of(model), Quantized()
    if scheme.kv is not None or scheme.bmm is not None:
        use_quantized_attention(model)
    with placed(model, device) if algorithm.runs_model else nullcontext():
        report = algorithm.prepare(model, scheme, tokens)
    if report is not None:
        first, result.report = None, report
    run = _Run(
        model, family, algorithm, scheme, device, propagate_error, error_samples, experts, deliver, result
    )
    n_blocks = len(model.get_submodule(family.blocks))
    kwargs: list[dict[str, Any]] = [{} for _ in range(n_blocks)]
    if reads and tokens is not None:
        run.inputs, kwargs = first or first_inputs(model, family, tokens, batch_size)
    run.clean = run.inputs if algorithm.needs_float_path else None
    with parked(model, family.blocks):
        for index in range(_take_over(run, progress) if progress else 0, n_blocks):
            clock = time.perf_counter()
            finished = _step(run, index, n_blocks, kwargs[index])
            result.seconds.append(time.perf_counter() - clock)
            if progress:
                finish(model, family.blocks, index)
                _note(run, progress, finished)
            on_block(index + 1, n_blocks)
    return result


@torch.no_grad()
def _step(run: _Run, index: int, n_blocks: int, kwargs: dict[str, Any]) -> Finished:
    """Quantize one block, and go on to the next."""
    device = run.device
    with at_hand(run.model, index) as layer, placed(layer, device):
        kwargs = to_device(kwargs, device)
        clean_out = run.clean.through(layer, kwargs, device) if run.clean else None
        block = Block(
            index, layer, run.family, run.inputs, kwargs, device, run.scheme, run.clean, clean_out, n_blocks=n_blocks
        )  # fmt: skip
        alone = run.samples if run.propagate_error or block.is_last else None
        reference = block.outputs(alone) if block.inputs else None
        finished = _quantize(run, block)
        run.clean = clean_out
        if reference is not None:
            outputs = block.outputs(None if run.propagate_error and not block.is_last else run.samples)
            run.result.errors.append(outputs.head(run.samples).error(reference.head(run.samples)))
            run.inputs = outputs if run.propagate_error else reference
        run.deliver(finished)
    return finished


def _quantize(run: _Run, block: Block) -> Finished:
    """Quantize the block's weights, and from now on whatever else the scheme says."""
    with all_experts(block.layer) if run.experts == "all" else nullcontext():
        block = _routed(block, run.experts)
        run.algorithm.process(block)
        whole = replace(block, unseen=frozenset())
        left = [n for n, version in block.missed.items() if whole.linear(n).weight._version == version]
        for name in (*block.unseen, *left):
            round_to_nearest(whole, name)
        if left:
            block.report["experts"]["missed"] = sorted({name.rpartition(".")[0] for name in left})
        _check_finite(whole)
        fixed = fixed_parts(block)
    quantize_inputs(block.index, block.scheme, whole.linears, fixed)
    fixed |= fixed_attention(block)
    quantize_products(block.layer, block.scheme, fixed)
    _account(whole, run.result)
    return Finished(block.index, block.layer, block.grids, block.kept, block.group_bits, fixed)


def _routed(block: Block, experts: Experts) -> Block:
    """The block without the experts that no token is routed to, which are rounded to nearest; the report names them."""
    if block.inputs is None or not experts_in(block.layer):
        return block
    counts = routed_tokens(block.inputs, block.layer, block.kwargs, block.device)
    n_tokens = block.inputs.hidden.shape[0] * block.inputs.hidden.shape[1]
    report = routing_report(counts, block.inputs.hidden.shape[-1], n_tokens if experts == "all" else None)
    block.report["experts"] = report
    if experts == "all":
        return block
    alone = {f"{path}.{index}" for path, unseen in report["unseen"].items() for index in unseen}
    return replace(block, unseen=frozenset(n for n in block.linears if n.rpartition(".")[0] in alone))


def _note(run: _Run, progress: Progress, finished: Finished) -> None:
    """Note a finished block; its weights are where blocks on disk are."""
    save_tensors(progress.block_file(finished.index), finished.tensors())
    tensors = {"generator": torch.get_rng_state()}
    for name, stream in (("inputs", run.inputs), ("clean", run.clean)):
        if stream is not None:
            tensors[name] = stream.hidden
    progress.note(finished.index + 1, {"result": asdict(run.result)}, tensors)


def _take_over(run: _Run, progress: Progress) -> int:
    """Bring a model to where a run was broken off; returns the block to go on with."""
    if (state := progress.read()) is None:
        return 0
    done = int(state["done"])
    for index in range(done):
        use_finished(run.model, run.family.blocks, index)
        with at_hand(run.model, index) as layer:
            finished = Finished.of(index, layer, load_tensors(progress.block_file(index)))
            linears: Any = {name: layer.get_submodule(name) for name in run.family.linears(layer)}
            quantize_inputs(index, run.scheme, linears, finished.fixed)
            quantize_products(layer, run.scheme, finished.fixed)
            run.deliver(finished)
    tensors = progress.tensors(done)
    torch.set_rng_state(tensors["generator"])
    run.inputs, run.clean = (
        None if stream is None else replace(stream, hidden=tensors[name])
        for name, stream in (("inputs", run.inputs), ("clean", run.clean))
    )
    for name, value in state["result"].items():
        setattr(run.result, name, value)
    run.result.resumed_at = done
    return done


def _account(block: Block, result: Quantized) -> None:
    """What the layers take when they are stored: by their scheme, by what is kept, or as a step has said."""
    for name, linear in block.linears.items():
        rows, columns = linear.weight.shape
        kept, group_bits = block.kept.get(name), block.group_bits.get(name)
        bits = layer_bits(block.weight_spec(name), rows, columns, kept, group_bits)
        result.stored_bits[f"{block.index}.{name}"] = block.stored_bits.get(name, bits)
    result.extra_bits += sum(block.extra_bits.values())
    result.reports.append(dict(block.report))


def _check_finite(block: Block) -> None:
    for name, linear in block.linears.items():
        if not torch.isfinite(linear.weight).all():
            raise FloatingPointError(
                f"block {block.index}: {name} holds values that are not finite after quantization; "
                "calibrate with more tokens, or use model.dtype=float32"
            )


@contextmanager
def placed(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """A block, or a whole model, on `device` while the context lasts."""
    home = next(layer.parameters()).device
    layer.to(device)
    try:
        yield
    finally:
        layer.to(home)
