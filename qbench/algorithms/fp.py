"""No quantization: the floating-point model, which every result is compared with."""

from dataclasses import dataclass
from typing import ClassVar

from qbench.algorithms.base import Algorithm, Kind
from qbench.calib.block import Block
from qbench.errors import Unsuitable
from qbench.quant.scheme import Scheme


@dataclass(frozen=True)
class FloatingPoint(Algorithm):
    """Leave the model alone. Its jobs have the scheme w16a16, whatever bits were asked for."""

    kind: ClassVar[Kind] = "round"
    needs_data: ClassVar[bool] = False

    def check(self, scheme: Scheme) -> None:
        if not scheme.is_float:
            raise Unsuitable("algo=fp quantizes nothing", f"the scheme is {scheme}; use algo=rtn")

    def process(self, block: Block) -> None:
        """Nothing to do."""
