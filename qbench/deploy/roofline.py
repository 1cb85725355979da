"""Roofline: the least time a model can take on a device, from the bytes it moves and the operations it does.

An operator takes as long as the slower of the two: moving its bytes at the memory's bandwidth, or doing its
operations at the peak of the arithmetic units; operators follow one another. A bound, not a forecast: launches,
unequal shares of the hardware and unpacking of codes cost more, caches between operators save some. What
each operator is taken to be is said in `qbench/deploy/forward.py`.

Yuan et al., "LLM Inference Unveiled: Survey and Roofline Model Insights", 2024 (LLM-Viewer), with its slips undone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qbench.deploy.devices import Device
from qbench.deploy.forward import head, of_block
from qbench.deploy.operators import Bits, Bound, Operator, Pass, Phase
from qbench.deploy.widths import narrow_unit
from qbench.models.sizes import Shape

__all__ = ["Bits", "Latency", "Memory", "Operator", "Phase", "bits_of", "latency", "memory", "operators"]


def bits_of(record: Mapping[str, Any]) -> Bits:
    """The widths that a done record states; the scales of its cache are not among them.

    Records of before there were formats have integers only.
    """
    stored, labels, config = (
        record["metrics"]["bits_per_linear_weight"],
        record["labels"],
        record.get("config", {}),
    )
    narrow = narrow_unit(config.get("weight_format", "int"), config.get("act_format", "int"))
    return Bits(stored, labels["abits"], labels["kvbits"], code=labels["wbits"], narrow=narrow)


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
        weights: Of blocks, embeddings and head; norms, biases, positions and routers in floating point.
        kv: Of keys and values of the context, as far back as each block looks, and of recurrent states in floating point.
        activations: All that the block that writes most and the head write in a pass. More than is needed at any one time.
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
    run = Pass(bits, batch, context, phase)
    weights = shape.n_linear * bits.weight + shape.n_embedding * bits.head + shape.n_other * bits.floating
    if not shape.tied:
        weights += shape.n_embedding * bits.floating
    kv = 0.0
    for block in shape.blocks:
        if block.attention is not None:
            back = block.attention.looks_back(context)
            kv += len(block.at) * block.attention.kept * batch * back * bits.cached(back)
        if block.recurrence is not None:
            kv += len(block.at) * block.recurrence.kept * batch * bits.floating
    activations = max(
        sum(op.written_bytes for op in (*of_block(run, shape, block, None), head(run, shape)))
        for block in shape.blocks
    )
    return Memory(weights / 8, kv / 8, activations)


def operators(
    shape: Shape, bits: Bits, batch: int, context: int, phase: Phase, on_chip: float | None = None
) -> tuple[Operator, ...]:
    """The operators of one forward pass: linear layers, attention, the rest of a block, for each kind of it; the head.

    Args:
        context: Tokens that attention looks back over: all are read by a prefill, one is read when decoding.
        on_chip: Bytes that fused attention may keep on chip; `None`: attention is not fused.

    Raises:
        NotImplementedError: If a block has a recurrent state that is not Mamba's.
        ValueError: If there is no sequence or no token, or the phase is neither of the two.
    """
    run = Pass(bits, batch, context, phase)
    found = [operator for block in shape.blocks for operator in of_block(run, shape, block, on_chip)]
    return (*found, head(run, shape))
