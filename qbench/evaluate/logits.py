"""What a model predicts on windows, batch by batch: whole, or one block at a time on the device.

In the second way all windows go through one block before the next, so that the device holds one block and a batch of
activations; hidden states wait on the CPU, or in a file (`qbench.calib.spill`).
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qbench.calib.stream import called, collected, first_inputs, hidden_of, swapped, to_device
from qbench.engine import placed
from qbench.models.blocks import at_hand, each_block
from qbench.models.family import family_of
from qbench.models.parking import parked

Batch = tuple[slice, Tensor, Tensor]  # which windows, their tokens, (batch, seq_len, vocab) logits


def whole(model: Any, windows: Tensor, batch_size: int) -> Iterator[Batch]:
    """Logits of a model that is on its device."""
    with torch.inference_mode():
        for part in _parts(len(windows), batch_size):
            ids = windows[part].to(model.device)
            yield part, ids, model(ids, use_cache=False).logits


def block_by_block(
    model: Any, windows: Tensor, batch_size: int, device: torch.device | str
) -> Iterator[Batch]:
    """Logits of a model that stays on the CPU but for the block at work."""
    hidden = last_hidden(model, windows, batch_size, torch.device(device))
    yield from from_hidden(model, hidden, windows, batch_size, device)


def from_hidden(
    model: Any, hidden: Tensor, windows: Tensor, batch_size: int, device: torch.device | str
) -> Iterator[Batch]:
    """Logits of what the last block put out, `(n_windows, seq_len, hidden)`."""
    device, tail = torch.device(device), Tail(model, share=True)
    with placed(tail.model, device):
        for part in _parts(len(windows), batch_size):
            with torch.inference_mode():
                ids = windows[part].to(device)
                logits = tail(ids, hidden[part].to(device))
            yield part, ids, logits


def last_hidden(model: Any, windows: Tensor, batch_size: int, device: torch.device) -> Tensor:
    """What the last block puts out, `(n_windows, seq_len, hidden)` on the CPU, one block on the device at a time."""
    family = family_of(model)
    stream, kwargs = first_inputs(model, family, windows, batch_size)
    hidden = stream.hidden
    with parked(model, family.blocks):
        for block, kw in zip(each_block(model, family.blocks), kwargs, strict=True):
            # What is moved inside inference_mode is of no use for training ever after.
            with placed(block, device):
                there = to_device(kw, device)
                outputs = (_output(block, h.to(device), there) for h in hidden.split(batch_size))
                hidden = collected(outputs, len(windows), into=hidden)
    return hidden


@torch.inference_mode()
def _output(block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    return called(block, hidden, kwargs)


@contextmanager
def noted_hidden(model: Any) -> Iterator[list[Tensor]]:
    """While it lasts, what the last block puts out is noted, on the CPU."""
    family, noted = family_of(model), list[Tensor]()
    last = list(model.get_submodule(family.blocks))[-1]
    handle = last.register_forward_hook(lambda _, __, out: noted.append(hidden_of(out).cpu()))
    try:
        yield noted
    finally:
        handle.remove()


class Tail:
    """What a model does after its last block: the logits of hidden states, whatever norms, scales and caps come there.

    It is the model itself with blocks that do nothing.

    Args:
        share: Use the model's own weights. Otherwise they are copied, so that editing the model leaves them alone.
    """

    def __init__(self, model: Any, *, share: bool) -> None:
        family = family_of(model)
        blocks = model.get_submodule(family.blocks)
        self._as_tuple = family.returns_tuple
        self._blocks = nn.ModuleList(_Nothing(block, self._as_tuple) for block in blocks)
        memo: dict[int, Any] = {id(blocks): self._blocks}
        if share:
            inside = {id(p) for p in blocks.parameters()}
            memo |= {id(t): t for t in [*model.parameters(), *model.buffers()] if id(t) not in inside}
        self.model = copy.deepcopy(model, memo)

    def __call__(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits, `(batch, seq_len, vocab)`, of what the last block put out for these tokens."""
        with ExitStack() as stack:
            made = (hidden,) if self._as_tuple else hidden
            stack.enter_context(swapped(self._blocks[-1], "forward", lambda *_, **__: made))
            return self.model(ids, use_cache=False).logits

    def to(self, device: torch.device) -> "Tail":
        """The same, on `device` from now on."""
        self.model.to(device)
        return self


class _Nothing(nn.Module):
    """In the place of a block, with what models read of their blocks."""

    def __init__(self, block: nn.Module, as_tuple: bool) -> None:
        super().__init__()
        self._as_tuple = as_tuple
        # What accelerate has put into a block is not read of it, and would run it.
        own = {*nn.Module().__dict__, "forward", "_old_forward", "_hf_hook"}
        for name, value in block.__dict__.items():
            if name not in own and not isinstance(value, nn.Module):
                self.__dict__[name] = value

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor]:
        return (hidden,) if self._as_tuple else hidden


@contextmanager
def hopping(model: Any, device: torch.device | str) -> Iterator[None]:
    """While it lasts, a model on the CPU runs on `device`, where each block is only while it works."""
    device = torch.device(device)
    blocks = model.get_submodule(family_of(model).blocks)
    handles, home = [], model.device
    held = ExitStack()

    def bring(index: int, block: nn.Module) -> None:
        held.enter_context(at_hand(model, index))
        block.to(device)

    def put_back(block: nn.Module) -> None:
        block.to(home)
        held.close()

    for index, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(lambda b, *_, i=index: bring(i, b), prepend=True))
        handles.append(block.register_forward_hook(lambda b, *_: put_back(b)))
    _move_rest(model, device)
    try:
        yield
    finally:
        _move_rest(model, home)
        for block in blocks:  # one is left where it worked if it failed
            if not next(block.parameters()).is_meta:
                block.to(home)
        held.close()
        for handle in handles:
            handle.remove()


def _move_rest(model: Any, device: torch.device) -> None:
    """Move all of a model but its blocks."""
    path, _, name = family_of(model).blocks.rpartition(".")
    parent = model.get_submodule(path)
    blocks = getattr(parent, name)
    setattr(parent, name, nn.ModuleList())
    try:
        model.to(device)
    finally:
        setattr(parent, name, blocks)


def _parts(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
