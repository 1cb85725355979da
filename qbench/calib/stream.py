"""Calibration activations, carried from block to block.

Only one block and one batch are on the accelerator at a time; hidden states wait on the CPU, or in a file
(`qbench.calib.spill`).
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbench.calib.causal import forward_only
from qbench.calib.spill import empty
from qbench.models.family import Family
from qbench.models.nested import mapped


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
            return self.of(called(layer, h.to(device), kwargs) for h in self.batches())

    def batches(self) -> tuple[Tensor, ...]:
        return self.hidden.split(self.batch_size)

    def of(self, batches: Iterable[Tensor]) -> "Stream":
        """Another stream of as many samples, and of this one's batch size."""
        return Stream(collected(batches, len(self.hidden)), self.batch_size)

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


@dataclass(frozen=True)
class PerSample:
    """What a block is called with that has a part for each sample of the batch, along `dim`: the part of `one`."""

    one: Tensor
    dim: int

    def repeated(self, n_samples: int) -> Tensor:
        """The same for a batch."""
        if self.one.shape[self.dim] == 1:
            return self.one.expand([n_samples if d == self.dim else -1 for d in range(self.one.ndim)])
        return self.one.repeat([n_samples if d == self.dim else 1 for d in range(self.one.ndim)])


FirstInputs = tuple[Stream, list[dict[str, Any]]]


def first_inputs(model: Any, family: Family, tokens: Tensor, batch_size: int = 2) -> FirstInputs:
    """Run the model with every block stubbed out, recording what each block is called with.

    `tokens` is `(n_samples, seq_len)`. Samples are equally long and unpadded, so masks and position embeddings are the
    same for all. They are recorded with one sample, and with two, which tells what has a part for each
    (`PerSample`). They may differ between blocks (sliding-window layers), so each block has its own.

    Raises:
        NotImplementedError: If blocks are called with what depends on the tokens, or has no name.
    """
    blocks = list(model.get_submodule(family.blocks))
    met: list[tuple[Tensor, dict[str, Any]]] = []

    def stub(block: nn.Module) -> Callable[..., Any]:
        parameters = inspect.signature(block.forward).parameters.values()
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

        def forward(*args: Any, **kw: Any) -> Any:
            met.append(_by_name(type(block).__name__, names, args, kw))
            if len(met) == len(blocks):
                raise Enough  # the head's logits would be the largest tensor of the whole calibration
            return (met[-1][0],) if family.returns_tuple else met[-1][0]

        return forward

    def run(batch: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
        met.clear()
        with suppress(Enough):
            model(batch.to(model.device), use_cache=False)
        return list(met)

    with torch.no_grad(), ExitStack() as stubs:
        for block in blocks:
            stubs.enter_context(swapped(block, "forward", stub(block)))
        hidden = collected((run(batch)[0][0] for batch in tokens.split(batch_size)), len(tokens))
        one, two = run(tokens[:1]), run(tokens[:2] if len(tokens) > 1 else tokens.repeat(2, 1))
    kwargs = [
        {name: _per_sample(name, value, pair[name]) for name, value in single.items()}
        for (_, single), (_, pair) in zip(one, two, strict=True)
    ]
    return Stream(hidden, batch_size), kwargs


def _by_name(
    block: str, names: list[str], args: tuple[Any, ...], kw: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """The hidden states that a block is called with, and all else, by the names of its `forward`."""
    if not args:
        return kw[names[0]], {name: value for name, value in kw.items() if name != names[0]}
    if len(args) > max(len(names), 1):
        raise NotImplementedError(
            f"{block} is called with {len(args)} unnamed arguments, its forward names {len(names)}; blocks are run "
            "again with each argument by its name"
        )
    return args[0], dict(zip(names[1:], args[1:], strict=False)) | kw


def _per_sample(name: str, one: Any, two: Any) -> Any:
    """What one sample is called with, marked where it would not serve for more.

    Args:
        two: The same of two samples.
    """
    if type(one) is not type(two):
        raise _varies(name)
    if isinstance(one, tuple):
        return tuple(_per_sample(name, a, b) for a, b in zip(one, two, strict=True))
    if isinstance(one, dict):
        return {key: _per_sample(name, value, two[key]) for key, value in one.items()}
    if not isinstance(one, Tensor):
        return one
    if one.ndim != two.ndim:
        raise _varies(name)
    grown = [d for d, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b]
    marked = PerSample(one, grown[0]) if grown else None
    if not torch.equal(two, one if marked is None else marked.repeated(2)):
        raise _varies(name)
    return one if marked is None else marked


def _varies(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"the blocks' argument {name!r} depends on the tokens; blocks can be run one by one only where what they are "
        "called with, but for the hidden states, is the same for all samples"
    )


def called(layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """A block's output for a batch, with the arguments that `first_inputs` recorded."""
    return hidden_of(layer(hidden, **for_batch(kwargs, len(hidden))))


def for_batch(kwargs: dict[str, Any], n_samples: int) -> dict[str, Any]:
    """A block's recorded arguments, as they are for a batch."""
    fit: dict[str, Any] = mapped(kwargs, lambda v: v.repeated(n_samples), (PerSample,))
    return fit


def collected(batches: Iterable[Tensor], n_samples: int, into: Tensor | None = None) -> Tensor:
    """`torch.cat` on the CPU, or in a file, of batches that have `n_samples` rows in all and are not held together.

    Args:
        into: Is overwritten with them, if it is of their type and shape.
    """
    start = 0
    for batch in batches:
        shape = (n_samples, *batch.shape[1:])
        if start == 0 and (into is None or (into.shape, into.dtype) != (shape, batch.dtype)):
            into = empty(shape, batch.dtype)
        assert into is not None
        into[start : start + len(batch)] = batch
        start += len(batch)
    assert start == n_samples, f"{start} samples of {n_samples}"
    assert into is not None, "there are samples"
    return into


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it, however deep in tuples and dicts, on `device`."""

    def move(v: Tensor | PerSample) -> Tensor | PerSample:
        return PerSample(v.one.to(device), v.dim) if isinstance(v, PerSample) else v.to(device)

    return mapped(value, move, (Tensor, PerSample))


def hidden_of(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The hidden states in what a decoder block returns."""
    return out[0] if isinstance(out, tuple) else out


@contextmanager
def swapped(owner: nn.Module, name: str, value: Any) -> Iterator[None]:
    """While it lasts, a module has `value` for an attribute of its class or its own that is no parameter or module."""
    own = owner.__dict__.get(name)  # accelerate's hooks are a `forward` of the module itself
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        if own is not None:
            setattr(owner, name, own)
