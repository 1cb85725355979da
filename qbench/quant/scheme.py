"""What to quantize, and onto which grid. No torch here: the planner reads schemes by the thousand."""

import re
from dataclasses import dataclass
from typing import Literal

from qbench.errors import Unsuitable

Granularity = Literal["tensor", "row", "group"]

SCALE_BITS = 16  # a stored scale is float16, as every deployed format has it


@dataclass(frozen=True)
class QuantSpec:
    """The integer grid of one tensor.

    Attributes:
        bits: Width of a code, 2 to 8.
        symmetric: Whether the zero-point is fixed at zero.
        granularity: What shares one scale: the whole `"tensor"`; one `"row"`, i.e. all elements along
            the last axis (per-channel for a weight, per-token for an activation); or a `"group"` of
            `group_size` neighbours along the last axis.
        group_size: Elements per group; set exactly when `granularity` is `"group"`.

    Raises:
        ValueError: If the fields contradict each other or the width is not supported.
    """

    bits: int
    symmetric: bool = False
    granularity: Granularity = "row"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise Unsuitable(
                f"integer grids have 2 to 8 bits, {self.bits} were asked for",
                "use 16 to leave a tensor in floating point",
            )
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                "group_size must be set exactly when granularity is 'group', got "
                f"granularity={self.granularity!r} and group_size={self.group_size}"
            )

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        return self.qmin + 2**self.bits - 1

    def bits_per_element(self, rows: int, columns: int) -> float:
        """Stored bits per element of a `(rows, columns)` tensor: codes, float16 scales and zero-points."""
        groups = {"tensor": 1, "row": rows, "group": rows * columns // (self.group_size or 1)}[
            self.granularity
        ]
        per_group = SCALE_BITS + (0 if self.symmetric else self.bits)
        return self.bits + groups * per_group / (rows * columns)


@dataclass(frozen=True)
class Scheme:
    """The grids of a model's linear layers and of its KV cache; `None` leaves one in floating point.

    The printed form is the field's shorthand with what departs from its defaults behind it:
    `w4a16g128`, `w8a8-wsym`, `w4a16kv4`.
    """

    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    kv: QuantSpec | None = None

    @classmethod
    def of(
        cls,
        wbits: int = 16,
        abits: int = 16,
        kvbits: int = 16,
        group_size: int | None = None,
        *,
        weight_symmetric: bool = False,
        act_symmetric: bool = True,
        act_granularity: Literal["token", "tensor"] = "token",
    ) -> "Scheme":
        """Build a scheme from the keys of the command line; 16 bits mean floating point.

        Keys and values are asymmetric, one grid per token and head.
        """
        group = None if group_size == -1 else group_size
        if group is not None and group < 1:
            raise ValueError(
                f"group_size is {group}, it must be positive; -1 means one group per output channel"
            )
        return cls(
            None if wbits == 16 else QuantSpec(wbits, weight_symmetric, "group" if group else "row", group),
            None
            if abits == 16
            else QuantSpec(abits, act_symmetric, "row" if act_granularity == "token" else "tensor"),
            None if kvbits == 16 else QuantSpec(kvbits),
        )

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Read the field's shorthand: `w4a16`, `w4a16g128`, `w8a8`, `w4a16kv4g128`.

        Weights are asymmetric per channel or per group, activations symmetric per token.
        """
        match = re.fullmatch(r"w(\d+)a(\d+)(?:kv(\d+))?(?:g(\d+))?", text)
        if match is None:
            raise ValueError(f"cannot read scheme {text!r}; expected e.g. 'w4a16', 'w4a16g128' or 'w4a8kv4'")
        wbits, abits, kvbits, group = (int(g) if g else None for g in match.groups())
        return cls.of(wbits or 16, abits or 16, kvbits or 16, group)

    @property
    def is_float(self) -> bool:
        return self.weight is None and self.activation is None and self.kv is None

    def __str__(self) -> str:
        w, a, kv = self.weight, self.activation, self.kv
        text = f"w{w.bits if w else 16}a{a.bits if a else 16}"
        text += f"kv{kv.bits}" if kv else ""
        text += f"g{w.group_size}" if w and w.group_size else ""
        text += "-wsym" if w and w.symmetric else ""
        text += "-atensor" if a and a.granularity == "tensor" else ""
        text += "-aasym" if a and not a.symmetric else ""
        return text
