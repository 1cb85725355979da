"""Round to nearest: the baseline every other algorithm must beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.algorithms.base import Algorithm, Kind
from qbench.calib.block import Block
from qbench.quant.grid import fake_quantize


@torch.no_grad()
def nearest(block: Block, name: str) -> Tensor:
    """A layer's weight, `(out, in)`, on the nearest points of the grid chosen for it; what is kept is left as it is.

    Without a chosen grid it is the min-max grid of what is not kept.
    """
    weight, spec = block.linear(name).weight, block.weight_spec(name)
    if spec is None:
        return weight
    kept, grid = block.kept.get(name), block.grids.get(name)
    if kept is None:
        return fake_quantize(weight, spec, grid)
    return torch.where(kept, weight, fake_quantize(weight.masked_fill(kept, 0.0), spec, grid))


@dataclass(frozen=True)
class RTN(Algorithm):
    """Snap each weight to the nearest point of its group's grid: min-max, or as a clipping step chose it."""

    kind: ClassVar[Kind] = "round"
    needs_data: ClassVar[bool] = False

    @torch.no_grad()
    def process(self, block: Block) -> None:
        for name, linear in block.linears.items():
            linear.weight.copy_(nearest(block, name))
