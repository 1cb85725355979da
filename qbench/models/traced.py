"""What happens in one decoder block on a few tokens: which module is given what, and in which order."""

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qbench.models.nested import mapped

_TOKENS = 8

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Met(Exception):
    """The first block was reached."""


@dataclass
class Trace:
    """One run of a block.

    Attributes:
        entered: By module, in the order of their calls: the first tensor that it was given.
        left: What it made of it.
    """

    entered: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, Tensor] = field(default_factory=dict)
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    returns_tuple: bool = False

    def sharing(self, names: Collection[str]) -> list[tuple[str, ...]]:
        """These modules, of those that were called, grouped by what they were given, in the order of their calls."""
        groups: list[list[str]] = []
        for name in self.entered:
            if name not in names:
                continue
            known = next((g for g in groups if _same(self.entered[g[0]], self.entered[name])), None)
            known.append(name) if known else groups.append([name])
        return [tuple(group) for group in groups]

    def makers(self, name: str) -> list[str]:
        """The modules whose output is what `name` was given."""
        return [
            other for other, made in self.left.items() if other != name and _same(made, self.entered[name])
        ]

    def readers(self, name: str) -> list[str]:
        """The modules, `name` among them, that were given the same."""
        return [other for other, given in self.entered.items() if _same(given, self.entered[name])]

    def before(self, name: str) -> list[str]:
        """The modules that were called before `name`."""
        order = list(self.entered)
        return order[: order.index(name)]


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, perhaps in another shape."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


@torch.no_grad()
def first_call(model: Any, path: str) -> Call:
    """What the first block is called with on a few tokens."""
    met: list[Call] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        met.append((args, kwargs))
        raise _Met

    handle = model.get_submodule(path)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(torch.arange(_TOKENS, device=model.device)[None] % model.config.vocab_size, use_cache=False)
    except _Met:
        return met[0]
    finally:
        handle.remove()
    raise NotImplementedError(
        f"{type(model).__name__} never calls the first of {path}; its blocks were not found"
    )


def in_double(value: Any) -> Any:
    """The same with floating-point tensors in float64, however deep in tuples and dicts."""
    return mapped(value, lambda x: x.double() if x.is_floating_point() else x)


@torch.no_grad()
def traced(block: nn.Module, call: Call) -> Trace:
    """Run a block and note what its modules are given and make."""
    trace, (args, kwargs) = Trace(), call

    def note(name: str, given: Any, made: Any) -> None:
        if given and isinstance(given[0], Tensor) and name not in trace.entered:
            trace.entered[name] = given[0]
            if isinstance(made, Tensor):
                trace.left[name] = made

    order: list[str] = []
    with ExitStack() as stack:
        for name, module in block.named_modules():
            if name:
                stack.callback(module.register_forward_pre_hook(lambda *_, n=name: order.append(n)).remove)
                stack.callback(module.register_forward_hook(lambda _, i, o, n=name: note(n, i, o)).remove)
        out = block(*args, **kwargs)
    trace.entered = {name: trace.entered[name] for name in dict.fromkeys(order) if name in trace.entered}
    trace.returns_tuple = isinstance(out, tuple)
    trace.output = out[0] if isinstance(out, tuple) else out
    return trace
