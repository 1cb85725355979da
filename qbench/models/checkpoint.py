"""The files of a checkpoint in the hub's layout: safetensors, whole or in shards, looked at before any weight is read.

All headers and sizes are checked when a checkpoint is opened, so that a job does not fail after hours on a file that
was cut off. Weights are then read tensor by tensor, into memory of their own and not mapped: a mapped tensor keeps
its pages for as long as anything of its file is in use.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qbench.errors import first_line

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LENGTH = 8  # bytes at the beginning of a safetensors file that tell how long its header is
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Where a tensor is, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class CheckpointInfo:
    """What is in a checkpoint, from its headers.

    Attributes:
        bytes: Of all tensors.
        parameters: Numbers in all tensors.
        dtypes: Share of the numbers that each dtype has, the largest first, by torch's names.
    """

    bytes: int
    parameters: int
    dtypes: dict[str, float]

    @property
    def dtype(self) -> str:
        """That of most numbers."""
        return next(iter(self.dtypes), "float32")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are whole.

    Attributes:
        tensors: By their names in the checkpoint.
    """

    folder: Path
    tensors: dict[str, Stored]

    @property
    def info(self) -> CheckpointInfo:
        sizes = Counter[torch.dtype]()
        for stored in self.tensors.values():
            sizes[stored.dtype] += math.prod(stored.shape)
        total = sum(sizes.values())
        shares = {str(dtype).removeprefix("torch."): n / max(total, 1) for dtype, n in sizes.most_common()}
        return CheckpointInfo(sum(n * dtype.itemsize for dtype, n in sizes.items()), total, shares)

    @contextmanager
    def slices(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Tensors that are read when they are indexed, while the context lasts.

        Raises:
            OSError: If a file cannot be read any more; names it.
        """
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for file in sorted({self.tensors[name].file for name in names}):
                opened[file] = stack.enter_context(open_shard(file))
            yield {name: opened[self.tensors[name].file].get_slice(name) for name in names}

    def outlines(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The same tensors on the `meta` device."""
        found = {name: self.tensors[name] for name in names}
        return {name: torch.empty(x.shape, dtype=x.dtype, device="meta") for name, x in found.items()}

    def files(self, names: Iterable[str]) -> str:
        """The files that hold tensors, for a message."""
        return ", ".join(sorted({str(self.tensors[name].file) for name in names})) or str(self.folder)


def checkpoint_info(folder: Path) -> CheckpointInfo:
    """What a folder's checkpoint holds; only headers are read.

    Raises:
        OSError: As `open_checkpoint`.
    """
    return open_checkpoint(folder).info


def open_checkpoint(folder: Path) -> Checkpoint:
    """Check the files of a checkpoint and list its tensors.

    Raises:
        OSError: If there are no safetensors, or a file is missing, cut off or damaged, or lacks a tensor that the index
            says it holds; names the file.
        NotImplementedError: If a tensor's dtype is not known.
    """
    tensors: dict[str, Stored] = {}
    for file, expected in _shards(folder).items():
        found = _header(file)
        if lacking := sorted(expected - found.keys()):
            raise OSError(
                f"{file} lacks {_some(lacking)}, which {INDEX} says it holds; index and shards are not of the same "
                "checkpoint, fetch both again"
            )
        tensors |= found
    return Checkpoint(folder, tensors)


def _shards(folder: Path) -> dict[Path, set[str]]:
    """The files of a checkpoint, in the order of their names, and what the index says is in each."""
    if (folder / WHOLE).is_file():
        return {folder / WHOLE: set()}
    index = folder / INDEX
    if not index.is_file():
        raise OSError(_no_weights(folder))
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{index} is not an index of shards ({first_line(error)}); fetch it again") from error
    shards: dict[Path, set[str]] = {folder / name: set() for name in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        shards[folder / file].add(name)
    if missing := [path.name for path in shards if not path.is_file()]:
        raise OSError(
            f"{folder / missing[0]} is missing: {INDEX} lists {len(shards)} files, of which {_some(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not there; fetch the checkpoint again"
        )
    return shards


def _no_weights(folder: Path) -> str:
    if found := sorted(p.name for p in folder.glob("pytorch_model*.bin")):
        return (
            f"{folder} holds {_some(found)}, and only safetensors are read, since a pickle can run code when it is "
            "loaded; convert it once with transformers: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(another folder), or use a revision of the model that has safetensors"
        )
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    return f"{folder} has neither {WHOLE} nor {INDEX}; it holds {_some(found) or 'nothing'}"


def _header(file: Path) -> dict[str, Stored]:
    from huggingface_hub import parse_local_safetensors_file_metadata
    from huggingface_hub.errors import SafetensorsParsingError

    size = file.stat().st_size
    try:
        header = parse_local_safetensors_file_metadata(file)
    except (SafetensorsParsingError, ValueError, KeyError, TypeError) as error:
        raise OSError(
            f"{file} ({size} bytes) has no header of a safetensors file ({type(error).__name__}); it is damaged or cut "
            "off, fetch it again"
        ) from error
    with file.open("rb") as raw:
        begin = _LENGTH + int.from_bytes(raw.read(_LENGTH), "little")
    end = begin + max((x.data_offsets[1] for x in header.tensors.values()), default=0)
    if size != end:
        raise OSError(
            f"{file} holds {size} bytes where its header speaks of {end}; it was "
            f"{'cut off' if size < end else 'written over'}, fetch it again"
        )
    for name, x in header.tensors.items():
        if x.dtype not in _DTYPES:
            raise NotImplementedError(f"{file}: {name} is of dtype {x.dtype}; known are {', '.join(_DTYPES)}")
    with open_shard(file):  # checks what is left: that the tensors fill the file, each once
        return {name: Stored(file, tuple(x.shape), _DTYPES[x.dtype]) for name, x in header.tensors.items()}


@contextmanager
def open_shard(file: Path) -> Iterator[Any]:
    """A safetensors file from which single tensors can be read.

    Raises:
        OSError: If it is not one; names it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # A mapped file's pages count as the process's memory for as long as a tensor of it lives.
        opened = safe_open(file, framework="pt", backend="pread")
    except (SafetensorError, OSError) as error:
        raise OSError(f"{file} cannot be read ({first_line(error)}); fetch it again") from error
    with opened as shard:
        yield shard


def refuse_quantized(config: Any, name: object) -> None:
    """Raises NotImplementedError if a model's config says that its checkpoint is quantized."""
    if getattr(config, "quantization_config", None) is not None:
        raise NotImplementedError(
            f"{name} is a quantized checkpoint (quantization_config in config.json); give the floating-point one"
        )


def lacking(name: object, missing: Sequence[str]) -> OSError:
    """That a checkpoint has no tensors for these parameters of the model, at least one."""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return OSError(
        f"{name}: no file holds {missing[0]}{more}, which the model of config.json has; config and weights are not of "
        "the same checkpoint"
    )


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
