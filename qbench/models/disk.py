"""A model whose decoder blocks stay on disk and come into memory one at a time.

`at_hand` reads a block, from the checkpoint or from where it was written back to, and drops it at the end; what was
edited is written to a scratch folder first. The next block is read by a thread meanwhile, so that memory holds what is
outside of the blocks, the block at work and the next one.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from qbench.models.assemble import open_assembled
from qbench.models.blockfile import check_block_file, write_block_file
from qbench.models.checkpoint import open_checkpoint
from qbench.models.shelf import PrepareBlock, Shelf


def open_model(
    config: Any,
    model_class: Any,
    folder: Path,
    blocks: str,
    dtype: torch.dtype,
    scratch: Path,
    prepare_block: PrepareBlock = lambda block: None,
    *,
    prefetch: bool = True,
    keep_scratch: bool = False,
) -> Any:
    """A model in evaluation mode whose blocks are on the `meta` device, all else on the CPU.

    Args:
        config: The model's; its `_attn_implementation` is respected.
        model_class: As `transformers.LlamaForCausalLM`.
        folder: In the hub's layout, with safetensors; all its files are checked.
        blocks: Dotted path of the blocks.
        scratch: Where edited blocks are written; made when one is.
        prepare_block: Replaces parts of a block after it was read as transformers builds it, in place. It is called
            with blocks on the `meta` device too, and for a block that is read ahead, in a thread.
        prefetch: Read the next block while one is at hand.
        keep_scratch: Take the blocks that an earlier run left in `scratch` in place of the checkpoint's.

    Raises:
        OSError: If a file is missing, damaged or cut off, or lacks a parameter, or has one of a wrong shape; names
            the file.
        NotImplementedError: If the checkpoint is quantized, or blocks share parameters.
    """
    model, reader = open_assembled(config, model_class, open_checkpoint(folder), blocks, dtype)
    for block in model.get_submodule(blocks):
        prepare_block(block)
    shelf = Shelf(reader, prepare_block, scratch, prefetch)
    _shelves[model] = shelf
    for index in sorted(_left(scratch, "block") | _left(scratch, "finished")) if keep_scratch else ():
        if index < reader.n_blocks:
            finished = shelf.file(index, "finished")
            file = finished if finished.is_file() else shelf.file(index, "block")
            check_block_file(file, model.get_submodule(blocks)[index])
            shelf.take_from(index, file)
    return model


@contextmanager
def at_hand(model: nn.Module, blocks: str, index: int) -> Iterator[nn.Module]:
    """A block with its weights in memory; of a model that is in memory wholly, the block.

    At the end a block from disk is written to the scratch folder, if it was edited, and goes back to the `meta`
    device. Edits are seen where a parameter or module was replaced, added or removed, or changed in place; not where
    they were made through a parameter's `.data`. The use of a block inside of another use of it costs nothing.
    Not for several threads.

    Raises:
        OSError: If a file cannot be read or written; names it.
    """
    block = model.get_submodule(blocks)[index]  # type: ignore[index]
    shelf = _shelves.get(model)
    if shelf is None:
        yield block
        return
    shelf.take(block, index)
    try:
        yield block
    finally:
        shelf.put_back(block, index)


def on_disk(model: nn.Module) -> bool:
    """Whether a model's blocks are on disk."""
    return model in _shelves


def scratch_of(model: nn.Module) -> Path:
    """Where edited blocks of a model on disk are kept."""
    return _shelf(model).scratch


def written(model: nn.Module) -> set[int]:
    """The blocks that are read from the scratch folder; none of a model that is in memory."""
    shelf = _shelves.get(model)
    return set(shelf.sources) if shelf else set()


def finish(model: nn.Module, blocks: str, index: int) -> Path:
    """Put a block, edited or not, into a file that later edits leave alone, and read it from there; returns it.

    A run that goes on after a kill edits all blocks anew before it is where it was (a rotation of the whole model),
    which must not touch what was finished.
    """
    shelf = _shelf(model)
    shelf.let_go(index)
    working, file = shelf.file(index, "block"), shelf.file(index, "finished")
    if shelf.sources.get(index) != working:
        with at_hand(model, blocks, index) as block:
            write_block_file(working, block)
    working.replace(file)
    shelf.take_from(index, file)
    return file


def use_finished(model: nn.Module, blocks: str, index: int) -> None:
    """Read a block from the file that `finish` left, in this run or an earlier one, from now on.

    Raises:
        OSError: If there is none, or it was written of other modules than the block now has; names it.
    """
    shelf = _shelf(model)
    file = shelf.file(index, "finished")
    check_block_file(file, model.get_submodule(blocks)[index])  # type: ignore[index]
    shelf.take_from(index, file)


_shelves: WeakKeyDictionary[nn.Module, Shelf] = WeakKeyDictionary()


def _shelf(model: nn.Module) -> Shelf:
    if model not in _shelves:
        raise ValueError("the model is in memory wholly; only blocks on disk are finished one by one")
    return _shelves[model]


def _left(scratch: Path, kind: str) -> set[int]:
    names = [path.stem for path in scratch.glob(f"{kind}_*.safetensors")]
    return {int(found[1]) for name in names if (found := re.fullmatch(kind + r"_(\d+)", name))}
