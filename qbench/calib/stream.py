"""Calibration activations, carried from block to block.

Only one block and one batch are on the accelerator at a time; hidden states wait on the CPU.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbench.calib.observers import Observer
from qbench.models.family import Family, Link


@dataclass(frozen=True)
class Stream:
    """The hidden states entering one block, `(n_samples, seq_len, hidden)` on the CPU.

    Attributes:
        batch_size: Samples run together; affects speed and memory, not meaning.
    """

    hidden: Tensor
    batch_size: int = 8

    def through(self, layer: nn.Module, kwargs: dict[str, Any], device: torch.device) -> "Stream":
        """The hidden states leaving `layer`."""
        with torch.no_grad():
            batches = [
                _first(layer(h.to(device), **kwargs)).cpu() for h in self.hidden.split(self.batch_size)
            ]
        return Stream(torch.cat(batches), self.batch_size)

    def error(self, reference: "Stream") -> float:
        """Relative squared error: `‖self − reference‖² / ‖reference‖²`."""
        noise, power = 0.0, 0.0
        for a, b in zip(self.hidden, reference.hidden, strict=True):
            noise += float((a.double() - b.double()).square().sum())
            power += float(b.double().square().sum())
        return noise / power


class _Enough(Exception):
    """Whoever listens has heard all of a batch: the rest of the forward pass need not run."""


@dataclass(frozen=True)
class Block:
    """One decoder block, its place in the model, and the activations that reach it.

    `inputs` is `None` where there is no calibration data.
    """

    index: int
    layer: nn.Module
    family: Family
    inputs: Stream | None
    kwargs: dict[str, Any]
    device: torch.device

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The layers to quantize, by name, in forward order."""
        return {name: self.linear(name) for name in self.family.linears}

    def __getitem__(self, name: str) -> nn.Module:
        return self.layer.get_submodule(name)

    def linear(self, name: str) -> nn.Linear:
        module = self[name]
        assert isinstance(module, nn.Linear), f"{name} is a {type(module).__name__}"
        return module

    def sinks(self, link: Link) -> list[nn.Linear]:
        return [self.linear(name) for name in link.sinks]

    def scalable(self, link: Link) -> bool:
        """Whether the link's source has one output channel per input channel of its sinks.

        It has not under grouped-query attention, where a value head feeds several output heads.
        """
        if link.source is None:
            return False
        weight = self[link.source].get_parameter("weight")
        return weight.shape[0] == self.linear(link.sinks[0]).in_features

    def outputs(self) -> Stream:
        """Run the block on its inputs as it stands now."""
        assert self.inputs is not None, "a data-free algorithm asked for activations"
        return self.inputs.through(self.layer, self.kwargs, self.device)

    def observe(
        self, *kinds: Callable[[], Observer], links: Sequence[Link] | None = None
    ) -> dict[Link, tuple[Tensor, ...]]:
        """Statistics, one of each kind, of the input that the sinks of a link share; one pass over the data.

        The pass stops, batch by batch, at the last layer that is observed.
        """
        assert self.inputs is not None, "a data-free algorithm asked for activations"
        links = self.family.links if links is None else links
        observers = {link: tuple(make() for make in kinds) for link in links}
        waiting: set[Link] = set()

        def hook(link: Link) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def update(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                for observer in observers[link]:
                    observer.update(args[0])
                waiting.discard(link)
                if not waiting:
                    raise _Enough

            return update

        with torch.no_grad(), ExitStack() as stack:
            for link in links:
                handle = self.linear(link.sinks[0]).register_forward_pre_hook(hook(link))
                stack.callback(handle.remove)
            for batch in self.inputs.hidden.split(self.inputs.batch_size) if links else ():
                waiting.update(links)
                try:
                    self.layer(batch.to(self.device), **self.kwargs)
                except _Enough:
                    continue
                raise RuntimeError(f"block {self.index} never ran {', '.join(k.sinks[0] for k in waiting)}")
        return {link: tuple(o.value for o in observers[link]) for link in links}


FirstInputs = tuple[Stream, list[dict[str, Any]]]


def first_inputs(model: Any, family: Family, tokens: Tensor, batch_size: int = 8) -> FirstInputs:
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
                raise _Enough  # the head's logits would be the largest tensor of the whole calibration
            return h

        return forward

    with torch.no_grad(), ExitStack() as stubs:
        for index, block in enumerate(blocks):
            stubs.enter_context(_swapped(block, "forward", stub(index)))
        for batch in (*tokens.split(batch_size), tokens[:1]):
            with suppress(_Enough):
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


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


@contextmanager
def _swapped(owner: nn.Module, name: str, value: Any) -> Iterator[None]:
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
