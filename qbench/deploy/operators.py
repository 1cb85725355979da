"""An operator of a forward pass, what it takes on a device, and the widths it is counted with."""

from dataclasses import dataclass
from typing import Literal

from qbench.deploy.devices import Device
from qbench.quant.storage import FLOAT_BITS

Phase = Literal["prefill", "decode"]
Bound = Literal["memory", "compute"]

_INTEGER_BITS = 8  # the widest operand that the fast integer units take


@dataclass(frozen=True)
class Bits:
    """Widths, in bits.

    Attributes:
        weight: Of a linear layer's weight as stored, with its share of scales and zero-points.
        activation: Of what linear layers and attention read.
        kv: Of keys and values in the cache, with their share of scales where that is known.
        head: Of the head's weights, and of the embeddings' where the two are tied.
        code: Of a weight's code alone, which is what an integer unit multiplies; `None` where it is `weight`.
    """

    weight: float
    activation: float = FLOAT_BITS
    kv: float = FLOAT_BITS
    head: float = FLOAT_BITS
    code: float | None = None


@dataclass(frozen=True)
class Operator:
    """One operator of a forward pass; operations and bytes are those of one of its `count` occurrences.

    Attributes:
        operations: A multiply-add counts twice.
        weight_bytes: Read, of weights.
        read_bytes, written_bytes: Of activations, and of recurrent states.
        kv_read_bytes, kv_written_bytes: Of the cache of keys and values.
        integer: Both operands are narrow enough for the integer units.
        count: How often it occurs in a forward pass: once in each block of a kind, or once.
    """

    name: str
    operations: float
    weight_bytes: float = 0.0
    read_bytes: float = 0.0
    written_bytes: float = 0.0
    kv_read_bytes: float = 0.0
    kv_written_bytes: float = 0.0
    integer: bool = False
    count: int = 1

    @property
    def bytes(self) -> float:
        """All that it moves."""
        read = self.weight_bytes + self.read_bytes + self.kv_read_bytes
        return read + self.written_bytes + self.kv_written_bytes

    def seconds(self, device: Device) -> float:
        """Of one occurrence."""
        return max(self._times(device))

    def bound(self, device: Device) -> Bound:
        """What takes the time."""
        moving, computing = self._times(device)
        return "memory" if moving >= computing else "compute"

    def _times(self, device: Device) -> tuple[float, float]:
        peak = device.int8 if self.integer else device.fp16
        return self.bytes / device.bandwidth, self.operations / peak


@dataclass(frozen=True)
class Pass:
    """A forward pass of all tokens of the context (prefill), or of one that looks back on as many (decode).

    Raises:
        ValueError: If there is no sequence or no token, or the phase is neither of the two.
    """

    bits: Bits
    batch: int
    context: int
    phase: Phase

    def __post_init__(self) -> None:
        if self.batch < 1 or self.context < 1:
            raise ValueError(f"batch is {self.batch} and context {self.context}; both must be 1 or more")
        if self.phase not in ("prefill", "decode"):
            raise ValueError(f"phase is {self.phase!r}, it must be 'prefill' or 'decode'")

    @property
    def tokens(self) -> int:
        """Read, of each sequence."""
        return self.context if self.phase == "prefill" else 1

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    def integer(self, *widths: float) -> bool:
        return max(widths) <= _INTEGER_BITS
