"""Quantize a model, one block after another; the only place where blocks move between devices."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qbench.algorithms.base import Algorithm
from qbench.calib.block import Block
from qbench.calib.observers import observer_for
from qbench.calib.stream import FirstInputs, Stream, first_inputs, to_device
from qbench.models.attention import observe_kv, quantize_attention, use_quantized_attention
from qbench.models.family import Link, family_of
from qbench.models.hooks import quantize_input
from qbench.quant.grid import choose_qparams
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec
from qbench.quant.storage import layer_bits

REVISION = 2  # raised when a change here changes numbers; part of a job's identity


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
    """

    errors: list[float] = field(default_factory=list)
    stored_bits: dict[str, float] = field(default_factory=dict)
    extra_bits: float = 0.0
    reports: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


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
    inputs: Stream | None = None
    layers = list(model.get_submodule(family.blocks))
    kwargs: list[dict[str, Any]] = [{} for _ in layers]
    if reads and tokens is not None:
        inputs, kwargs = first or first_inputs(model, family, tokens, batch_size)
    clean = inputs if algorithm.needs_float_path else None
    for index, layer in enumerate(layers):
        with placed(layer, device):
            kw = to_device(kwargs[index], device)
            clean_out = clean.through(layer, kw, device) if clean else None
            block = Block(
                index, layer, family, inputs, kw, device, scheme, clean, clean_out, n_blocks=len(layers)
            )
            inputs = _quantize(block, algorithm, result, propagate_error, error_samples)
            clean = clean_out
        on_block(index + 1, len(layers))
    return result


def _quantize(
    block: Block, algorithm: Algorithm, result: Quantized, propagate_error: bool, samples: int
) -> Stream | None:
    """Quantize one block; returns what reaches the next one."""
    reference = block.outputs(samples if propagate_error or block.is_last else None) if block.inputs else None
    algorithm.process(block)
    _check_finite(block)
    _quantize_inputs(block)
    _quantize_attention(block)
    _account(block, result)
    if reference is None:
        return None
    outputs = block.outputs(None if propagate_error and not block.is_last else samples)
    result.errors.append(outputs.head(samples).error(reference.head(samples)))
    return outputs if propagate_error else reference


@torch.no_grad()
def _quantize_inputs(block: Block) -> None:
    """Hook every linear layer: on a grid of each row's own, or on one grid from the calibration data."""
    ranges = _static_ranges(block)
    for name, linear in block.linears.items():
        if (spec := block.activation_spec(name)) is not None:
            qparams = None if spec.dynamic else choose_qparams(ranges[name], spec)
            quantize_input(linear, spec, qparams, block.kept_channels(name))


def _static_ranges(block: Block) -> dict[str, Tensor]:
    """By layer: the range of its input on the calibration data, where that is what its grid is to be made from."""
    alike: dict[
        tuple[QuantSpec, str], list[Link]
    ] = {}  # layers with channels of their own to keep come alone
    for link in block.links:
        for name in link.sinks:
            spec, kept = block.activation_spec(name), block.kept_channels(name)
            if spec is not None and not spec.dynamic:
                alike.setdefault((spec, "" if kept is None else name), []).append(Link(None, (name,)))
    ranges: dict[str, Tensor] = {}
    for (spec, alone), links in alike.items():
        assert block.inputs is not None, "a static range without calibration data"
        kept = block.kept_channels(alone) if alone else None
        kind = observer_for(spec, block.inputs.hidden.shape[1], kept)
        ranges |= {link.sinks[0]: value for link, (value,) in block.observe(kind, links=links).items()}
    return ranges


@torch.no_grad()
def _quantize_attention(block: Block) -> None:
    kv, bmm = block.scheme.kv, block.scheme.bmm
    if kv is None and bmm is None:
        return
    key = value = None
    if kv is not None and not kv.dynamic:
        assert block.inputs is not None
        length = block.inputs.hidden.shape[1]
        keys, values = observer_for(kv.key, length)(), observer_for(kv.value, length)()
        with observe_kv(block.layer, kv, keys.update, values.update):
            block.inputs.through(block.layer, block.kwargs, block.device)
        key, value = choose_qparams(keys.value, kv.key), choose_qparams(values.value, kv.value)
    quantize_attention(block.layer, kv, bmm, key, value)


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
