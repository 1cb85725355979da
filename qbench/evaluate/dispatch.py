"""A model that is spread over several accelerators while it is evaluated, by accelerate.

Each block is on one device as a whole; accelerate puts a `forward` into every module that first brings its inputs to
where the module is. Hooks of torch run around that `forward`, so that what quantizes or rotates a layer's input meets
it as it always does, on the device of the block.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from qbench.models.disk import on_disk
from qbench.models.family import family_of

_FULL = 0.8  # of a device's free memory, beyond which weights are not put there: logits need room too


def room_on(device: torch.device | str | int) -> int:
    """Bytes of weights that are put on a CUDA device at most."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
        device
    )  # by torch, for what comes
    return int(_FULL * (torch.cuda.mem_get_info(device)[0] + kept))


@contextmanager
def dispatched(model: Any, max_memory: Mapping[int, int | str] | None = None) -> Iterator[None]:
    """While it lasts, a model that is on the CPU is spread over the CUDA devices, and over nothing else.

    Args:
        max_memory: By CUDA device, bytes, or as in `"10GB"`; `None` for what is free on each.

    Raises:
        ValueError: If there is no such device, or the model is not in memory.
        MemoryError: If the devices do not hold it together.
    """
    if max_memory is None:
        max_memory = {index: room_on(index) for index in range(torch.cuda.device_count())}
    with spread(model, device_map_of(model, max_memory)):
        yield


def device_map_of(model: Any, max_memory: Mapping[int, int | str]) -> dict[str, str]:
    """Which device each part of a model goes to, by path: evenly where that fits, otherwise one device after another.

    Args:
        max_memory: As for `dispatched`.

    Raises:
        ValueError, MemoryError: As `dispatched` does.
    """
    from accelerate import infer_auto_device_map  # type: ignore[import-untyped]
    from accelerate.utils import (  # type: ignore[import-untyped]
        compute_module_sizes,
        get_balanced_memory,
        get_max_memory,
    )

    if not max_memory:
        raise ValueError(
            f"eval.device_map=auto spreads the model over CUDA devices, and torch {torch.__version__} sees none; set "
            "eval.device_map=null, or install a torch with CUDA"
        )
    if on_disk(model):
        raise ValueError(
            "eval.device_map=auto spreads a model that is in memory, and this one's blocks are on disk; set "
            "eval.device_map=null, which evaluates it block by block, or unset model.offload"
        )
    # What accelerate is given is changed in place. Without a CPU in it, what does not fit is said to be for the disk.
    free: dict[int, int] = get_max_memory(dict(max_memory))
    whole = sorted({type(block).__name__ for block in model.get_submodule(family_of(model).blocks)})
    for limits in (get_balanced_memory(model, dict(free), whole), dict(free)):
        found = infer_auto_device_map(model, limits, no_split_module_classes=whole)
        if "disk" not in found.values():
            return {path: f"cuda:{device}" for path, device in found.items()}
    need, room = compute_module_sizes(model)[""], sum(free.values())
    each = ", ".join(f"{size / 1e9:.2f} on cuda:{index}" for index, size in free.items())
    raise MemoryError(
        f"the model takes {need / 1e9:.2f} GB, and there is room for {room / 1e9:.2f} GB ({each}); blocks stay whole, "
        f"and cuda:{next(iter(free))} keeps room for the largest part once more; set eval.streamed=true, which needs one "
        "block at a time on the device, or eval.device_map=null, which does that where the model does not fit"
    )


@contextmanager
def spread(model: Any, device_map: Mapping[str, str]) -> Iterator[None]:
    """While it lasts, the parts of a model are where `device_map` says, and its inputs go to where its first part is.

    Its weights stay on the CPU besides: at the end it has the very parameters and buffers that it had.
    """
    from accelerate import dispatch_model

    kept = [(of, dict(of)) for module in model.modules() for of in (module._parameters, module._buffers)]
    try:
        # Without force_hooks a map of one device would be a mere `to`.
        dispatch_model(
            model, dict(device_map), main_device=next(iter(device_map.values())),
            skip_keys=list(model._skip_keys_device_placement or ()), force_hooks=True,
        )  # fmt: skip
        _own_methods(model)
        yield
    finally:
        undispatch(model)
        for of, tensors in kept:
            _restore(of, tensors)


def undispatch(model: nn.Module) -> None:
    """Take accelerate's hooks off a model, or off a copy of one that has them; its weights stay where they are."""
    from accelerate.hooks import remove_hook_from_submodules  # type: ignore[import-untyped]

    remove_hook_from_submodules(model)
    _own_methods(model)
    model.__dict__.pop("hf_device_map", None)
    for module in model.modules():
        # accelerate leaves the class's own forward in the instance, which hides whatever the class is given later.
        if module.__dict__.get("forward") == MethodType(type(module).forward, module):
            del module.__dict__["forward"]


def _own_methods(model: nn.Module) -> None:
    """Take off accelerate's `to` and `cuda`, which warn, and in a copy of the model would move the original."""
    for name in ("to", "cuda"):
        model.__dict__.pop(name, None)


def _restore(of: dict[str, Tensor | None], tensors: dict[str, Tensor | None]) -> None:
    of.clear()
    of.update(tensors)
