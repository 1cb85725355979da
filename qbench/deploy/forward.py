"""The operators of one forward pass: what each computes, and what it moves.

What is assumed beyond the sizes of the model:

* Attention counts all of the scores, masked or not, of as many tokens as a block looks back on (its window).
* Latent attention keeps the latent. A prefill makes keys and values of it, once; decoding multiplies queries with the
  latent itself, and `kv_b_proj` stands for the two products that this takes: as many weights and operations.
* Tokens choose experts independently, and all experts are equally liked: `count * (1 - (1 - active / count) ** rows)`
  of them are read. Likes that differ read fewer.
* Routers are in floating point. What chooses experts, and weights of norms, biases and convolutions, cost nothing.
* The scan of Mamba keeps its state on chip while it reads tokens; a state is in floating point. Its discretization, its
  step and its output are 8 operations for each element of the state.
* Where the last tokens of the cache are in floating point, its bytes are those of the mean width, read and written.
* Scales of activations cost nothing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from qbench.deploy.operators import Layer, Operator, Pass
from qbench.models.sizes import Attention, Block, Linear, Recurrence, Shape


def of_block(run: Pass, shape: Shape, block: Block, on_chip: float | None) -> Iterator[Operator]:
    """The operators of one block, each as often as there are blocks of the kind.

    Args:
        on_chip: Bytes that fused attention may keep on chip; `None`: attention is not fused.

    Raises:
        NotImplementedError: If the block has a recurrent state that is not Mamba's.
    """
    count = len(block.at)
    for label, linear in zip(block.labels, block.linears, strict=True):
        yield _linear(run, label, linear, block.at[0], count)
    if block.attention is not None:
        yield from _attention(run, block, block.attention, on_chip)
    if block.recurrence is not None:
        yield from _scan(run, block.recurrence, count)
    yield from _elementwise(run, shape, block)


def head(run: Pass, shape: Shape) -> Operator:
    bits, a = run.bits, run.bits.activation / 8
    moved = (shape.n_embedding * bits.head / 8, shape.embedding * run.rows * a, shape.vocab * run.rows * a)
    unit = bits.unit(bits.head, bits.activation)
    return Operator("lm_head", 2 * shape.n_embedding * run.rows, *moved, unit=unit)


def _linear(run: Pass, label: str, linear: Linear, block: int, count: int) -> Operator:
    rows, n, floating = run.rows * linear.active, linear.inputs * linear.outputs, run.bits.floating
    layer = run.bits.layer(block, linear.name)
    if linear.role == "router":
        layer = Layer(floating, layer.activation, run.bits.unit(floating))
    read, a = layer.activation / 8, run.bits.activation / 8
    written, kv_written = (linear.outputs - linear.cached) * rows * a, linear.cached * rows * run.kv
    moved = (
        n * layer.weight / 8 * _read(linear, run.rows),
        linear.inputs * rows * read,
        written,
        0.0,
        kv_written,
    )
    return Operator(label, 2 * n * rows, *moved, layer.unit, count)


def _read(linear: Linear, rows: int) -> float:
    """How many of the experts are expected to be chosen by at least one of the tokens."""
    return linear.count * (1 - (1 - linear.active / linear.count) ** rows)


@dataclass(frozen=True)
class _Seen:
    """What attention multiplies queries with: sizes, and bytes of all keys and of all values.

    Attributes:
        shared: Values are a part of the keys, which are read but once where both are used together.
        kept: Keys and values are read from the cache.
    """

    n_heads: int
    key_dim: int
    value_dim: int
    keys: float
    values: float
    shared: bool = False
    kept: bool = True


def _seen(run: Pass, attention: Attention, back: int) -> _Seen:
    n, key, value = attention.n_heads, attention.key_dim, attention.value_dim
    k, tokens = run.kv, run.batch * back
    if attention.latent is None:
        kv = attention.n_kv_heads
        return _Seen(n, key, value, tokens * kv * key * k, tokens * kv * value * k)
    if run.phase == "decode":
        wide = attention.latent + attention.latent_rotary
        return _Seen(n, wide, attention.latent, tokens * wide * k, tokens * attention.latent * k, shared=True)
    a = run.bits.activation / 8
    return _Seen(n, key, value, tokens * n * key * a, tokens * n * value * a, kept=False)


def _attention(run: Pass, block: Block, attention: Attention, on_chip: float | None) -> Iterator[Operator]:
    a, k, count = run.bits.activation / 8, run.kv, len(block.at)
    written = attention.kept - sum(linear.cached for linear in block.linears)
    if written:  # by an operator of its own, where no linear layer is known to write it
        moved = written * run.rows
        yield Operator("kv_append", 0.0, 0.0, moved * a, 0.0, 0.0, moved * k, count=count)
    back = attention.looks_back(run.context)
    seen = _seen(run, attention, back)
    scores = run.batch * seen.n_heads * run.tokens * back
    queries, outputs = (run.rows * seen.n_heads * width for width in (seen.key_dim, seen.value_dim))
    kv_code = run.bits.kv if run.bits.kv_code is None else run.bits.kv_code
    unit = run.bits.unit(run.bits.activation, kv_code if seen.kept else run.bits.activation)
    first, second = 2 * scores * seen.key_dim, 2 * scores * seen.value_dim
    if on_chip is None:
        keys, values = ((0.0, x) if seen.kept else (x, 0.0) for x in (seen.keys, seen.values))
        moved_first = (0.0, queries * a + keys[0], scores * a, keys[1], 0.0)
        yield Operator("qk_matmul", first, *moved_first, unit, count)
        yield Operator("softmax", 5 * scores, 0.0, scores * a, scores * a, unit=run.elementwise, count=count)
        moved_second = (0.0, scores * a + values[0], outputs * a, values[1], 0.0)
        yield Operator("pv_matmul", second, *moved_second, unit, count)
        return
    # Scores never leave the chip; keys and values are read once for each block of queries (FlashAttention-2).
    d, byte = seen.key_dim, k if seen.kept else a
    times = math.ceil(run.tokens / min(math.ceil(on_chip / (byte * d)), d))
    cache = times * (seen.keys + (0.0 if seen.shared else seen.values))
    read, kept = (queries * a, cache) if seen.kept else (queries * a + cache, 0.0)
    yield Operator(
        "fused_attention", first + 5 * scores + second, 0.0, read, outputs * a, kept, 0.0, unit, count
    )


def _scan(run: Pass, recurrence: Recurrence, count: int) -> Iterator[Operator]:
    """Convolution and scan of either Mamba."""
    if recurrence.kind != "mamba" or not recurrence.conv or not recurrence.state:
        raise NotImplementedError(
            f"the operators of {recurrence.kind}, whose state is {recurrence.state}, are not described, so there is no "
            "roofline of this model; add them to qbench/deploy/forward.py"
        )
    a, rows, floating, unit = run.bits.activation / 8, run.rows, run.bits.floating / 8, run.elementwise
    channels, width = recurrence.conv
    before = run.batch * floating if run.phase == "decode" else 0.0  # a prefill starts from nothing
    window, state = channels * width, math.prod(recurrence.state)
    moved = (0.0, channels * rows * a + window * before, channels * rows * a + window * run.batch * floating)
    yield Operator("conv1d", 2 * window * rows, *moved, unit=unit, count=count)
    # The first version's inputs and outputs of the state pass by the convolution, the second's go through it.
    beside = 2 * recurrence.state[-1] if len(recurrence.state) == 2 else 0
    read = channels + beside + recurrence.state[0] + recurrence.inner  # with the step, and the gate
    moved = (
        0.0,
        read * rows * a + state * before,
        recurrence.inner * rows * a + state * run.batch * floating,
    )
    yield Operator("scan", 8 * state * rows, *moved, unit=unit, count=count)


def _elementwise(run: Pass, shape: Shape, block: Block) -> Iterator[Operator]:
    """Computed in floating point whatever the width of what is read; memory is what takes the time."""
    a, count, rows, unit = run.bits.activation / 8, len(block.at), run.rows, run.elementwise
    for index, width in enumerate(block.norms):
        n = rows * width
        yield Operator(f"norm_{index}", 7 * n, 0.0, n * a, n * a, unit=unit, count=count)
    hidden, activations = rows * shape.hidden, block.activations
    halves = {"attn": block.attention, "recurrence": block.recurrence, "mlp": activations}
    for at in (name for name, half in halves.items() if half):
        yield Operator(f"{at}_add", hidden, 0.0, hidden * a, hidden * a, unit=unit, count=count)
    for index, (read, written, active) in enumerate(activations):
        name = "mlp_act" if index == 0 else f"mlp_act_{index}"
        n = rows * active
        yield Operator(name, n * read, 0.0, n * read * a, n * written * a, unit=unit, count=count)
    active = max((linear.active for linear in block.linears if linear.role == "expert"), default=0)
    if active:
        n = active * hidden
        yield Operator("experts_sum", 2 * n, 0.0, n * a, hidden * a, unit=unit, count=count)
