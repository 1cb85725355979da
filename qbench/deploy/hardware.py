"""This machine as a device of the roofline: bandwidth and peaks, measured once and kept in the user's cache folder.

Every figure is the median of several repeats of one thing, and the best of the ways to do it that were tried: a roofline
says what the machine can do. Memory is read as decoding reads it: sums, dot products and products of a matrix with a
vector, of arrays far larger than the last cache. Peaks are those of square matrix products as torch does them; a format
that torch cannot multiply here has none, and its products run at the peak of a wider one (`Device.peak`).

McCalpin, "Memory Bandwidth and Machine Balance in Current High Performance Computers", 1995 (STREAM).
"""

import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import psutil
import torch

from qbench.deploy.devices import Device, Here
from qbench.zoo import cache

_REVISION = 1  # of how it is measured; part of the key
_REPEATS = 7
BUSY = 0.1  # a spread beyond which the machine did other work
_ARRAY = 4  # times the last cache, at least
_SMALLEST = 1 << 28  # bytes of an array
_WIDTH = 4096  # columns of the matrix that is multiplied with a vector
_SQUARE = {"cpu": 1536, "cuda": 8192}  # rows and columns of the matrices of a peak
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_FLOATS = {"fp32": torch.float32, "fp16": torch.bfloat16}

