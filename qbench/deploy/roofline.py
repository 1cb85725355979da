"""Roofline: the least time a model can take on a device, from the bytes it moves and the operations it does.

An operator takes as long as the slower of the two: moving its bytes at the memory's bandwidth, or doing its
operations at the peak of the arithmetic units; operators follow one another. A bound, not a forecast: launches,
unequal shares of the hardware and unpacking of codes cost more, caches between operators save some. Attention
counts all of the scores, masked or not, and looks back over the whole context, sliding window or not.

Yuan et al., "LLM Inference Unveiled: Survey and Roofline Model Insights", 2024 (LLM-Viewer), with its slips undone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qbench.deploy.devices import Device
from qbench.models.shape import Shape
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


def bits_of(record: Mapping[str, Any]) -> Bits:
    """The widths that a done record states; the scales of its cache are not among them."""
    stored, labels = record["metrics"]["bits_per_linear_weight"], record["labels"]
    return Bits(stored, labels["abits"], labels["kvbits"], code=labels["wbits"])


@dataclass(frozen=True)
class Operator:
    """One operator of a forward pass; operations and bytes are those of one of its `count` occurrences.

    Attributes:
        operations: A multiply-add counts twice.
        weight_bytes: Read, of weights.
        read_bytes, written_bytes: Of activations.
        kv_read_bytes, kv_written_bytes: Of the cache of keys and values.
        integer: Both operands are narrow enough for the integer units.
        count: How often it occurs in a forward pass: once in each block, or once.
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
class Latency:
    """Of one forward pass.

    Attributes:
        tokens_per_second: Read by a prefill, made by decoding, of all sequences of the batch together.
        bound: What more than half of the time goes to.
    """

    seconds: float
    tokens_per_second: float
    bound: Bound
    operators: tuple[Operator, ...]


@dataclass(frozen=True)
class Memory:
    """What a device must hold, in bytes.

    Attributes:
        weights: Of blocks, embeddings and head; norms, biases and positions in 16 bits.
        kv: Of keys and values of the whole context.
        activations: All that one block and the head write in a pass. More than is needed at any one time.
    """

    weights: float
    kv: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.kv + self.activations


def latency(
    shape: Shape, bits: Bits, device: Device, batch: int, context: int, phase: Phase, fused: bool = False
) -> Latency:
    """The least time of reading `context` tokens (prefill), or of making one token that looks back over as many.

    Args:
        fused: Attention keeps its scores on chip.
    """
    on_chip = device.on_chip if fused else None
    found = operators(shape, bits, batch, context, phase, on_chip)
    times = {"memory": 0.0, "compute": 0.0}
    for operator in found:
        times[operator.bound(device)] += operator.count * operator.seconds(device)
    seconds = sum(times.values())
    tokens = batch * (context if phase == "prefill" else 1)
    bound: Bound = "memory" if times["memory"] >= times["compute"] else "compute"
    return Latency(seconds, tokens / seconds, bound, found)


def memory(shape: Shape, bits: Bits, batch: int, context: int, phase: Phase = "decode") -> Memory:
    """What `batch` sequences of `context` tokens need; attention is not fused."""
    weights = shape.n_linear * bits.weight + shape.n_embedding * bits.head + shape.n_other * FLOAT_BITS
    if not shape.tied:
        weights += shape.n_embedding * FLOAT_BITS
    kv = 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * batch * context * bits.kv
    activations = sum(op.written_bytes for op in operators(shape, bits, batch, context, phase))
    return Memory(weights / 8, kv / 8, activations)


def operators(
    shape: Shape, bits: Bits, batch: int, context: int, phase: Phase, on_chip: float | None = None
) -> tuple[Operator, ...]:
    """The operators of one forward pass: linear layers, attention, the rest of a block, the head.

    Args:
        context: Tokens that attention looks back over: all are read by a prefill, one is read when decoding.
        on_chip: Bytes that fused attention may keep on chip; `None`: attention is not fused.

    Raises:
        ValueError: If there is no sequence or no token, or the phase is neither of the two.
    """
    if batch < 1 or context < 1:
        raise ValueError(f"batch is {batch} and context {context}; both must be 1 or more")
    if phase not in ("prefill", "decode"):
        raise ValueError(f"phase is {phase!r}, it must be 'prefill' or 'decode'")
    run = _Pass(shape, bits, batch, context, context if phase == "prefill" else 1)
    attention = _attention(run) if on_chip is None else _fused_attention(run, on_chip)
    return (*_linears(run), *attention, *_elementwise(run), _head(run))


