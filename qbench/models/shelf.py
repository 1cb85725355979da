"""Where the blocks of a model on disk are, which of them are at hand, and which one is read ahead."""

import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qbench.models.blockfile import Tensors, dropped, install, read_block_file, tensors_of, write_block_file
from qbench.models.blockreader import BlockReader

PrepareBlock = Callable[[nn.Module], None]


@dataclass
class _Use:
    """A block at hand.

    Attributes:
        tensors: As they were at the beginning.
        versions: torch's count of the changes of each in place.
    """

    depth: int
    tensors: Tensors
    versions: dict[str, int]


class Shelf:
    """Where the blocks of a model are, which of them are at hand, and which one is being read ahead.

    Attributes:
        sources: The files of the blocks that are not read from the checkpoint.
        scratch: The folder of these files.
    """

    def __init__(self, reader: BlockReader, prepare: PrepareBlock, scratch: Path, prefetch: bool) -> None:
        self.sources: dict[int, Path] = {}
        self._reader, self._prepare = reader, prepare
        self.scratch, self._prefetch = scratch, prefetch
        self._uses: dict[int, _Use] = {}
        self._ahead: tuple[int, Future[Tensors]] | None = None
        # All blocks are read by it, one after another: reading uses one shell.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="blocks")

    def file(self, index: int, kind: str) -> Path:
        return self.scratch / f"{kind}_{index:05d}.safetensors"

    def take_from(self, index: int, file: Path) -> None:
        """Read a block from `file` from now on."""
        self.let_go(index)
        self.sources[index] = file

    def let_go(self, index: int) -> None:
        """Of a block whose file is about to change, use nothing that was read, or is being read, ahead."""
        if index in self._uses:
            raise RuntimeError(
                f"block {index} is at hand, so that its file cannot be changed; put it back first"
            )
        if self._ahead and self._ahead[0] == index:
            self._ahead = None

    def take(self, block: nn.Module, index: int) -> None:
        if use := self._uses.get(index):
            use.depth += 1
            return
        ahead, self._ahead = self._ahead, None
        future = ahead[1] if ahead and ahead[0] == index else self._thread.submit(self._read, index)
        if ahead and ahead[0] != index:
            ahead[1].cancel()
        read = future.result()
        if index not in self.sources and (other := sorted(read.keys() ^ tensors_of(block).keys())):
            raise RuntimeError(
                f"block {index} was changed while it was on disk ({other[0]}); change blocks while they are at hand, or "
                "in prepare_block"
            )
        with torch.inference_mode(False):
            install(block, read, self._origin(index))
        tensors = tensors_of(block)
        self._uses[index] = _Use(1, tensors, {name: x._version for name, x in tensors.items()})
        if self._prefetch and len(self._uses) == 1 and index + 1 < self._reader.n_blocks:
            self._ahead = (index + 1, self._thread.submit(self._read, index + 1))

    def put_back(self, block: nn.Module, index: int) -> None:
        use = self._uses[index]
        use.depth -= 1
        if use.depth:
            return
        del self._uses[index]
        try:
            if _edited(use, tensors_of(block)):
                file = self.file(index, "block")
                write_block_file(file, block)
                self.sources[index] = file
        finally:
            install(block, dropped(block), "memory")
            use.tensors.clear()  # held them until here
            _return_memory()

    def _read(self, index: int) -> Tensors:
        if index in self.sources:
            return read_block_file(self.sources[index])
        block = self._reader.read(index)
        _return_memory()
        self._prepare(block)
        _return_memory()
        return tensors_of(block)

    def _origin(self, index: int) -> str:
        return str(self.sources.get(index, self._reader.folder))


def _edited(use: _Use, now: Tensors) -> bool:
    if now.keys() != use.tensors.keys():
        return True
    for name, x in now.items():
        before = use.tensors[name]
        if before._version != use.versions[name]:
            return True
        # A move to a device and back leaves parameters the objects that they were, buffers not.
        if x is not before and (isinstance(x, nn.Parameter) or not _same(x, before)):
            return True
    return False


def _same(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(x.cpu(), y.cpu())


def _return_memory() -> None:
    """Give freed memory back to the system: glibc keeps what was in pieces below 32 MiB, up to two blocks more."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
