"""One decoder block as a file of its own, whatever was done to its parts, and its tensors in and out of memory."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qbench.errors import first_line
from qbench.models.checkpoint import open_shard

Tensors = dict[str, Tensor]  # parameters (`nn.Parameter`) and buffers by their names in the block


def tensors_of(block: nn.Module) -> Tensors:
    """All parameters and buffers, those that are not saved in checkpoints among them."""
    return dict(block.named_parameters(remove_duplicate=False)) | dict(
        block.named_buffers(remove_duplicate=False)
    )


def dropped(block: nn.Module) -> Tensors:
    """The same on the `meta` device."""
    return {name: _like(x, torch.empty_like(x, device="meta")) for name, x in tensors_of(block).items()}


def _like(x: Tensor, values: Tensor) -> Tensor:
    return nn.Parameter(values, x.requires_grad) if isinstance(x, nn.Parameter) else values


def install(block: nn.Module, tensors: Tensors, origin: str) -> None:
    """Make `tensors` all that a block has; one that it has already keeps whether it needs a gradient.

    Raises:
        RuntimeError: If the block has no module for one of them; names it and `origin`, where they come from.
    """
    here = tensors_of(block)
    for name in here.keys() - tensors.keys():
        parent, _, own = name.rpartition(".")
        setattr(block.get_submodule(parent), own, None)
    for name, x in tensors.items():
        parent, _, own = name.rpartition(".")
        try:
            module = block.get_submodule(parent)
        except AttributeError as error:
            raise RuntimeError(
                f"{origin} has {name}, for which the block has no module; blocks on disk are edited while they are at hand"
            ) from error
        if isinstance(x, nn.Parameter):
            needs_grad = here[name].requires_grad if name in here else x.requires_grad
            module.register_parameter(own, x.requires_grad_(needs_grad))
        elif own in module._buffers:
            setattr(module, own, x)
        else:
            module.register_buffer(own, x)


def write_block_file(file: Path, block: nn.Module) -> None:
    """Write a block whole or not at all.

    Raises:
        OSError: If it cannot be written; names the file.
    """
    tensors = {name: _packed(x.detach()) for name, x in tensors_of(block).items()}
    buffers = [name for name, _ in block.named_buffers(remove_duplicate=False)]
    about = {"buffers": json.dumps(buffers), "modules": json.dumps(_modules(block))}
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, about)
        settle(part, file)
    except Exception as error:  # safetensors has its own for a full disk
        part.unlink(missing_ok=True)
        size = sum(x.nbytes for x in tensors.values())
        raise OSError(
            f"{file} cannot be written ({first_line(error)}); it needs {size} bytes, free the disk or choose another "
            "folder for scratch"
        ) from error


def settle(part: Path, file: Path) -> None:
    """Give a file that was written whole its name, once it is on the disk."""
    with part.open("rb") as raw:
        os.fsync(raw.fileno())
    part.replace(file)


def _packed(x: Tensor) -> Tensor:
    """On the CPU, and the only one in its memory, as safetensors wants it."""
    x = x.cpu().contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def read_block_file(file: Path) -> Tensors:
    """What `write_block_file` wrote.

    Raises:
        OSError: If it cannot be read; names the file.
    """
    with open_shard(file) as shard:
        buffers = set(json.loads(shard.metadata()["buffers"]))
        found = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return {name: x if name in buffers else nn.Parameter(x, requires_grad=False) for name, x in found.items()}


def check_block_file(file: Path, block: nn.Module) -> None:
    """Refuse a file that was written of other modules than the block has now.

    Raises:
        OSError: Names the file, and the first module that differs.
    """
    with open_shard(file) as shard:
        there = json.loads(shard.metadata()["modules"])
    here = _modules(block)
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise OSError(
                f"{file} was written of a block whose {name} is {there.get(name, 'nothing')}, here it is "
                f"{here.get(name, 'nothing')}; prepare the block as it was prepared then, or start anew"
            )


def _modules(block: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in block.named_modules()}
