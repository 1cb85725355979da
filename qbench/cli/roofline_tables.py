"""What `qbench roofline` and `qbench hardware` show."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.markup import escape
from rich.table import Table

from qbench.cli.reports import console
from qbench.deploy.comparison import PAYS, Variant, most_sequences, seconds, stops_paying
from qbench.deploy.devices import Device
from qbench.deploy.hardware import Measured
from qbench.deploy.roofline import Latency, Memory, Operator, Phase, latency, memory

_SUMS = ("count", "GFLOP", "weights MB", "activations MB", "KV MB", "ms", "share")


@dataclass(frozen=True)
class Point:
    """One model, scheme, device, batch and length.

    Attributes:
        times: By phase.
        gains: Speed-up over the floating-point model, by phase.
    """

    floating: Variant
    model: Variant
    device: Device
    batch: int
    length: int
    fused: bool
    times: dict[Phase, Latency]
    gains: dict[Phase, float]
    memory: Memory

    @classmethod
    def of(
        cls, floating: Variant, model: Variant, device: Device, batch: int, length: int, phases: Sequence[str], fused: bool
    ) -> "Point":  # fmt: skip
        times, gains = dict[Phase, Latency](), dict[Phase, float]()
        for phase in cast(Sequence[Phase], phases):
            times[phase] = latency(model.shape, model.bits, device, batch, length, phase, fused)
            base = seconds(floating, device, batch, length, phase, fused)
            gains[phase] = base / times[phase].seconds
        return cls(
            floating,
            model,
            device,
            batch,
            length,
            fused,
            times,
            gains,
            memory(model.shape, model.bits, batch, length),
        )

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.device.memory

    def row(self) -> dict[str, Any]:
        """Plain values, times in milliseconds and memory in gigabytes (10^9)."""
        found: dict[str, Any] = {
            "hardware": self.device.name, "scheme": self.model.label, "batch": self.batch, "seq": self.length,
        }  # fmt: skip
        for phase, time in self.times.items():
            found |= {
                f"{phase} ms": 1e3 * time.seconds, f"{phase} tokens/s": time.tokens_per_second,
                f"{phase} bound": time.bound, f"{phase} speed-up": self.gains[phase],
            }  # fmt: skip
        parts = {
            "weights GB": self.memory.weights,
            "KV GB": self.memory.kv,
            "activations GB": self.memory.activations,
        }
        return found | {name: n / 1e9 for name, n in parts.items()} | {"fits": "yes" if self.fits else "no"}


def show(told: Sequence[str], found: Sequence[Point], path: Path | None) -> None:
    """Print all that was asked, and write it where a path is given."""
    out = console()
    lines = [*told, *dict.fromkeys(_device(point.device) for point in found)]
    _say(out, *lines)
    asked = [point for point in found if point.model is not point.floating]
    if len(asked) == 1:
        for phase in asked[0].times:
            _say(
                out, "", f"{phase}, {asked[0].model.label}, batch {asked[0].batch}, {asked[0].length} tokens"
            )
            out.print(_operators(asked[0], phase))
    _say(out, "", "speed-up: over the floating-point model on the same device")
    out.print(_table([point.row() for point in found]))
    _say(out, *dict.fromkeys(_paying(point) for point in asked))
    _say(out, "By the roofline, a bound: nothing was run on the device.")
    if path is not None:
        _say(out, *(f"written {file}" for file in write(path, found)))


def show_measured(found: Measured) -> None:
    """Print what a machine can do."""
    grid = _grid(("", "median", "spread"))
    for name, rate in found.read.items():
        grid.add_row(f"read, {name}", f"{rate / 1e9:.2f} GB/s", f"{found.spread[name]:.0%}")
    grid.add_row("copy, read and written", f"{found.copy / 1e9:.2f} GB/s", f"{found.spread['copy']:.0%}")
    for unit, rate in found.peaks.items():
        grid.add_row(f"matrices, {unit}", f"{rate / 1e9:.1f} GFLOP/s", f"{found.spread[unit]:.0%}")
    for name, size in (("on chip", found.on_chip), ("last cache", found.cache), ("memory", found.memory)):
        grid.add_row(name, f"{size / 1e6:,.1f} MB", "")
    from qbench.deploy.hardware import BUSY

    out = console()
    _say(out, f"{found.name}: {found.title}, {found.threads} threads, torch {found.torch}")
    out.print(grid)
    if max(found.spread.values()) > BUSY:
        _say(
            out,
            "busy       a figure spreads by more than a tenth: other work ran meanwhile, measure again when it is done",
        )
    _say(out, "measured again with `qbench hardware remeasure=true`")


def write(path: Path, found: Sequence[Point]) -> list[Path]:
    """Write the summary as CSV, and beside it the operators of every point."""
    beside = path.with_name(f"{path.stem}_operators{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = ("hardware", "scheme", "batch", "seq")
    rows = [
        {key: row[key] for key in keys} | {"phase": phase} | _operator(op, point, phase)
        for point, row in ((point, point.row()) for point in found)
        for phase in point.times
        for op in point.times[phase].operators
    ]
    for file, content in ((path, [point.row() for point in found]), (beside, rows)):
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(content[0]))
            writer.writeheader()
            writer.writerows(content)
    return [path, beside]


def _operator(op: Operator, point: Point, phase: Phase) -> dict[str, Any]:
    """All occurrences of an operator together."""
    spent = op.count * op.seconds(point.device)
    return {
        "operator": op.name, "count": op.count, "GFLOP": op.count * op.operations / 1e9,
        "weights MB": op.count * op.weight_bytes / 1e6,
        "activations MB": op.count * (op.read_bytes + op.written_bytes) / 1e6,
        "KV MB": op.count * (op.kv_read_bytes + op.kv_written_bytes) / 1e6,
        "FLOP/byte": op.intensity, "unit": op.unit, "bound": op.bound(point.device), "ms": 1e3 * spent,
        "share": spent / point.times[phase].seconds,
    }  # fmt: skip


def _operators(point: Point, phase: Phase) -> Table:
    """Operators of one name and bound, of all kinds of blocks together."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for op in point.times[phase].operators:
        row = _operator(op, point, phase)
        known = found.setdefault((row["operator"], row["unit"], row["bound"]), row)
        if known is not row:
            for key in _SUMS:
                known[key] += row[key]
    for row in found.values():
        moved = sum(row[key] for key in ("weights MB", "activations MB", "KV MB"))
        row |= {"FLOP/byte": 1e3 * row["GFLOP"] / moved, "share": f"{row['share']:.1%}"}
    return _table(list(found.values()))


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    grid = _grid(rows[0])
    for row in rows:
        grid.add_row(*(_written(x) if isinstance(x, float) else escape(str(x)) for x in row.values()))
    return grid


