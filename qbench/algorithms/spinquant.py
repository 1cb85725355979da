"""SpinQuant: learn the rotations, so that the quantized model predicts the calibration data best.

Liu et al., "SpinQuant: LLM Quantization with Learned Rotations", ICLR 2025, arXiv:2405.16406: R1 of the residual stream
and R2 of every block's values, by Cayley SGD on the Stiefel manifold (section 3.2; Li et al., "Efficient Riemannian
Optimization on the Stiefel Manifold via the Cayley Transform", ICLR 2020, arXiv:2002.01113). R4, before the MLP's last
layer, is a Hadamard matrix at inference; R3, of queries and keys, is the scheme's `kv_rotate`.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qbench.algorithms.base import Algorithm, Kind
from qbench.algorithms.learn import TREMBLE
from qbench.algorithms.quarot import random_rotation
from qbench.calib.block import Block
from qbench.errors import Unsuitable
from qbench.models.family import expanded, family_of
from qbench.models.learned_rotation import rotated
from qbench.models.rotate import check_rotatable, fold_norms, rotate_online, rotate_residual, rotate_values
from qbench.quant.scheme import Scheme


@dataclass(frozen=True)
class SpinQuant(Algorithm):
    """Rotations that are learned from random Hadamard ones, with activations quantized meanwhile.

    Attributes:
        lr: Learning rate of the first update; it falls linearly to zero.
        steps: Updates of all rotations, on `batch_size` samples each.
        batch_size: Samples of one update.
        quantize_weights: Round weights to nearest meanwhile, too. The paper does not where GPTQ follows.
        online: Rotate the input of the MLP's last layer at inference (R4).
        seed: Of the random start and of the samples' order.
    """

    lr: float = 1.5
    steps: int = 100
    batch_size: int = 8
    quantize_weights: bool = False
    online: bool = True
    seed: int = 0

    kind: ClassVar[Kind] = "transform"
    runs_model: ClassVar[bool] = True
    folds_norms: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.steps < 1 or self.batch_size < 1:
            raise ValueError(
                f"SpinQuant's lr is {self.lr}, steps {self.steps} and batch_size {self.batch_size}; "
                "all must be positive"
            )

    def check(self, scheme: Scheme) -> None:
        cache = scheme.kv is not None and scheme.kv.dynamic
        if not (scheme.activations or cache or (self.quantize_weights and scheme.weights)):
            raise Unsuitable(
                "SpinQuant learns from what quantization does to the model's predictions",
                f"with {scheme} nothing is quantized while it learns; set abits or kvbits, or quantize_weights=true",
            )

    @property
    def beside(self) -> str:
        return "Hadamard matrices that inputs are multiplied by" if self.online else ""

    def check_model(self, skeleton: Any) -> None:
        check_rotatable(skeleton)

    def prepare(self, model: Any, scheme: Scheme, tokens: Tensor | None) -> dict[str, Any]:
        """Learn the rotations and rotate the whole model; reports the loss before and after, in nats per token.

        Raises:
            NotImplementedError: If the residual stream cannot be rotated.
            FloatingPointError: If the loss is not finite, or has grown.
        """
        assert tokens is not None, "the engine sees to it that there are tokens"
        family, tokens = family_of(model), tokens.to(model.device)
        blocks = model.get_submodule(family.blocks)
        fold_norms(model)
        for block in blocks if self.online else ():
            for name in expanded(family.mlp_out, (name for name, _ in block.named_modules())):
                rotate_online(block.get_submodule(name))
        generator = torch.Generator().manual_seed(self.seed)
        if family.heads is None or family.value is None:
            raise NotImplementedError(
                "SpinQuant rotates the values of attention, which this model does not have or clips; use algo=quarot"
            )
        sizes = [model.config.hidden_size] + [family.heads.value_size] * len(blocks)
        starts = [random_rotation(n, "hadamard", generator) for n in sizes]
        rotations = [r.to(model.device).requires_grad_() for r, _ in starts]
        residual, *values = rotations
        with rotated(model, scheme, residual, values, self.quantize_weights):
            losses = self._learn(model, tokens, rotations, generator)
        rotate_residual(model, residual)
        for block, r in zip(blocks, values, strict=True):
            rotate_values(block, family, r)
        return {"spinquant": {"loss": losses, "residual": starts[0][1], "heads": starts[1][1]}}

    def process(self, block: Block) -> None:
        """Nothing is left to do."""

    def _learn(
        self, model: Any, tokens: Tensor, rotations: list[Tensor], generator: torch.Generator
    ) -> list[float]:
        """Improve `rotations` in place; the loss over all samples before and after."""
        before, queue = self._mean_loss(model, tokens), list[Tensor]()
        for step in range(self.steps):
            if not queue:
                queue = list(torch.randperm(len(tokens), generator=generator).split(self.batch_size))
            with torch.enable_grad():
                loss = next_token_loss(model, tokens[queue.pop().to(tokens.device)])
                gradients = torch.autograd.grad(loss, rotations)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(
                    f"SpinQuant met a loss of {loss.item()} in step {step + 1}; lower its lr"
                )
            with torch.no_grad():
                for r, gradient in zip(rotations, gradients, strict=True):
                    r.copy_(cayley_step(r, gradient, self.lr * (1 - step / self.steps)))
        after = self._mean_loss(model, tokens)
        if not after <= before * (1 + TREMBLE):
            raise FloatingPointError(
                f"SpinQuant's loss grew in {self.steps} steps, from {before:.4g} to {after:.4g}; lower its lr, or "
                "calibrate with more tokens"
            )
        return [before, after]

    @torch.no_grad()
    def _mean_loss(self, model: Any, tokens: Tensor) -> float:
        batches = tokens.split(self.batch_size)
        return sum(float(next_token_loss(model, batch)) * len(batch) for batch in batches) / len(tokens)


def next_token_loss(model: Any, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats; `tokens` is `(batch, seq_len)`."""
    logits = model(tokens, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def cayley_step(r: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """One descent step that stays orthogonal; all matrices are `(n, n)`, in float64.

    R′ = (I + α/2 Y)⁻¹ (I − α/2 Y) R with Y = Ĝ − Ĝᵀ and Ĝ = G Rᵀ − ½ R Rᵀ G Rᵀ, which is ½ G Rᵀ for a square R. The
    step is at most 1 / ‖Y‖₁ (Li et al., Algorithm 1). Its fixed-point iteration gives way to the exact solution.
    """
    half = 0.5 * gradient @ r.mT
    y = half - half.mT
    alpha = min(lr, 1.0 / max(float(y.abs().sum(0).max()), torch.finfo(y.dtype).tiny))
    one = torch.eye(len(r), dtype=r.dtype, device=r.device)
    return torch.linalg.solve(one + alpha / 2 * y, (one - alpha / 2 * y) @ r)
