"""What follows `qbench recommend`: constraints, and the arguments that say which model and which recipes."""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import OmegaConf

from qbench.deploy.devices import Device, device
from qbench.errors import UsageError
from qbench.report.recommend.decision import PREFERENCES, Limits, Preference
from qbench.sweep.shipped import CONF

MEASURED: Literal["measured"] = "measured"  # in the place of a device: what `qbench bench` found
_UNITS = {"": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


@dataclass(frozen=True)
class Constraints:
    """What `qbench recommend` is asked for.

    Attributes:
        max_bits: Stored bits a weight, all of the model; the other limits are in `limits`.
        hardware: Whose roofline says how long a step takes, or `MEASURED`; `None`: time does not count.
        batch, context: Sequences at once, and tokens that each looks back on while the next is made.
        prefer: What decides among recipes that meet the limits; `None`: as `usual_preference` says.
        search: Whether to run candidates even where records suffice.
        arguments: The rest: model, calibration, evaluation, and which recipes.
    """

    limits: Limits = field(default_factory=Limits)
    max_bits: float | None = None
    hardware: Device | Literal["measured"] | None = None
    batch: int = 1
    context: int = 2048
    prefer: Preference | None = None
    search: bool = False
    arguments: tuple[str, ...] = ()

    def with_size(self, n_weights: float) -> Limits:
        """The limits, with `max_bits` as the bytes that it means for a model of so many weights."""
        if self.max_bits is None:
            return self.limits
        most = self.max_bits * n_weights / 8
        own = self.limits.max_bytes
        return Limits(
            most if own is None else min(most, own), self.limits.max_ppl_increase, self.limits.max_latency
        )


def read(arguments: Sequence[str]) -> Constraints:
    """Read what follows `qbench recommend`.

    Raises:
        UsageError: If one of its own keys is misspelt, has a value that it cannot have, or they do not go together.
    """
    if words := [a for a in arguments if "=" not in a]:
        raise UsageError(f"`qbench recommend` takes key=value; got {words[0]}")
    for key in (a.partition("=")[0] for a in arguments):
        _refuse_misspelt(key)
    own = {k: v for k, _, v in (a.partition("=") for a in arguments) if k in _READERS}
    values: dict[str, Any] = {}
    for key, text in own.items():
        try:
            values[key] = _READERS[key](text)
        except ValueError as error:
            raise UsageError(f"{key}={text}: {error}") from error
    limits = Limits(*(values.pop(key, None) for key in ("max_bytes", "max_ppl_increase", "max_latency")))
    if values.get("hardware") is None and (limits.max_latency is not None or values.get("prefer") == "speed"):
        raise UsageError("max_latency and prefer=speed need hardware=, for example hardware=h100")
    if values.get("hardware") is None and (lost := [key for key in ("batch", "context") if key in values]):
        raise UsageError(
            f"{lost[0]} says how a step is timed, which needs hardware=, for example hardware=h100"
        )
    if values.get("hardware") == MEASURED and values.get("search"):
        raise UsageError(
            "hardware=measured chooses among recipes that `qbench bench` timed, and search=true runs others; leave one out"
        )
    rest = tuple(a for a in arguments if a.partition("=")[0] not in own)
    return Constraints(limits=limits, **values, arguments=rest)


def _refuse_misspelt(key: str) -> None:
    """What neither this command nor the config knows, and comes near one of this command's own keys."""
    if key in _READERS or not key.isidentifier():
        return
    known = {str(name) for name in OmegaConf.load(CONF / "config.yaml")} | {p.name for p in CONF.iterdir()}
    begun = [name for name in _READERS if len(key) > 3 and name.startswith(key)]
    near = begun or difflib.get_close_matches(key, _READERS, n=2, cutoff=0.7)
    if near and key not in known:
        raise UsageError(
            f"unknown key {key!r}; did you mean {' or '.join(near)}? There are {', '.join(_READERS)}"
        )


def _size(text: str) -> float:
    """Bytes of `3.5GB`, `800MiB`, `1200000`."""
    return _with_unit(text, _UNITS, "a size, as in 3.5GB, 800MiB or 1200000")


def _share(text: str) -> float:
    """`2%` or `0.02`."""
    number = text.strip().removesuffix("%")
    value = _positive(number, "a share, as in 2% or 0.02")
    if number != text.strip():
        return value / 100
    if value >= 1:
        raise ValueError(f"is {value:.0%}; write {text}% or {value:.0%}")
    return value


def _seconds(text: str) -> float:
    return _with_unit(text, _TIMES, "a time, as in 8ms or 0.5s")


def _with_unit(text: str, units: dict[str, float], what: str) -> float:
    parts = re.fullmatch(r"\s*([\d.]+(?:e[+-]?\d+)?)\s*([a-zA-Z]*)\s*", text)
    if parts is None or parts[2].lower() not in units:
        raise ValueError(f"must be {what}")
    return _positive(parts[1], what) * units[parts[2].lower()]


def _positive(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ValueError(f"must be {what}, above zero")
    return value


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError("must be a whole number from 1")
    return int(text)


def _preference(text: str) -> Preference:
    if text not in PREFERENCES:
        raise ValueError(f"there are {', '.join(PREFERENCES)}")
    return text


def _hardware(text: str) -> Device | Literal["measured"]:
    return MEASURED if text == MEASURED else device(text)


def _switch(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("there are true and false")
    return text == "true"


_READERS: dict[str, Callable[[str], Any]] = {
    "max_bytes": _size,
    "max_bits": lambda text: _positive(text, "bits a weight, as in 4.5"),
    "max_ppl_increase": _share,
    "max_latency": _seconds,
    "hardware": _hardware,
    "batch": _count,
    "context": _count,
    "prefer": _preference,
    "search": _switch,
}
