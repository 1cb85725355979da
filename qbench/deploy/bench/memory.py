"""How much a process grows while something runs."""

import contextlib
import gc
import threading
from collections.abc import Iterator

import psutil
import torch

from qbench.memory.allocator import freed_memory_returned, return_freed_memory

_EVERY = 0.002  # seconds


@contextlib.contextmanager
def grown() -> Iterator[list[float]]:
    """The most that the process, or the GPU in use, held above what it held at the start, in bytes; known at the end."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        peak = [0.0]
        yield peak
        torch.cuda.synchronize()
        peak[0] = float(torch.cuda.max_memory_allocated() - before)
        return
    # What was freed before must not be taken again unseen.
    with freed_memory_returned():
        return_freed_memory()
        with _watched() as peak:
            yield peak


@contextlib.contextmanager
def _watched() -> Iterator[list[float]]:
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    peak = [0.0]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], float(process.memory_info().rss - before))
            if done.wait(_EVERY):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
