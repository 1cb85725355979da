"""Where hidden states wait between blocks: in memory, or, where they would be too many, in a memory-mapped file.

A mapped file's pages count in a process's RSS while they are resident, so that RSS may show all of it; but they are
shared with the system's cache of the file, which writes them out and drops them whenever memory is wanted for
something else. They need not fit, and a job is not killed for them. It holds only where the folder is on a disk: a
file in a tmpfs, which `/tmp` is on some systems, is memory.
"""

import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Limit:
    n_bytes: int | None
    folder: Path | None


_NEVER = _Limit(None, None)
_limit: ContextVar[_Limit] = ContextVar("spilling", default=_NEVER)


@contextmanager
def spilling(limit_bytes: int | None, folder: Path | None = None) -> Iterator[None]:
    """While it lasts, `empty` makes tensors of more than `limit_bytes` in files; `None`: none of them.

    The limit is for each tensor, of which a job has two or three at a time: what enters a block, what leaves it, and
    the floating-point model's. What was made goes on after the context has ended.

    Args:
        folder: Must exist; `None` for the system's folder of temporary files.
    """
    token = _limit.set(_Limit(limit_bytes, folder))
    try:
        yield
    finally:
        _limit.reset(token)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU without values, in memory or in a file that nobody else sees.

    The file has no name where the system allows it, so that it is gone with the tensor and with the process, however
    that ends; elsewhere it goes when it is closed.

    Raises:
        OSError: If the file does not fit in its folder.
    """
    limit, n_bytes = _limit.get(), prod(shape) * dtype.itemsize
    if limit.n_bytes is None or n_bytes <= limit.n_bytes:
        return torch.empty(tuple(shape), dtype=dtype)
    folder = limit.folder or Path(tempfile.gettempdir())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file.fileno(), n_bytes)
            mapped = mmap.mmap(file.fileno(), n_bytes)
    except OSError as error:
        raise OSError(error.errno, _no_room(n_bytes, folder, error)) from error
    return torch.frombuffer(mapped, dtype=dtype).view(tuple(shape))


def _reserve(file: int, n_bytes: int) -> None:
    # A file with holes would fit any disk, and a full one would kill the process by SIGBUS when a page is written.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, n_bytes)
    else:
        os.truncate(file, n_bytes)


def _no_room(n_bytes: int, folder: Path, error: OSError) -> str:
    try:
        free = f"{shutil.disk_usage(folder).free} are free there"
    except OSError:
        free = "no such folder can be read"
    return (
        f"{n_bytes} bytes of hidden states were to be put in a file in {str(folder)!r}, {free} ({error.strerror}); set "
        "calib.spill_folder to a folder on a disk with room, or lower calib.n_samples or calib.seq_len"
    )