@dataclass(frozen=True)
class _Pass:
    """A forward pass of `tokens` tokens of each of `batch` sequences, `context` long."""

    shape: Shape
    bits: Bits
    batch: int
    context: int
    tokens: int

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    def integer(self, *widths: float) -> bool:
        return max(widths) <= _INTEGER_BITS


def _linears(run: _Pass) -> list[Operator]:
    bits, rows, found = run.bits, run.rows, []
    a, w = bits.activation / 8, bits.weight / 8
    integer = run.integer(bits.weight if bits.code is None else bits.code, bits.activation)
    for name, (inputs, outputs) in run.shape.linears.items():
        n = inputs * outputs
        cached = name in ("k_proj", "v_proj")
        written, kv_written = (0.0, outputs * rows * bits.kv / 8) if cached else (outputs * rows * a, 0.0)
        moved = (n * w, inputs * rows * a, written, 0.0, kv_written)
        found.append(Operator(name, 2 * n * rows, *moved, integer, run.shape.n_layers))
    return found


def _attention(run: _Pass) -> list[Operator]:
    shape, a, layers = run.shape, run.bits.activation / 8, run.shape.n_layers
    scores = run.batch * shape.n_heads * run.tokens * run.context
    outputs = run.rows * shape.n_heads * shape.head_dim  # as many as there are queries
    product = 2 * scores * shape.head_dim
    cache = run.batch * run.context * shape.n_kv_heads * shape.head_dim * run.bits.kv / 8
    narrow = run.integer(run.bits.activation, run.bits.kv)
    return [
        Operator("qk_matmul", product, 0.0, outputs * a, scores * a, cache, 0.0, narrow, layers),
        Operator("softmax", 5 * scores, 0.0, scores * a, scores * a, count=layers),
        Operator("pv_matmul", product, 0.0, scores * a, outputs * a, cache, 0.0, narrow, layers),
    ]


def _fused_attention(run: _Pass, on_chip: float) -> list[Operator]:
    """Scores never leave the chip; keys and values are read once for each block of queries (FlashAttention-2)."""
    qk, softmax, pv = _attention(run)
    d, k = run.shape.head_dim, run.bits.kv / 8
    times = math.ceil(run.tokens / min(math.ceil(on_chip / (k * d)), d))
    cache = times * (qk.kv_read_bytes + pv.kv_read_bytes)
    operations = qk.operations + softmax.operations + pv.operations
    moved = (0.0, qk.read_bytes, pv.written_bytes, cache, 0.0)
    return [Operator("fused_attention", operations, *moved, qk.integer, qk.count)]


def _elementwise(run: _Pass) -> list[Operator]:
    """Computed in floating point whatever the width of what is read; memory is what takes the time."""
    shape, a, count = run.shape, run.bits.activation / 8, run.shape.n_layers
    hidden, inner = run.rows * shape.hidden, run.rows * shape.ffn
    operands = 2 if shape.gated_mlp else 1  # gate and up, or what fc1 gave
    halves = ("attn", "mlp")
    norms = [Operator(f"{at}_norm", 7 * hidden, 0.0, hidden * a, hidden * a, count=count) for at in halves]
    adds = [Operator(f"{at}_add", hidden, 0.0, hidden * a, hidden * a, count=count) for at in halves]
    read, written = operands * inner * a, inner * a
    return [*norms, *adds, Operator("mlp_act", operands * inner, 0.0, read, written, count=count)]


def _head(run: _Pass) -> Operator:
    shape, bits, a = run.shape, run.bits, run.bits.activation / 8
    moved = (shape.n_embedding * bits.head / 8, shape.embedding * run.rows * a, shape.vocab * run.rows * a)
    integer = run.integer(bits.head, bits.activation)
    return Operator("lm_head", 2 * shape.n_embedding * run.rows, *moved, integer=integer)
