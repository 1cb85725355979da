"""`qbench roofline` and `qbench hardware`: the least time that a model takes on a device, and what this machine can do."""

import difflib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbench.errors import UsageError

_LISTS = ("scheme", "hardware", "batch", "seq")
_OWN = (*_LISTS, "fused", "phase", "csv")
_PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class _Asked:
    """What follows the command.

    Attributes:
        schemes: Names of schemes; empty: the one of the other keys.
        phases: Prefill, decoding, or both.
        rest: What chooses the model, and the keys of a scheme.
    """

    schemes: list[str]
    hardware: list[str]
    batches: list[int]
    lengths: list[int]
    fused: bool
    phases: tuple[str, ...]
    csv: Path | None
    rest: list[str]


def roofline(arguments: list[str]) -> int:
    """`qbench roofline model=… scheme=… hardware=h100 [batch=1] [seq=2048] [phase=prefill | decode] [fused=false] [csv=…]`

    The least time that a prefill of `seq` tokens, and a step of decoding after as many, take on a device, by the bytes
    that are moved and the operations that are done; what bounds them, the memory that is needed, the gain over floating
    point, and the batch from which decoding gains no more. scheme, hardware, batch and seq may be lists
    (batch=1,8,32); for one of each, every operator is shown. No weights are loaded: the config of the model is enough,
    or the catalogue's dimensions.

    hardware=this is the processor of this machine and this-cuda its GPU, measured once (`qbench hardware`). Floating
    point is of 16 bits, or of 32 with model.dtype=float32. Attention keeps its scores on chip, unless fused=false.
    docs/efficiency.md says what is counted.
    """
    asked = _asked(arguments)
    from qbench.cli.roofline_tables import Point, show
    from qbench.deploy.devices import device

    try:
        floating, variants, told = _variants(asked)
        devices = [device(name) for name in asked.hardware]
        found = [
            Point.of(floating, variant, each, batch, length, asked.phases, asked.fused)
            for each, length, variant, batch in itertools.product(
                devices, asked.lengths, (floating, *variants), asked.batches
            )
        ]
    except (ValueError, NotImplementedError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    show(told, found, asked.csv)
    return 0


def hardware(arguments: list[str]) -> int:
    """`qbench hardware [hardware=this | this-cuda] [remeasure=true]`: bandwidth and peaks of this machine.

    Measured once for each number of threads and version of torch, and kept in the user's cache folder; measured again
    with remeasure=true, which is wanted where the machine was busy the first time (see `spread`).
    """
    values = _keys(arguments, "hardware", ("hardware", "remeasure"))
    name, again = values.get("hardware", "this"), _switch("remeasure", values.get("remeasure", "false"))
    from qbench.cli.roofline_tables import show_measured
    from qbench.deploy.devices import HERE
    from qbench.deploy.hardware import measured

    here = next((each for each in HERE if each == name), None)
    if here is None:
        raise UsageError(f"hardware={name} is not this machine; there are {', '.join(HERE)}")
    try:
        show_measured(measured(here, again))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return 0


def _asked(arguments: list[str]) -> _Asked:
    if words := [a for a in arguments if "=" not in a]:
        raise UsageError(f"`qbench roofline` takes key=value; got {words[0]}")
    own = {k: v for k, _, v in (a.partition("=") for a in arguments) if k in _OWN}
    for key in (a.partition("=")[0] for a in arguments):
        if key not in _OWN and (near := difflib.get_close_matches(key, _OWN, n=1, cutoff=0.75)):
            raise UsageError(f"unknown key {key!r}; did you mean {near[0]}=?")
    if "context" in (a.partition("=")[0] for a in arguments):
        raise UsageError("`qbench roofline` calls the tokens of a sequence seq, for example seq=2048")
    if not own.get("hardware"):
        raise UsageError("name a device, for example hardware=h100, or hardware=this")
    phase = own.get("phase", "")
    if phase and phase not in _PHASES:
        raise UsageError(f"phase={phase}: there are {' and '.join(_PHASES)}; both are shown without it")
    return _Asked(
        own["scheme"].split(",") if "scheme" in own else [], own["hardware"].split(","),
        _counts("batch", own.get("batch", "1")), _counts("seq", own.get("seq", "2048")),
        _switch("fused", own.get("fused", "true")), (phase,) if phase else _PHASES,
        Path(own["csv"]) if "csv" in own else None, [a for a in arguments if a.partition("=")[0] not in own],
    )  # fmt: skip


def _variants(asked: _Asked) -> tuple[Any, list[Any], list[str]]:
    """The model in floating point, in each of the schemes, and what is to be said of it."""
    from qbench.deploy.comparison import Variant
    from qbench.deploy.widths import widths
    from qbench.models.dimensions import dimensions_of
    from qbench.quant.scheme import Scheme
    from qbench.sweep.composed import config_of as composed
    from qbench.sweep.settings import Jobs, floating_point

    configs = [composed([*asked.rest, f"scheme={name}"]) for name in asked.schemes] or [composed(asked.rest)]
    model = Jobs().job(floating_point(configs[0])).model
    # `auto` is the dtype of an evaluation, which follows the machine that evaluates, not the one that serves.
    bits = 32 if configs[0]["model"]["dtype"] != "auto" and model.dtype == "float32" else 16
    found = dimensions_of(model)
    shape = found.shape
    base = Variant(f"fp{bits}", *widths(shape, Scheme(), bits))
    schemes = [Jobs().job(config).scheme for config in configs]
    variants = [Variant(scheme.label, *widths(shape, scheme, bits, found.kept)) for scheme in schemes]
    few = shape.n_active_parameters < shape.n_parameters
    active = f", {shape.n_active_parameters / 1e9:.3g}B active" if few else ""
    said = f"{model.name}, {shape.n_parameters / 1e9:.3g}B parameters{active} ({found.source})"
    stays = [f"in floating point in any scheme: {', '.join(sorted(found.kept))}"] if found.kept else []
    return base, variants, [said, *stays]


def _keys(arguments: list[str], command: str, known: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            raise UsageError(
                f"`qbench {command}` takes {', '.join(f'{k}=' for k in known)}; got {argument!r}"
            )
        found[key] = value
    return found


def _switch(key: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise UsageError(f"{key}={text} is neither true nor false")
    return text == "true"


def _counts(key: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"{key}={text}: must be whole numbers from 1, as in {key}=8 or {key}=1,8,32")
    return [int(part) for part in parts]


COMMANDS: dict[str, Callable[[list[str]], int]] = {"roofline": roofline, "hardware": hardware}
