"""Round to nearest: the baseline every other algorithm must beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.algorithms.base import Algorithm, Kind
from qbench.calib.block import Block
from qbench.quant.mixed import quantize_mixed


@torch.no_grad()
def nearest(block: Block, name: str) -> Tensor:
    """A layer's weight, `(out, in)`, on the nearest points of the grid chosen for it; what is kept is left as it is.

    Without a chosen grid it is the min-max grid of what is not kept.
    """
    weight, spec = block.linear(name).weight, block.weight_spec(name)
    if spec is None:
        return weight
    kept, grid, bits = block.kept.get(name), block.grids.get(name), block.group_bits.get(name)
    if kept is None:
        return quantize_mixed(weight, spec, bits, grid)
    return torch.where(kept, weight, quantize_mixed(weight.masked_fill(kept, 0.0), spec, bits, grid))


@dataclass(frozen=True)
class RTN(Algorithm):
    """Snap each weight to the nearest point of its group's grid: min-max, or as a clipping step chose it."""

    kind: ClassVar[Kind] = "round"
    needs_data: ClassVar[bool] = False
    uses_bits: ClassVar[bool] = True

    @torch.no_grad()
    def process(self, block: Block) -> None:
        for name, linear in block.linears.items():
            linear.weight.copy_(nearest(block, name))
