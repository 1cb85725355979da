"""Write a checkpoint tensor by tensor: in shards, whole or not at all, with a manifest of checksums.

Everything is written in a folder beside the one that is asked for, which is moved into place at the end; what is there
without a manifest, or does not agree with it, was interrupted or damaged.
"""

import json
import os
import shutil
from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from qbench.models.checkpoint import INDEX, WHOLE
from qbench.models.manifest import write_manifest

_SHARD = 4 << 30  # bytes


class Writer:
    """A checkpoint being written; a context that leaves nothing behind if it ends by an error.

    Attributes:
        folder: Where files are until `publish` moves them to `target`.
    """

    def __init__(self, target: Path, shard_bytes: int = _SHARD) -> None:
        self.target, self.shard_bytes = target, shard_bytes
        self.folder = target.with_name(f".{target.name}.{os.getpid()}.part")
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._bytes = 0
        self._names: set[str] = set()

    def __enter__(self) -> "Writer":
        for left in self.target.parent.glob(f".{escape(self.target.name)}.*.part"):
            if not _is_running(left.suffixes[-2]):  # it was killed
                shutil.rmtree(left, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors by their names in the checkpoint; they are written when a shard is full.

        Raises:
            ValueError: If a name was there before.
        """
        for name, tensor in tensors.items():
            if name in self._names:
                raise ValueError(f"{name} is in the checkpoint already")
            self._names.add(name)
            own = tensor.detach().cpu().contiguous().clone()
            self._waiting[name] = own
            self._waiting_bytes += own.numel() * own.element_size()
            if self._waiting_bytes >= self.shard_bytes:
                self._flush()

    def close_tensors(self) -> int:
        """Write what waits, and the index where there are several shards; returns the bytes of all tensors.

        Of a format that writes files of its own, those are counted.
        """
        self._flush()
        total = len(self._shards)
        if total == 0:
            return sum(path.stat().st_size for path in self.folder.glob("*.gguf"))
        if total == 1:
            self._shards[0][0].rename(self.folder / WHOLE)
            return self._bytes
        places: dict[str, str] = {}
        for number, (file, names) in enumerate(self._shards, 1):
            final = f"model-{number:05d}-of-{total:05d}.safetensors"
            file.rename(self.folder / final)
            places |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(places.items()))}
        self.write_json(INDEX, index)
        return self._bytes

    def write_json(self, name: str, content: Any) -> None:
        (self.folder / name).write_text(json.dumps(content, indent=2) + "\n")

    def publish(self) -> Path:
        """Write the manifest and move the folder into place; returns where it is.

        Raises:
            FileExistsError: If something is there.
        """
        write_manifest(self.folder)
        if self.target.exists():
            raise FileExistsError(f"{self.target} exists; remove it, or choose another folder with out=")
        self.folder.rename(self.target)
        return self.target

    def _flush(self) -> None:
        if not self._waiting:
            return
        file = self.folder / f"shard-{len(self._shards):05d}.safetensors"
        save_file(self._waiting, file, metadata={"format": "pt"})
        file.chmod((self.folder.stat().st_mode & 0o666) | 0o600)  # the library lets nobody else read it
        self._shards.append((file, list(self._waiting)))
        self._bytes += self._waiting_bytes
        self._waiting, self._waiting_bytes = {}, 0


def _is_running(suffix: str) -> bool:
    """Whether the process of a number with a dot before it is there."""
    try:
        os.kill(int(suffix[1:]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):  # another user's, or no number
        return True
    return True
