"""Quantize a model, one block after another; the only place where blocks move between devices."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qbench.algorithms.base import Algorithm
from qbench.calib.observers import Range
from qbench.calib.stream import Block, FirstInputs, Stream, first_inputs, to_device
from qbench.models.family import family_of
from qbench.models.hooks import quantize_input, quantize_kv
from qbench.quant.affine import choose_qparams
from qbench.quant.scheme import QuantSpec, Scheme


def needs_data(algorithm: Algorithm, scheme: Scheme) -> bool:
    """Whether calibration data can change the result: for the algorithm, or for static activation ranges."""
    return algorithm.needs_data or (
        scheme.activation is not None and scheme.activation.granularity == "tensor"
    )


def quantize(
    model: Any,
    algorithm: Algorithm,
    scheme: Scheme,
    tokens: Tensor | None = None,
    *,
    propagate_error: bool = True,
    batch_size: int = 8,
    first: FirstInputs | None = None,
    device: torch.device | str = "cpu",
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """Fake-quantize `model` in place and return each block's relative output error.

    The error of a block is `‖y − ŷ‖² / ‖y‖²` on the calibration data, of its output after quantization
    against its output before, on the same input. Without data the list is empty.

    Args:
        tokens: Calibration samples, `(n_samples, seq_len)`; used only by what needs data.
        propagate_error: Feed each block the output of the quantized blocks before it; otherwise that
            of the original ones.
        batch_size: Samples run together.
        first: What `first_inputs` gave for this model and these tokens, where it is known already.
        device: Where one block at a time is processed.
        on_block: Called with (blocks done, blocks in all).

    Raises:
        ValueError: If the algorithm rounds nothing, or data is needed and there is none.
        FloatingPointError: If quantization produced a value that is not finite; names the block.
    """
    if algorithm.kind != "round":
        raise ValueError(f"{type(algorithm).__name__} rounds nothing; end the pipeline with a rounder")
    if needs_data(algorithm, scheme) and tokens is None:
        raise ValueError(
            f"{type(algorithm).__name__} with {scheme} needs calibration tokens; choose a calib set"
        )

    device, family, errors = torch.device(device), family_of(model), []
    inputs: Stream | None = None
    layers = list(model.get_submodule(family.blocks))
    kwargs: list[dict[str, Any]] = [{} for _ in layers]
    if tokens is not None and needs_data(algorithm, scheme):
        inputs, kwargs = first or first_inputs(model, family, tokens, batch_size)
    for index, layer in enumerate(layers):
        with _on(layer, device):
            block = Block(index, layer, family, inputs, to_device(kwargs[index], device), device)
            reference = block.outputs() if inputs else None
            algorithm.process(block, scheme)
            _check_finite(block)
            if scheme.activation is not None:
                _quantize_inputs(block, scheme.activation)
            if reference is not None:
                outputs = block.outputs()
                errors.append(outputs.error(reference))
                inputs = outputs if propagate_error else reference
        on_block(index + 1, len(layers))
    if scheme.kv is not None:
        quantize_kv(model, scheme.kv)
    return errors


@torch.no_grad()
def _quantize_inputs(block: Block, spec: QuantSpec) -> None:
    """Hook every linear layer: on a grid of each row's own, or on one grid from the calibration data."""
    if spec.granularity != "tensor":
        for linear in block.linears.values():
            quantize_input(linear, spec)
        return
    for link, (extremes,) in block.observe(Range).items():
        qparams = choose_qparams(extremes, spec)
        for sink in block.sinks(link):
            quantize_input(sink, spec, qparams)


def _check_finite(block: Block) -> None:
    for name, linear in block.linears.items():
        if not torch.isfinite(linear.weight).all():
            raise FloatingPointError(
                f"block {block.index}: {name} holds values that are not finite after quantization; "
                "calibrate with more tokens, or use model.dtype=float32"
            )


@contextmanager
def _on(layer: nn.Module, device: torch.device) -> Iterator[None]:
    home = next(layer.parameters()).device
    layer.to(device)
    try:
        yield
    finally:
        layer.to(home)
