"""What a scheme gains on a device by the roofline, up to which batch, and how many sequences fit."""

from collections.abc import Callable
from dataclasses import dataclass

from qbench.deploy.devices import Device
from qbench.deploy.operators import Bits, Phase
from qbench.deploy.roofline import latency, memory
from qbench.models.sizes import Shape

PAYS = 1.05  # a speed-up over floating point below this is none
_MOST = 1 << 20  # sequences at once; no batch is larger


@dataclass(frozen=True)
class Variant:
    """A model in the widths of one scheme; its shape tells blocks apart that the scheme treats differently."""

    label: str
    shape: Shape
    bits: Bits


def seconds(model: Variant, device: Device, batch: int, context: int, phase: Phase, fused: bool) -> float:
    return latency(model.shape, model.bits, device, batch, context, phase, fused).seconds


def stops_paying(
    quantized: Variant, floating: Variant, device: Device, context: int, fused: bool = True
) -> int | None:
    """The smallest batch from which decoding gains less than `PAYS` over floating point; `None`: it gains at any.

    Experts make the gain rise before it falls, so the search begins at the last of the doubled batches that gains.
    """

    def gains(batch: int) -> bool:
        times = (seconds(model, device, batch, context, "decode", fused) for model in (floating, quantized))
        return next(times) >= PAYS * next(times)

    doubled = [1 << n for n in range(_MOST.bit_length())]
    paying = [batch for batch in doubled if gains(batch)]
    if not paying:
        return 1
    return None if paying[-1] == _MOST else _first(lambda batch: not gains(batch), paying[-1], 2 * paying[-1])


def most_sequences(model: Variant, device: Device, context: int) -> int:
    """How many sequences of `context` tokens the device's memory holds while decoding; 0: the model itself does not fit."""

    def full(batch: int) -> bool:
        return memory(model.shape, model.bits, batch, context).total > device.memory

    if full(1):
        return 0
    return _MOST if not full(_MOST) else _first(full, 1, _MOST) - 1


def _first(holds: Callable[[int], bool], below: int, at: int) -> int:
    """The smallest number at which something holds that holds at `at`, but not at `below`."""
    while at - below > 1:
        middle = (below + at) // 2
        below, at = (below, middle) if holds(middle) else (middle, at)
    return at
