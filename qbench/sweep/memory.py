"""How a process that runs many jobs holds its memory."""

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Ask the C library to keep what is freed: large tensors would otherwise be mapped and zeroed anew each time.

    It is worth a quarter of an evaluation's time on a CPU (`benchmarks/README.md`). Only glibc has the call.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(m_mmap_threshold, 32 << 20)  # the most it takes
        mallopt(m_trim_threshold, 256 << 20)
