"""The Cayley step as its papers write it, its implicit equation solved by repetition."""

import torch
from torch import Tensor


def cayley(r: Tensor, gradient: Tensor, lr: float, repetitions: int = 200) -> Tensor:
    """Descend: W = Ĝᵀ − Ĝ with Ĝ = G Rᵀ − ½ R Rᵀ G Rᵀ, and X = R + α/2 W (R + X)."""
    projected = gradient @ r.T - 0.5 * r @ r.T @ gradient @ r.T
    w = projected.T - projected
    alpha = min(lr, 1.0 / float(torch.linalg.matrix_norm(w, ord=1)))
    x = r
    for _ in range(repetitions):
        x = r + alpha / 2 * w @ (r + x)
    return x
