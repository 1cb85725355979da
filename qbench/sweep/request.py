"""What follows `qbench sensitivity`: its own keys, and the arguments that say what is quantized and how."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

from qbench.errors import UsageError
from qbench.models.units import CUTS, Cut
from qbench.quant.storage import FLOAT_BITS

Mode = Literal["in", "out"]
Verb = Literal["measure", "solve", "stats"]
_EVALUATION = "eval=quick"


@dataclass(frozen=True)
class Request:
    """What `qbench sensitivity` is asked for.

    Attributes:
        mode: `in`: quantize one unit and leave the rest in floating point; `out`: all but one.
        by: What a unit is.
        bits: The widths that are measured; 16 is floating point, which costs the solver nothing but bits.
        budget: Stored bits a weight that the solver may spend.
        check: Whether to run what the solver chose, and each single width.
        arguments: The other arguments, which say what is quantized and how.
    """

    verb: Verb = "measure"
    mode: Mode = "in"
    by: Cut = "block,component"
    bits: tuple[int, ...] = (2, 3, 4)
    budget: Fraction | None = None
    check: bool = False
    arguments: tuple[str, ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that need jobs."""
        return tuple(b for b in self.bits if b != FLOAT_BITS)

    @property
    def measured(self) -> list[str]:
        """The arguments of the measurements: on few windows where nothing else is said."""
        has = any(a.lstrip("+").startswith("eval=") for a in self.arguments)
        return [*self.arguments] if has else [*self.arguments, _EVALUATION]


def read(arguments: Sequence[str]) -> Request:
    """Read what follows `qbench sensitivity`.

    Raises:
        UsageError: If one of its own keys has a value that it cannot have.
    """
    words = [a for a in arguments if "=" not in a and not a.startswith(("~", "-"))]
    own = {k: v for k, e, v in (a.partition("=") for a in arguments) if e and k in _READERS}
    rest = tuple(a for a in arguments if a not in words and a.partition("=")[0] not in own)
    verb = words[0] if words else "measure"
    if len(words) > 1 or verb not in get_args(Verb):
        raise UsageError(f"`qbench sensitivity {' '.join(words)}`: there are stats and solve, or neither")
    values: dict[str, Any] = {}
    for key, text in own.items():
        try:
            values[key] = _READERS[key](text)
        except (ValueError, ZeroDivisionError) as error:
            raise UsageError(f"{key}={text}: {error}") from error
    return Request(verb=verb, **values, arguments=rest)  # type: ignore[arg-type]


def _one_of(*choices: str) -> Callable[[str], str]:
    def choose(text: str) -> str:
        if text not in choices:
            raise ValueError(f"there are {', '.join(choices)}")
        return text

    return choose


def _widths(text: str) -> tuple[int, ...]:
    try:
        found = sorted({int(part) for part in text.strip("[]").split(",")})
    except ValueError:
        found = []
    if not found or not all(1 <= b <= 8 or b == FLOAT_BITS for b in found) or found == [FLOAT_BITS]:
        raise ValueError("widths are 1 to 8, and 16 for floating point; for example bits=2,3,4")
    return tuple(found)


_READERS: dict[str, Callable[[str], Any]] = {
    "mode": _one_of(*get_args(Mode)),
    "by": lambda text: _one_of(*CUTS)(text.strip("[]")),
    "bits": _widths,
    "budget": Fraction,
    "check": lambda text: _one_of("true", "false")(text) == "true",
}
