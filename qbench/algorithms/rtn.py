"""Round to nearest: the baseline every other algorithm must beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from qbench.algorithms.base import Algorithm, Kind
from qbench.calib.stream import Block
from qbench.quant.affine import fake_quantize
from qbench.quant.scheme import Scheme


@dataclass(frozen=True)
class RTN(Algorithm):
    """Snap each weight to the nearest point of its group's min–max grid."""

    kind: ClassVar[Kind] = "round"
    needs_data: ClassVar[bool] = False

    @torch.no_grad()
    def process(self, block: Block, scheme: Scheme) -> None:
        if scheme.weight is None:
            return
        for linear in block.linears.values():
            linear.weight.copy_(fake_quantize(linear.weight, scheme.weight))
