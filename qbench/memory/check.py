"""A job's estimated memory against what is free: refused, or described in a line."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from qbench.memory.estimate import Estimate, estimated


def check(found: Estimate, free_host: int, free_device: int | None = None) -> None:
    """Refuse a job that does not fit.

    Args:
        free_host, free_device: As `free_memory` says.

    Raises:
        MemoryError: Saying what is needed, what is free, and which settings would make it fit.
    """
    on_device = found.device is not None and free_device is not None
    for place, free in (("host", free_host), *([("device", free_device)] if on_device else [])):
        need = _need(found, place)
        assert free is not None
        if need > free:
            raise MemoryError(
                f"the job needs about {_gb(need)} GB of memory on the {_name(found, place)} ({_parts(found, place)}), "
                f"{_gb(free)} GB are free; {_advice(found, place, free, free_host)}"
            )


def _need(found: Estimate, place: str) -> int:
    if place == "host":
        return found.host.total
    return found.device.total if found.device is not None else 0


def _name(found: Estimate, place: str) -> str:
    return "host" if place == "host" else f"device {found.work.device}"


def _advice(found: Estimate, place: str, free: int, free_host: int) -> str:
    """The settings that help, the most effective first, until it fits."""
    chosen, now = list[str](), found
    while _need(now, place) > free:
        options = [
            (_need(now, place) - _need(other, place), text, other) for text, other in _options(now, free_host)
        ]
        saved, text, other = max(options, key=lambda option: option[0], default=(0, "", now))
        if saved < _need(found, place) // 100:
            break
        chosen.append(f"{text} saves {_gb(saved)}")
        now = other
    if not chosen:
        return "no setting makes it smaller; use a smaller model, or a larger machine"
    fits = _need(now, place) <= free
    end = "with that it fits" if fits else f"that leaves {_gb(_need(now, place))} GB, which is still too much"
    return f"{', '.join(chosen)} GB: {end}"


def _options(found: Estimate, free_host: int) -> Iterator[tuple[str, Estimate]]:
    """Settings that take less memory, and what a job would need with each."""
    work = found.work
    changes: list[tuple[bool, str, dict[str, Any]]] = [
        (not work.streamed and not work.runs_model, "model.offload=disk", {"streamed": True, "copies": 1}),
        (not work.eval_streamed and not work.streamed, "eval.streamed=true", {"eval_streamed": True}),
        (work.spill_above is None, "calib.spill_above=0", {"spill_above": 0}),
        (work.batch_size > 1, "calib.batch_size=1", {"batch_size": 1}),
        (work.n_samples > 32, "calib.n_samples=32", {"n_samples": 32}),
        (work.eval_batch_size > 1, "eval.batch_size=1", {"eval_batch_size": 1}),
    ]
    for possible, text, change in changes:
        if possible:
            yield text, estimated(found.sizes, replace(work, **change))
    if found.device is not None:
        other = estimated(found.sizes, replace(work, device="cpu"))
        if other.host.total <= free_host:
            yield "device=cpu", other


def describe(found: Estimate, free_host: int, free_device: int | None = None) -> str:
    """One line to be printed before the start."""
    line = f"memory: ~{_gb(found.host.total)} GB ({_parts(found, 'host')}) of {_gb(free_host)} GB free"
    if found.device is None or free_device is None:
        return line
    device = f"{found.work.device} ~{_gb(found.device.total)} GB ({_parts(found, 'device')})"
    return f"{line}; {device} of {_gb(free_device)} GB free"


def _parts(found: Estimate, place: str) -> str:
    need = found.host if place == "host" or found.device is None else found.device
    return ", ".join(f"{name} {_gb(n)}" for name, n in need.parts.items() if n >= 5e7)


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f}" if n_bytes >= 1e8 else f"{n_bytes / 1e9:.2f}"
