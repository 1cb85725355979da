"""What is large outside of a model's decoder blocks (embeddings, head), put on disk while the blocks are worked on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from qbench.models.blockfile import read_block_file, write_block_file
from qbench.models.disk import on_disk, scratch_of

_LARGE = 1 << 24  # bytes
# What the file of a model holds: its parameters, and how often each was changed.
_written: WeakKeyDictionary[nn.Module, list[tuple[ref[nn.Parameter], int]]] = WeakKeyDictionary()


@contextmanager
def parked(model: Any, blocks: str) -> Iterator[None]:
    """While it lasts, large parameters outside of the blocks are on disk; nothing happens to a model in memory.

    The model cannot run meanwhile, only its blocks can. Tied parameters stay tied.

    Raises:
        OSError: If the file cannot be written; names it.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    values: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules(remove_duplicate=False) if on_disk(model) else ():
        for name, p in module.named_parameters(recurse=False):
            if not f"{path}.".startswith(f"{blocks}.") and p.nbytes >= _LARGE and not p.is_meta:
                values[id(p)] = p
                places.setdefault(id(p), []).append((module, name))
    if not values:
        yield
        return
    held = nn.ParameterDict({f"p{i}": p for i, p in enumerate(values.values())})
    names = dict(zip(values, held, strict=True))
    file = scratch_of(model) / "outside.safetensors"
    known = {id(p()): version for p, version in _written.get(model, []) if p() is not None}
    if known != {key: p._version for key, p in values.items()}:
        write_block_file(file, held)
    for key, p in values.items():
        _put(places[key], nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad))
    del held, p
    values.clear()
    try:
        yield
    finally:
        found = read_block_file(file)
        for key, where in places.items():
            parameter: Any = found[names[key]]
            module, name = where[0]
            _put(where, parameter.requires_grad_(module.get_parameter(name).requires_grad))
        back: list[Any] = [found[names[key]] for key in places]
        _written[model] = [(ref(p), p._version) for p in back]


def _put(places: list[tuple[nn.Module, str]], parameter: nn.Parameter) -> None:
    for module, name in places:
        module.register_parameter(name, parameter)
