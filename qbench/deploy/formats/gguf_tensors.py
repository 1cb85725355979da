"""Tensors of a GGUF file, waiting on disk until all are known: their names and types stand before them in the file."""

import shutil
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from qbench.deploy.formats.gguf_metadata import Places
from qbench.deploy.formats.gguf_types import Kind, Packed

_FOLDER = "waiting"


class Tensors:
    """A queue of tensors, by their names in the file."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._waiting: list[tuple[str, Kind]] = []

    def keep(self, folder: Path, name: str, kind: Kind, data: Packed, rows: int) -> None:
        """Let a tensor wait in a folder of a folder, its rows in the order that they have in the file.

        Args:
            name: In the model.
        """
        known = self.places.name(name)
        if (order := self.places.order(known, rows)) is not None:
            data = data.reshape(rows, -1)[order.numpy()].reshape(data.shape)
        (folder / _FOLDER).mkdir(exist_ok=True)
        np.save(folder / _FOLDER / f"{known}.npy", data)
        self._waiting.append((known, kind))

    def write(self, folder: Path, file: GGUFWriter) -> None:
        """Write the file, and remove what waited."""
        for name, kind in self._waiting:
            data = np.load(folder / _FOLDER / f"{name}.npy", mmap_mode="r")
            file.add_tensor(name, data, raw_dtype=kind.type)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()
        shutil.rmtree(folder / _FOLDER)
