"""How far the quantization of a model has come, on disk, so that a job that was killed goes on in the block it was in.

A folder holds, of each finished block, what is left of it beside its weights (fixed grids, kept channels), the hidden
states that enter the next block, and one small file that says which block that is: it is renamed into place last, so
that a kill at any moment leaves the state before or the state after.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from qbench.models.blockfile import settle

STATE = "state.json"
_LAYOUT = 2  # of what a folder holds; one of another layout is begun anew


@dataclass(frozen=True)
class Progress:
    """A folder where a job notes how far it is.

    Attributes:
        folder: Made when something is noted.
    """

    folder: Path

    def read(self) -> dict[str, Any] | None:
        """What was noted last: `done` is the number of finished blocks; `None` if what belongs to it is not there."""
        path = self.folder / STATE
        if not path.is_file():
            return None
        state = json.loads(path.read_text())
        if state.pop("layout", None) != _LAYOUT:  # an older version wrote it
            return None
        whole = self._entering(state["done"]).is_file() and all(
            self.block_file(index).is_file() for index in range(state["done"])
        )
        return state if whole else None

    def note(self, done: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """From now on `done` blocks are finished; `tensors` are what the next one needs."""
        save_tensors(self._entering(done), tensors)
        write_text(self.folder / STATE, json.dumps(dict(state) | {"done": done, "layout": _LAYOUT}))
        for old in self.folder.glob("entering_*.safetensors"):
            if old != self._entering(done):
                old.unlink()

    def tensors(self, done: int) -> dict[str, Tensor]:
        """What was noted for the block after the first `done`."""
        return load_tensors(self._entering(done))

    def _entering(self, done: int) -> Path:
        return self.folder / f"entering_{done:05d}.safetensors"

    def block_file(self, index: int) -> Path:
        """Where what is left of a finished block is kept."""
        return self.folder / f"block_{index:05d}.safetensors"


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, part)
    settle(part, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(text)
    settle(part, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """What `save_tensors` wrote."""
    return dict(load_file(path))
