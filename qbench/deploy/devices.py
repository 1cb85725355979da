"""Devices as the roofline sees them: bandwidth, peaks and memory, each with its source (`devices.toml`)."""

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Device:
    """What a device can do at best.

    Attributes:
        title: The product's name.
        bandwidth: Of the memory, bytes/s.
        fp16: Peak of matrix products in 16-bit floating point, operations/s; a multiply-add counts twice.
        int8: The same where both matrices have at most 8 bits.
        on_chip: What fused attention keeps its tiles in, bytes.
        memory: Size, bytes.
        source: Of bandwidth and peaks.
    """

    name: str
    title: str
    bandwidth: float
    fp16: float
    int8: float
    on_chip: float
    memory: float
    source: str


@cache
def devices() -> dict[str, Device]:
    """The known devices by name, in the file's order."""
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    return {
        name: Device(
            name, row["title"], row["bandwidth"] * 1e9, row["fp16"] * 1e12, row["int8"] * 1e12,
            row["on_chip"] * 1e6, row["memory"] * 1e9, row["source"],
        )
        for name, row in table.items()
    }  # fmt: skip


def device(name: str) -> Device:
    """Look up a device; upper and lower case are the same.

    Raises:
        ValueError: If there is none of this name.
    """
    known = devices()
    if name.lower() in known:
        return known[name.lower()]
    near = [n for n in known if n.startswith(name.lower())] or difflib.get_close_matches(name.lower(), known)
    meant = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise ValueError(
        f"hardware {name!r} is not known{meant}; choose one of {', '.join(known)}, "
        "or add it with its source to qbench/deploy/devices.toml"
    )
