"""The most memory that this process holds while something runs."""

import contextlib
import threading
from collections.abc import Iterator

import psutil


@contextlib.contextmanager
def peak_rss(every: float = 0.005) -> Iterator[list[float]]:
    """The largest resident set of this process while the context lasts, in bytes, sampled every so many seconds."""
    process, peak, done = psutil.Process(), [0.0], threading.Event()

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], process.memory_info().rss)
            if done.wait(every):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
