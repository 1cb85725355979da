"""Fake quantization of what enters linear layers; keys and values are in `qbench.models.attention`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qbench.quant.grid import QParams, fake_quantize
from qbench.quant.spec import QuantSpec


def quantize_input(
    linear: nn.Linear, spec: QuantSpec, qparams: QParams | None = None, kept: Tensor | None = None
) -> RemovableHandle:
    """From now on, fake-quantize whatever enters `linear`: on its own grid, or on that of `qparams`.

    Hooks run in the order of their registration: what else changes the input comes first.

    Args:
        kept: Input channels that stay in floating point, a mask `(in_features,)`: they pass as they are, and have
            no part in the range (LLM.int8, QUIK). Ranges in `qparams` are the caller's.

    Raises:
        ValueError: If `kept` has another shape or dtype, or the grid's range need not contain zero.
    """
    if kept is not None:
        _check_kept(linear, spec, kept)
    return linear.register_forward_pre_hook(_QuantizedInput(spec, qparams, kept))


@dataclass(frozen=True)
class _QuantizedInput:
    """The hook that fake-quantizes a layer's input."""

    spec: QuantSpec
    qparams: QParams | None
    kept: Tensor | None

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        grid = None if self.qparams is None else on_device(self.qparams, x.device)
        if self.kept is None:
            return (fake_quantize(x, self.spec, grid), *args[1:])
        mask = self.kept.to(x.device)
        # Zero lies in every range, so that a channel of zeros does not widen one.
        return (torch.where(mask, x, fake_quantize(x.masked_fill(mask, 0), self.spec, grid)), *args[1:])


def requantize_inputs(model: nn.Module, as_read: Callable[[QuantSpec], QuantSpec | None]) -> None:
    """From now on, quantize what enters a model's layers on the grids that `as_read` makes of those that it has.

    Where that is `None`, the input is left in floating point.
    """
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if not isinstance(hook, _QuantizedInput):
                continue
            if (spec := as_read(hook.spec)) is None:
                del module._forward_pre_hooks[key]
            else:
                module._forward_pre_hooks[key] = replace(hook, spec=spec)


@contextmanager
def quantized_inputs(inputs: Mapping[nn.Linear, tuple[QuantSpec, Tensor | None]]) -> Iterator[None]:
    """Fake-quantize what enters some layers while the context lasts; each has its grid and the channels it keeps.

    Raises:
        ValueError: As `quantize_input` does.
    """
    with ExitStack() as stack:
        for linear, (spec, kept) in inputs.items():
            stack.callback(quantize_input(linear, spec, kept=kept).remove)
        yield


def on_device(qparams: QParams, device: torch.device) -> QParams:
    """The same grid beside a tensor on `device`: blocks move, and what is chosen for them does not move along."""
    return QParams(*(part.to(device) for part in qparams))


def _check_kept(linear: nn.Linear, spec: QuantSpec, kept: Tensor) -> None:
    if kept.shape != (linear.in_features,) or kept.dtype != torch.bool:
        raise ValueError(
            f"kept is {kept.dtype} of shape {tuple(kept.shape)}; it must be a boolean mask of the layer's "
            f"{linear.in_features} inputs"
        )
    if not spec.zero_in_range:
        raise ValueError(
            "channels are kept out of ranges as zeros, and this grid has zero_in_range unset; set it for activations"
        )
