"""How a process that runs many jobs holds its memory. Only glibc has these calls; elsewhere nothing happens."""

import contextlib
import ctypes
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_KEEP = (256 << 20, 32 << 20)  # the most that the second takes
_RETURN = (128 << 10, 128 << 10)  # what glibc begins with, before it moves them with what it meets
_now = [_RETURN]


def keep_freed_memory() -> None:
    """Ask the C library to keep what is freed: large tensors would otherwise be mapped and zeroed anew each time.

    It is worth a quarter of an evaluation's time on a CPU (`benchmarks/README.md`).
    """
    _set(_KEEP)


@contextlib.contextmanager
def freed_memory_returned() -> Iterator[None]:
    """While it lasts, large tensors that are freed go back to the system, where memory is what a job is short of."""
    before = _now[0]
    _set(_RETURN)
    try:
        yield
    finally:
        if before != _RETURN:
            _set(before)


def _set(thresholds: tuple[int, int]) -> None:
    _now[0] = thresholds
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for name, value in zip((_TRIM_THRESHOLD, _MMAP_THRESHOLD), thresholds, strict=True):
            mallopt(name, value)


def return_freed_memory() -> None:
    """Give freed memory back to the system now: glibc keeps what was in small pieces."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
