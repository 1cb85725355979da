"""Measured times beside the least that the roofline allows on the same machine."""

from dataclasses import dataclass, replace
from functools import cached_property

from qbench.deploy.bench.measure import Timing
from qbench.deploy.devices import Device
from qbench.deploy.operators import Bits, Phase
from qbench.deploy.roofline import operators
from qbench.models.sizes import Shape


@dataclass(frozen=True)
class Roof:
    """A model on a device."""

    shape: Shape
    device: Device

    def prefill_share(self, bits: Bits, timing: Timing) -> float:
        """Of the measured time, what the roofline says it must take; the head makes the last token's logits only."""
        last = self._seconds(bits, timing.batch, timing.prompt, "decode", only_head=True)
        rest = self._seconds(bits, timing.batch, timing.prompt, "prefill", only_head=False)
        return (rest + last) / timing.first().value

    def decode_share(self, bits: Bits, timing: Timing) -> float:
        """The same of a step, half-way through what was made."""
        context = timing.prompt + timing.new_tokens // 2
        parts = (self._seconds(bits, timing.batch, context, "decode", head) for head in (True, False))
        return sum(parts) / timing.step().value

    @cached_property
    def _each_block(self) -> Shape:
        """Blocks one by one: alike in size, they may differ in the widths of their kernels."""
        blocks = (replace(block, at=(index,)) for block in self.shape.blocks for index in block.at)
        return replace(self.shape, blocks=tuple(blocks))

    def _seconds(self, bits: Bits, batch: int, context: int, phase: Phase, only_head: bool) -> float:
        found = operators(self._each_block, bits, batch, context, phase, self.device.on_chip)
        return sum(o.count * o.seconds(self.device) for o in found if (o.name == "lm_head") == only_head)
