"""Calibration activations, carried from block to block.

Only one block and one batch are on the accelerator at a time; hidden states wait on the CPU.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbench.calib.causal import forward_only
from qbench.models.family import Family


@dataclass(frozen=True)
class Stream:
    """The hidden states entering one block, `(n_samples, seq_len, hidden)` on the CPU.

    Attributes:
        batch_size: Samples run together; affects speed and memory, not meaning.
    """

    hidden: Tensor
    batch_size: int = 2

    def through(self, layer: nn.Module, kwargs: dict[str, Any], device: torch.device) -> "Stream":
        """The hidden states leaving `layer`."""
        with forward_only():
            return self.of([hidden_of(layer(h.to(device), **kwargs)).cpu() for h in self.batches()])

    def batches(self) -> tuple[Tensor, ...]:
        return self.hidden.split(self.batch_size)

    def of(self, batches: list[Tensor]) -> "Stream":
        """Another stream of this one's batch size."""
        return Stream(torch.cat(batches), self.batch_size)

    def head(self, n_samples: int) -> "Stream":
        """The first samples."""
        return Stream(self.hidden[:n_samples], self.batch_size)

    def error(self, reference: "Stream") -> float:
        """Relative squared error: `‖self − reference‖² / ‖reference‖²`."""
        noise, power = 0.0, 0.0
        for a, b in zip(self.hidden, reference.hidden, strict=True):
            noise += float((a.double() - b.double()).square().sum())
            power += float(b.double().square().sum())
        return noise / power


class Enough(Exception):
    """Whoever listens has heard all of a batch: the rest of the forward pass need not run."""


FirstInputs = tuple[Stream, list[dict[str, Any]]]


def first_inputs(model: Any, family: Family, tokens: Tensor, batch_size: int = 2) -> FirstInputs:
    """Run the model with every block stubbed out, recording what each block is called with.

    `tokens` is `(n_samples, seq_len)`. Samples are equally long and unpadded, so masks and position
    embeddings are the same for all; they are recorded with one sample, so that they broadcast over
    any batch. They may differ between blocks (sliding-window layers), so each block has its own.
    """
    blocks = model.get_submodule(family.blocks)
    hidden: list[Tensor] = []
    kwargs: list[dict[str, Any]] = [{} for _ in blocks]

    def stub(index: int) -> Callable[..., Tensor]:
        def forward(h: Tensor, *args: Any, **kw: Any) -> Tensor:
            assert not args, (
                f"block {index} is called with {len(args)} unnamed arguments besides the hidden states"
            )
            if index == 0:
                hidden.append(h.cpu())
            kwargs[index] = kw
            if index == len(blocks) - 1:
                raise Enough  # the head's logits would be the largest tensor of the whole calibration
            return h

        return forward

    with torch.no_grad(), ExitStack() as stubs:
        for index, block in enumerate(blocks):
            stubs.enter_context(swapped(block, "forward", stub(index)))
        for batch in (*tokens.split(batch_size), tokens[:1]):
            with suppress(Enough):
                model(batch.to(model.device), use_cache=False)
    return Stream(torch.cat(hidden[:-1]), batch_size), kwargs


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it, however deep in tuples and dicts, on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(to_device(v, device) for v in value)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    return value


def hidden_of(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The hidden states in what a decoder block returns."""
    return out[0] if isinstance(out, tuple) else out


@contextmanager
def swapped(owner: nn.Module, name: str, value: Any) -> Iterator[None]:
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
