"""Devices as the roofline sees them: bandwidth, peaks and memory, each with its source (`devices.toml`).

`this` and `this-cuda` are the processor and the first GPU of this machine, measured (`qbench/deploy/hardware.py`).
"""

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

Unit = Literal["fp32", "fp16", "int8", "fp8"]
Here = Literal["this", "this-cuda"]
HERE: tuple[Here, ...] = get_args(Here)


@dataclass(frozen=True)
class Device:
    """What a device can do at best.

    Attributes:
        title: The product's name.
        bandwidth: Of the memory, bytes/s.
        fp32: Peak of matrix products in 32-bit floating point, operations/s; a multiply-add counts twice.
        fp16: The same in 16 bits, be it float16 or bfloat16.
        int8: The same where both matrices are integers of at most 8 bits; `None`: there are no units for it.
        fp8: The same where both are floating-point numbers of at most 8 bits.
        on_chip: What fused attention keeps its tiles in, bytes.
        memory: Size, bytes.
        source: Of bandwidth and peaks.
    """

    name: str
    title: str
    bandwidth: float
    fp32: float
    fp16: float
    int8: float | None
    fp8: float | None
    on_chip: float
    memory: float
    source: str

    def peak(self, unit: Unit) -> float:
        """Operations/s of the units that are fastest for such operands, which any wider unit takes as well.

        So FP8 runs at the peak of 16 bits on a device without units for it, and bfloat16 at that of float32 on a
        processor that only emulates it.
        """
        wide = max(self.fp32, self.fp16)
        return {
            "fp32": self.fp32,
            "fp16": wide,
            "int8": max(wide, self.int8 or 0.0),
            "fp8": max(wide, self.fp8 or 0.0),
        }[unit]


@cache
def devices() -> dict[str, Device]:
    """The known devices by name, in the file's order."""
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    return {name: _device(name, row) for name, row in table.items()}


def _device(name: str, row: dict[str, float | str]) -> Device:
    tera = {key: float(row[key]) * 1e12 for key in ("fp32", "fp16", "int8", "fp8") if key in row}
    return Device(
        name, str(row["title"]), float(row["bandwidth"]) * 1e9, tera["fp32"], tera["fp16"], tera.get("int8"),
        tera.get("fp8"), float(row["on_chip"]) * 1e6, float(row["memory"]) * 1e9, str(row["source"]),
    )  # fmt: skip


def device(name: str) -> Device:
    """Look up a device, or measure this machine (once); upper and lower case are the same.

    Raises:
        ValueError: If there is none of this name, or it cannot be measured.
    """
    known = devices()
    if name.lower() in known:
        return known[name.lower()]
    for here in HERE:
        if name.lower() == here:
            # Measuring takes torch, which looking a name up must not wait for.
            from qbench.deploy.hardware import measured

            return measured(here).device
    names = [*known, *HERE]
    near = [n for n in names if name and n.startswith(name.lower())]
    near = near or difflib.get_close_matches(name.lower(), names)
    meant = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise ValueError(
        f"hardware {name!r} is not known{meant}; choose one of {', '.join(names)}, "
        "or add it with its source to qbench/deploy/devices.toml"
    )