def _written(number: float) -> str:
    return f"{number:,.0f}" if number >= 1e3 else f"{number:.3g}"


def _grid(columns: Any) -> Table:
    grid = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        grid.add_column(column, overflow="fold", no_wrap=column in ("scheme", "operator"))
    return grid


def _device(device: Device) -> str:
    units = {"fp32": device.fp32, "fp16": device.fp16, "int8": device.int8, "fp8": device.fp8}
    peaks = ", ".join(f"{unit} {peak / 1e12:.4g}" for unit, peak in units.items() if peak is not None)
    return (
        f"{device.name}: {device.title}, {device.bandwidth / 1e9:.4g} GB/s, {device.memory / 1e9:.4g} GB, "
        f"{peaks} TFLOP/s ({device.source})"
    )


def _paying(point: Point) -> str:
    """Up to which batch a scheme pays, beside how many sequences fit."""
    most = most_sequences(point.model, point.device, point.length)
    batch = stops_paying(point.model, point.floating, point.device, point.length, point.fused)
    room = f"; memory holds {most:,} sequences" if most else "; the model does not fit into memory"
    what = f"{point.model.label} on {point.device.name}, decoding after {point.length} tokens"
    if batch is None:
        return f"{what}: faster than {point.floating.label} by {PAYS - 1:.0%} or more at any batch{room}"
    if batch == 1:
        return f"{what}: never faster than {point.floating.label} by {PAYS - 1:.0%}{room}"
    return f"{what}: gains less than {PAYS - 1:.0%} over {point.floating.label} from batch {batch:,} on{room}"


def _say(out: Any, *lines: str) -> None:
    out.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
