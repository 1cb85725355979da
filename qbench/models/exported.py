"""Checkpoints that others wrote or will load: a folder in transformers' layout, compressed or not, unpacked in memory."""

from pathlib import Path
from typing import Any

import torch

from qbench.models.layout import load_checkpoint


def exported_config(folder: Path) -> Any:
    """The config of a checkpoint's model.

    Raises:
        ValueError: If the folder holds no checkpoint.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"{str(folder)!r} needs config.json and *.safetensors to be a checkpoint; name the folder that "
            "`qbench export` wrote"
        )
    return AutoConfig.from_pretrained(folder, local_files_only=True)


def load_unpacked(folder: Path, dtype: torch.dtype) -> Any:
    """The model on the CPU, in evaluation mode; packed weights are unpacked at once, and inputs not rounded.

    Raises:
        ValueError: If the folder holds no checkpoint.
        OSError: If a weight is missing, or of another shape.
    """
    packed = getattr(exported_config(folder), "quantization_config", None) or {}
    return load_checkpoint(folder, dtype, None, dense=packed.get("quant_method") == "compressed-tensors")
