"""ZeroQuant's layer-by-layer knowledge distillation: train each block's rounded weights to do what the block did.

Yao et al., "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers",
NeurIPS 2022, arXiv:2206.01861, the section on LKD: the mean squared error between what a block and its quantized self
make of the floating-point model's hidden states; gradients pass straight through rounding.

The rest of ZeroQuant is a scheme: weights in groups, activations by token, all round to nearest.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.algorithms.base import Algorithm, Kind
from qbench.algorithms.learn import adam, falling, fit
from qbench.calib.block import Block
from qbench.quant.grid import QParams, choose_qparams, fake_quantize, wide
from qbench.quant.scheme import Scheme


@dataclass(frozen=True)
class LKD(Algorithm):
    """Distil a block into its rounded weights, one block at a time.

    Each block is trained on the hidden states of the floating-point model, so that blocks do not see one another's
    errors. Grids follow the weights, unless a step has chosen them.

    Attributes:
        steps, batch_size: Of the optimizer, and samples for each.
        lr: Adam's first learning rate, which falls linearly to zero; 5e-6 in the authors' example for BERT, which moves
            few weights to another grid point.
    """

    steps: int = 100
    batch_size: int = 4
    lr: float = 1e-4
    seed: int = 0

    kind: ClassVar[Kind] = "round"
    revision: ClassVar[int] = 2
    needs_float_path: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.lr <= 0:
            raise ValueError(
                f"LKD has steps={self.steps}, batch_size={self.batch_size}, lr={self.lr}; all must be positive"
            )

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)

    @torch.no_grad()
    def process(self, block: Block) -> None:
        trained = {n: wide(k.weight).clone() for n, k in block.linears.items() if block.weight_spec(n)}
        if not trained:
            return
        assert block.float_inputs is not None
        assert block.float_outputs is not None

        def weights() -> dict[str, Tensor]:
            return {f"{name}.weight": _rounded(block, name, w)[0] for name, w in trained.items()}

        fit(
            block, "lkd", weights, adam(([*trained.values()], self.lr)),
            inputs=block.float_inputs, targets=block.float_outputs,
            steps=self.steps, batch_size=self.batch_size, seed=self.seed, schedule=falling(self.steps),
        )  # fmt: skip
        for name, w in trained.items():
            rounded, block.grids[name] = _rounded(block, name, w)
            block.linear(name).weight.copy_(rounded)


def _rounded(block: Block, name: str, w: Tensor) -> tuple[Tensor, QParams]:
    """`w` on the grid of a layer, in the layer's dtype, and that grid; what is kept is the layer's own."""
    spec, kept, own = block.weight_spec(name), block.kept.get(name), block.linear(name).weight
    assert spec is not None
    w = w if kept is None else w.masked_fill(kept, 0.0)
    grid = block.grids.get(name) or choose_qparams(w.detach(), spec)
    rounded = fake_quantize(w, spec, grid).to(own.dtype)
    return (rounded if kept is None else torch.where(kept, own, rounded)), grid
