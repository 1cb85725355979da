"""Random orthogonal bases whose product is fast: QuIP (Chee et al., NeurIPS 2023, arXiv:2307.13304, section 4.1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qbench.quant.hadamard import kronecker_factors, random_orthogonal


@dataclass(frozen=True)
class Basis:
    """A random orthogonal matrix (F₁ ⊗ F₂) P: two small factors behind a permutation; made from a seed.

    Attributes:
        factors: `(n₁, n₁)` and `(n₂, n₂)`.
        order: The permutation, `(n₁ n₂,)`.
    """

    factors: tuple[Tensor, Tensor]
    order: Tensor

    @classmethod
    def random(cls, n: int, generator: torch.Generator) -> "Basis":
        first, second = (random_orthogonal(size, generator) for size in kronecker_factors(n))
        return cls((first, second), torch.randperm(n, generator=generator))

    def enter(self, x: Tensor) -> Tensor:
        """The last axis of `x` in this basis, `x Vᵀ`."""
        first, second = (f.to(x) for f in self.factors)
        x = x[..., self.order.to(x.device)].unflatten(-1, (len(first), len(second)))
        return (first @ x @ second.mT).flatten(-2)

    def leave(self, x: Tensor) -> Tensor:
        """Back again, `x V`."""
        first, second = (f.to(x) for f in self.factors)
        x = (first.mT @ x.unflatten(-1, (len(first), len(second))) @ second).flatten(-2)
        return x[..., torch.argsort(self.order).to(x.device)]
