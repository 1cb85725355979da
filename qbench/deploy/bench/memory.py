"""How much a process grows while something runs."""

import contextlib
import gc
from collections.abc import Iterator

import psutil
import torch

from qbench.memory.allocator import freed_memory_returned, return_freed_memory
from qbench.memory.watch import peak_rss

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
        before, peak = psutil.Process().memory_info().rss, [0.0]
        with peak_rss(_EVERY) as held:
            yield peak
        peak[0] = max(0.0, held[0] - before)
