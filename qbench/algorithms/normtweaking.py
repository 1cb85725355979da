"""Norm tweaking: train the norms of a quantized block until its output is distributed as before.

Li et al., "Norm Tweaking: High-performance Low-bit Quantization of Large Language Models", AAAI 2024,
arXiv:2309.02784, Algorithm 1, its channel-wise loss (Equation 2) and its learning rates (Equation 3).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from qbench.algorithms.base import Algorithm, Kind
from qbench.algorithms.learn import adam, fit, squared_error, steps_of
from qbench.calib.block import Block
from qbench.quant.grid import wide


@dataclass(frozen=True)
class NormTweaking(Algorithm):
    """Train gains and biases of norms; weights stay on their grids.

    In half precision small steps may move no gain, which is an error; how many moved is in the report.

    The target is the floating-point block on the floating-point path. The paper feeds it the quantized path's input,
    but here the weights are rounded already.

    Attributes:
        lr: Learning rate of the first block; deeper blocks have `lr · (1 + scale · block / blocks)`.
        scale: By how much that of the last block is larger, as a fraction.
        epochs: Times each sample is met; more than one hurts, says the paper.
        batch_size: Samples for each step, which share their channels' mean and variance.
        loss: `"distribution"`: how far mean and variance of each channel are from what they were, the paper's.
            `"mse"`: the mean squared error, as in LLMC.
    """

    lr: float = 1e-4
    scale: float = 1.0
    epochs: int = 1
    batch_size: int = 1
    loss: Literal["distribution", "mse"] = "distribution"
    seed: int = 0

    kind: ClassVar[Kind] = "tune"
    needs_float_path: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(
                f"norm tweaking has epochs={self.epochs} and batch_size={self.batch_size}; both must be at least 1"
            )
        if self.loss not in LOSSES:
            raise ValueError(f"norm tweaking has loss={self.loss!r}; choose {' or '.join(map(repr, LOSSES))}")

    @torch.no_grad()
    def process(self, block: Block) -> None:
        if not (norms := norm_parameters(block)):
            raise NotImplementedError(
                "norm tweaking found no gains in the blocks of this model (OLMo has none)"
            )
        trained = {name: wide(p).clone() for name, p in norms.items()}
        assert block.inputs is not None
        assert block.float_outputs is not None
        start = {name: p.clone() for name, p in trained.items()}
        fit(
            block, "normtweaking", lambda: {name: p.to(norms[name].dtype) for name, p in trained.items()},
            adam((list(trained.values()), self.lr * (1 + self.scale * block.index / block.n_blocks))),
            inputs=block.inputs, targets=block.float_outputs, loss=LOSSES[self.loss],
            steps=steps_of(self.epochs, block.inputs, self.batch_size),
            batch_size=self.batch_size, seed=self.seed,
        )  # fmt: skip
        learned = any(not torch.equal(p, start[name]) for name, p in trained.items())
        moved = 0
        for name, p in norms.items():
            before = p.clone()
            p.copy_(trained[name])
            moved += int((p != before).sum())
        if learned and not moved:
            raise FloatingPointError(
                f"block {block.index}: norm tweaking moved no gain, its steps are below what "
                f"{next(iter(norms.values())).dtype} tells apart; use model.dtype=float32, or a larger lr"
            )
        block.report["normtweaking_moved"] = moved / sum(p.numel() for p in norms.values())


def norm_parameters(block: Block) -> dict[str, Tensor]:
    """Gains and biases, by name, of whatever in the block is no linear layer and has parameters of its own."""
    return {
        f"{name}.{key}": p
        for name, module in block.layer.named_modules()
        if not isinstance(module, nn.Linear)
        for key, p in module.named_parameters(recurse=False)
    }


def distribution_distance(y: Tensor, target: Tensor) -> Tensor:
    """How far mean and variance over tokens are from the target's, summed, and averaged over channels."""
    (y_var, y_mean), (t_var, t_mean) = (torch.var_mean(wide(x).flatten(0, -2), dim=0) for x in (y, target))
    return ((y_mean - t_mean).abs() + (y_var - t_var).abs()).mean()


LOSSES = {"distribution": distribution_distance, "mse": squared_error}