Run = Callable[[], object]


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        read: Bandwidth of each way of reading, bytes/s.
        copy: Bandwidth of a copy, bytes read and bytes written, bytes/s.
        peaks: Of matrix products, operations/s, by unit; what torch cannot multiply here is missing.
        cache: The last cache, bytes.
        spread: Of each figure, by its name, the distance between quartiles as a share of the median.
    """

    name: str
    title: str
    threads: int
    torch: str
    read: dict[str, float]
    copy: float
    peaks: dict[str, float]
    on_chip: float
    cache: float
    memory: float
    spread: dict[str, float]

    @property
    def device(self) -> Device:
        """As the roofline takes it."""
        p = self.peaks
        said = f"measured, {self.threads} threads, torch {self.torch}"
        return Device(
            self.name, self.title, max(self.read.values()), p["fp32"], p["fp16"], p.get("int8"), p.get("fp8"),
            self.on_chip, self.memory, said,
        )  # fmt: skip


def measured(here: Here, again: bool = False) -> Measured:
    """This machine, from the cache where it was measured before with as many threads and the same torch.

    Args:
        again: Measure even so.

    Raises:
        ValueError: If there is no such device here, or its caches cannot be read.
    """
    title, threads = _title(here), torch.get_num_threads()
    told = f"{here} {title} {threads} {torch.__version__} {_REVISION}"
    key = hashlib.sha256(told.encode()).hexdigest()[:16]
    if not again and (kept := cache.read("hardware", key)) is not None:
        return Measured(**json.loads(kept))
    found = measure_machine(here)
    cache.write("hardware", key, json.dumps(asdict(found)))
    return found


def measure_machine(here: Here) -> Measured:
    """Measure; takes seconds, and as much memory as two arrays of the larger of 256 MiB and four last caches.

    Raises:
        ValueError: If there is no such device here, or its caches cannot be read.
    """
    kind = "cuda" if here == "this-cuda" else "cpu"
    title = _title(here)
    on_chip, last, memory = _sizes_of_gpu() if kind == "cuda" else _sizes_of_cpu()
    size = max(_SMALLEST, _ARRAY * int(last))
    read, copy, peaks, spread = {}, 0.0, {}, {}
    for name, (run, amount) in _streams(kind, size).items():
        rate, spread[name] = timed(run, amount, kind)
        if name == "copy":
            copy = rate
        else:
            read[name] = rate
    n = _SQUARE[kind]
    for unit, run in _products(kind, n).items():
        peaks[unit], spread[unit] = timed(run, 2.0 * n**3, kind)
    return Measured(
        here,
        title,
        torch.get_num_threads(),
        torch.__version__,
        read,
        copy,
        peaks,
        on_chip,
        last,
        memory,
        spread,
    )


def timed(
    run: Run,
    amount: float,
    kind: str = "cpu",
    repeats: int = _REPEATS,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """The median rate of doing `amount` of something by one call, and the relative distance between its quartiles."""
    wait = torch.cuda.synchronize if kind == "cuda" else _nothing
    run()  # once before: pages are made, kernels chosen
    wait()
    rates = []
    for _ in range(repeats):
        begun = clock()
        run()
        wait()
        rates.append(amount / (clock() - begun))
    low, middle, high = statistics.quantiles(rates, n=4)
    return middle, (high - low) / middle


def _nothing() -> None:
    return None


def _streams(kind: str, size: int) -> dict[str, tuple[Run, float]]:
    """Ways to go through memory, and the bytes that each moves."""
    a = torch.ones(size // (4 * _WIDTH), _WIDTH, device=kind)
    b = torch.empty_like(a)
    x, flat, moved = torch.ones(_WIDTH, device=kind), a.view(-1), float(a.nbytes)
    return {
        "sum": (flat.sum, moved),
        "dot": (partial(torch.dot, flat, flat), moved),  # with itself: it is read once
        "matrix x vector": (partial(torch.mv, a, x), moved),
        "copy": (partial(b.copy_, a), 2 * moved),
    }


def _products(kind: str, n: int) -> dict[str, Run]:
    """Square matrix products of each format that torch multiplies here."""
    ones = torch.ones(n, n, device=kind)
    found: dict[str, Run] = {}
    for unit, dtype in _FLOATS.items():
        a = ones.to(dtype)
        found[unit] = partial(torch.mm, a, a)
    whole = ones.to(torch.int8)
    found["int8"] = partial(torch._int_mm, whole, whole.t())
    if kind == "cuda":
        small, scale = ones.to(torch.float8_e4m3fn), torch.ones((), device=kind)
        found["fp8"] = partial(torch._scaled_mm, small, small.t(), scale, scale, out_dtype=torch.bfloat16)
    return {unit: run for unit, run in found.items() if unit in _FLOATS or _runs(run)}


def _runs(run: Run) -> bool:
    try:
        run()
    except (RuntimeError, NotImplementedError, ValueError):  # no kernel for this format on this device
        return False
    return True


def _title(here: Here) -> str:
    """The product's name, as the driver or the operating system says it.

    Raises:
        ValueError: If there is no GPU.
    """
    if here == "this-cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "hardware=this-cuda needs a GPU, and this torch sees none; hardware=this is the processor"
            )
        return torch.cuda.get_device_name(0)
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _sizes_of_gpu() -> tuple[float, float, float]:
    """Register files of all multiprocessors, the last cache, and memory, bytes."""
    found = torch.cuda.get_device_properties(0)
    registers = 4.0 * found.regs_per_multiprocessor * found.multi_processor_count
    return registers, float(found.L2_cache_size), float(found.total_memory)


def _sizes_of_cpu() -> tuple[float, float, float]:
    """The caches of the threads' cores but the last, the last, and memory, bytes.

    Raises:
        ValueError: If the operating system does not say.
    """
    levels = caches_of_cpu()
    if len(levels) < 2:
        raise ValueError(
            f"the sizes of this processor's caches are not in {_CACHES}, so there is no telling which array is larger; "
            "name a device of qbench/deploy/devices.toml instead"
        )
    *_, own, last = levels
    return own * torch.get_num_threads(), last, float(psutil.virtual_memory().total)


def caches_of_cpu(folder: Path = _CACHES) -> list[float]:
    """Bytes of the caches that hold data, from the first level up."""
    found: dict[int, float] = {}
    for index in folder.glob("index*"):
        if (index / "type").read_text().strip() != "Instruction":
            text = (index / "size").read_text().strip()
            found[int((index / "level").read_text())] = float(text.removesuffix("K")) * 1024
    return [found[level] for level in sorted(found)]
