"""Round to nearest: the baseline every other algorithm must beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.algorithms.base import Algorithm, Kind
from qbench.calib.block import Block
from qbench.quant.grid import QParams
from qbench.quant.mixed import choose_mixed, quantize_mixed


@torch.no_grad()
def nearest(block: Block, name: str) -> tuple[Tensor, QParams | None]:
    """A layer's weight, `(out, in)`, on the nearest points of the grid chosen for it, with that grid.

    What is kept is left as it is. Without a chosen grid it is the min-max grid of what is not kept; there is none where
    the scheme leaves the weight in floating point.
    """
    weight, spec = block.linear(name).weight, block.weight_spec(name)
    if spec is None:
        return weight, None
    kept, bits = block.kept.get(name), block.group_bits.get(name)
    free = weight if kept is None else weight.masked_fill(kept, 0.0)
    grid = block.grids.get(name) or choose_mixed(free, spec, bits)
    rounded = quantize_mixed(free, spec, bits, grid)
    return rounded if kept is None else torch.where(kept, weight, rounded), grid


@torch.no_grad()
def round_to_nearest(block: Block, name: str) -> None:
    """Edit a layer's weight in place, as `nearest` has it, and note the grid."""
    rounded, grid = nearest(block, name)
    if grid is not None:
        block.linear(name).weight.copy_(rounded)
        block.grids[name] = grid


@dataclass(frozen=True)
class RTN(Algorithm):
    """Snap each weight to the nearest point of its group's grid: min-max, or as a clipping step chose it."""

    kind: ClassVar[Kind] = "round"
    needs_data: ClassVar[bool] = False
    uses_bits: ClassVar[bool] = True

    @torch.no_grad()
    def process(self, block: Block) -> None:
        for name in block.linears:
            round_to_nearest(block, name)
