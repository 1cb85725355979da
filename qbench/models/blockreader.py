"""Decoder blocks made of a checkpoint's tensors by transformers' own conversion, one at a time."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qbench.errors import first_line
from qbench.models.checkpoint import Checkpoint, lacking

ON_META = {"": "meta"}
# A tensor on disk, be there one or not, makes transformers read one parameter after another instead of all at once in
# several threads, which would hold a block's experts twice, and leave memory behind in each thread's heap.
ON_CPU = {"": "cpu", "nothing": "disk"}


@dataclass(frozen=True)
class BlockReader:
    """What makes decoder blocks of a checkpoint's tensors.

    Attributes:
        shell: The model on the `meta` device, with no blocks but the one being read.
        blocks: Dotted path of the blocks in it.
        bare: Every block on the `meta` device, as transformers builds it.
        names: Of the tensors in the checkpoint that each block is made of.
        load_config: transformers' `LoadStateDictConfig`.
    """

    checkpoint: Checkpoint
    shell: Any
    blocks: str
    bare: Sequence[nn.Module]
    names: Sequence[Sequence[str]]
    load_config: Any

    @property
    def n_blocks(self) -> int:
        return len(self.bare)

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    def read(self, index: int) -> nn.Module:
        """A new block on the CPU, all of whose parameters and buffers have their values.

        Raises:
            OSError: If a file cannot be read; names it.
        """
        names = self.names[index]
        try:
            with self.checkpoint.slices(names) as slices:
                block, _ = self._converted(index, slices, ON_CPU)
        except Exception as error:  # of the libraries that read and convert
            raise OSError(
                f"block {index} cannot be read from {self.checkpoint.files(names)} ({first_line(error)}); the files "
                "were whole when they were opened, look whether they were changed or the disk fails"
            ) from error
        self._fill_unstored(block)
        self.shell.set_submodule(self.blocks, nn.Module())
        return block

    def _fill_unstored(self, block: nn.Module) -> None:
        """Compute the buffers that are not in checkpoints, from the config."""
        for module in block.modules():
            unstored = [name for name, x in module.named_buffers(recurse=False) if x.is_meta]
            for name in unstored:
                setattr(module, name, torch.empty_like(module.get_buffer(name), device="cpu"))
            # Some architectures draw random numbers even for what was loaded, here in a thread: Mamba.
            module._is_hf_initialized = not unstored
        self.shell.initialize_weights()

    def rehearse(self, index: int) -> None:
        """Go through the conversion of a block without reading.

        Raises:
            OSError: As `open_assembled`.
        """
        _, info = self._converted(index, self.checkpoint.outlines(self.names[index]), ON_META)
        check(self.shell, info, self.checkpoint, self.names[index], f"{self.blocks}.{index}.")
        self.shell.set_submodule(self.blocks, nn.Module())

    def _converted(
        self, index: int, tensors: Mapping[str, Any], device_map: dict[str, str]
    ) -> tuple[nn.Module, Any]:
        block = copy.deepcopy(self.bare[index], {id(self.shell.config): self.shell.config})
        place = nn.Module()
        place.add_module(str(index), block)
        self.shell.set_submodule(self.blocks, place)
        return block, convert(self.shell, tensors, self.load_config, device_map)


def convert(model: Any, tensors: Mapping[str, Any], load_config: Any, device_map: dict[str, str]) -> Any:
    """Bring tensors into a model; returns transformers' report."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        there = replace(load_config, device_map=device_map)
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), there)
    finally:
        if shown:
            logging.enable_progress_bar()
    return info


def check(model: Any, info: Any, checkpoint: Checkpoint, names: Sequence[str], prefix: str) -> None:
    """Refuse what `from_pretrained` would fill with random numbers; `names` of the checkpoint were converted."""
    for name, found, needed in sorted(info.mismatched_keys):
        files = checkpoint.files([name] if name in checkpoint.tensors else names)
        raise OSError(
            f"{files}: {name} is of shape {tuple(found)}, the model of config.json needs {tuple(needed)}; config and "
            "weights are not of the same checkpoint"
        )
    for name, problem in info.conversion_errors.items():
        last = problem.strip().splitlines()[-1]
        raise OSError(f"{checkpoint.folder}: {name} cannot be made of what the checkpoint holds: {last}")
    parameters = {
        name for name, _ in model.named_parameters(remove_duplicate=False) if name.startswith(prefix)
    }
    if missing := sorted(parameters & info.missing_keys):
        raise lacking(checkpoint.folder, missing)
