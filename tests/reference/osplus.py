"""Outlier Suppression+'s threshold search, every candidate run as it stands."""

import torch
from torch import Tensor


def rounded(x: Tensor, bits: int) -> Tensor:
    """Each row on a symmetric grid of its own."""
    scale = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (x / scale).round() * scale


def best_scale(w: Tensor, x: Tensor, wbits: int, abits: int, n_grid: int, least: float) -> Tensor:
    """Scales for a layer with weight `(out, in)` and inputs `(tokens, in)`, both on symmetric grids by row."""
    high, low = x.amax(0), x.amin(0)
    top = float(x.abs().max())
    step = (top - least) / max(n_grid, int(top / 0.5))
    best, threshold = (float("inf"), torch.ones(x.shape[1], dtype=x.dtype)), top
    while threshold >= least - 1e-9:
        one = torch.ones_like(high)
        s = torch.maximum(
            torch.where(high > threshold, high / threshold, one),
            torch.where(low < -threshold, low / -threshold, one),
        )
        error = (rounded(x / s, abits) @ rounded(w * s, wbits).T - x @ w.T).square().sum(-1).mean().item()
        best = min(best, (error, s), key=lambda pair: pair[0])
        threshold -= step
    return best[1]
