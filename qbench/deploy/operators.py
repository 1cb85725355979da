"""An operator of a forward pass, what it takes on a device, and the widths it is counted with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from qbench.deploy.devices import Device, Unit
from qbench.quant.storage import FLOAT_BITS

Phase = Literal["prefill", "decode"]
Bound = Literal["memory", "compute"]

_NARROW = 8  # bits of the widest operand that the fast units for small numbers take


@dataclass(frozen=True)
class Layer:
    """Widths of one linear layer.

    Attributes:
        weight: Of the weight as stored, with its share of scales and zero-points, bits.
        activation: Of what it reads, bits.
        unit: What multiplies the two.
    """

    weight: float
    activation: float
    unit: Unit


@dataclass(frozen=True)
class Bits:
    """Widths, in bits.

    Attributes:
        weight: Of a linear layer's weight as stored, with its share of scales and zero-points.
        activation: Of what linear layers and attention read.
        kv: Of keys and values in the cache, with their share of scales where that is known.
        head: Of the head's weights, and of the embeddings' where the two are tied.
        code: Of a weight's code alone, which is what a unit multiplies; `None` where it is `weight`.
        kv_code: The same of keys and values; `None` where it is `kv`.
        kv_residual: The last tokens whose keys and values are in floating point.
        floating: Of what is not quantized: routers, norms, untied embeddings, recurrent states, the residual of the cache.
        narrow: What multiplies where both operands have at most 8 bits; `fp16` where their formats do not go together.
        layers: The layers that depart from `weight`, `activation` and `code`, by the first block of their kind
            and their name.
    """

    weight: float
    activation: float = FLOAT_BITS
    kv: float = FLOAT_BITS
    head: float = FLOAT_BITS
    code: float | None = None
    kv_code: float | None = None
    kv_residual: int = 0
    floating: float = FLOAT_BITS
    narrow: Unit = "int8"
    layers: Mapping[tuple[int, str], Layer] = field(default_factory=dict)

    def layer(self, block: int, name: str) -> Layer:
        """The widths of a layer of the kind of blocks whose first is `block`."""
        if (own := self.layers.get((block, name))) is not None:
            return own
        code = self.weight if self.code is None else self.code
        return Layer(self.weight, self.activation, self.unit(code, self.activation))

    def cached(self, tokens: int) -> float:
        """Mean width of keys and values of so many tokens."""
        kept = min(self.kv_residual, tokens)
        return (kept * self.floating + (tokens - kept) * self.kv) / tokens

    def unit(self, *widths: float) -> Unit:
        """What multiplies operands of these widths."""
        if max(widths) <= _NARROW:
            return self.narrow
        return "fp32" if max(widths) > FLOAT_BITS else "fp16"


@dataclass(frozen=True)
class Operator:
    """One operator of a forward pass; operations and bytes are those of one of its `count` occurrences.

    Attributes:
        operations: A multiply-add counts twice.
        weight_bytes: Read, of weights.
        read_bytes, written_bytes: Of activations, and of recurrent states.
        kv_read_bytes, kv_written_bytes: Of the cache of keys and values.
        unit: What computes it.
        count: How often it occurs in a forward pass: once in each block of a kind, or once.
    """

    name: str
    operations: float
    weight_bytes: float = 0.0
    read_bytes: float = 0.0
    written_bytes: float = 0.0
    kv_read_bytes: float = 0.0
    kv_written_bytes: float = 0.0
    unit: Unit = "fp16"
    count: int = 1

    @property
    def bytes(self) -> float:
        """All that it moves."""
        read = self.weight_bytes + self.read_bytes + self.kv_read_bytes
        return read + self.written_bytes + self.kv_written_bytes

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.bytes

    def seconds(self, device: Device) -> float:
        """Of one occurrence."""
        return max(self._times(device))

    def bound(self, device: Device) -> Bound:
        """What takes the time."""
        moving, computing = self._times(device)
        return "memory" if moving >= computing else "compute"

    def _times(self, device: Device) -> tuple[float, float]:
        return self.bytes / device.bandwidth, self.operations / device.peak(self.unit)


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

    @property
    def kv(self) -> float:
        """Bytes of an element of the cache, in the mean."""
        return self.bits.cached(self.context) / 8

    @property
    def elementwise(self) -> Unit:
        """What computes what is no matrix product."""
        return "fp32" if self.bits.floating > FLOAT_BITS else "fp16"
