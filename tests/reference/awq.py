"""AWQ by brute force: run every candidate on the inputs and keep the one with the smallest error."""

import torch
from torch import Tensor

from .gptq import grid, snap


def best_scale(
    w: Tensor,
    x: Tensor,
    bits: int,
    size: int,
    n_grid: int,
    duo: bool = False,
    magnitude: Tensor | None = None,
) -> Tensor:
    magnitude = x.abs().mean(0) if magnitude is None else magnitude
    best = (float("inf"), torch.ones(x.shape[1], dtype=x.dtype))
    groups = w.abs().unflatten(1, (-1, size))
    share = (groups / groups.amax(-1, keepdim=True)).flatten(1).mean(0)
    for i in range(n_grid):
        r = i / n_grid
        s = magnitude**r / (share ** (1 - r) + 1e-4) if duo else magnitude**r
        s = s.clamp(min=1e-4)
        s = s / (s.max() * s.min()) ** 0.5
        ws = w * s
        scale, zero = (p.repeat_interleave(size, 1) for p in grid(ws, bits, size))
        error = (x @ w.T - (x / s) @ snap(ws, scale, zero, bits).T).square().sum().item()
        best = min(best, (error, s), key=lambda pair: pair[0])
    return best[1]


def best_clip(
    w: Tensor, x: Tensor, bits: int, size: int, n_grid: int, max_shrink: float, ends: str = "together"
) -> Tensor:
    """Each row and group by itself, rounded on the grid whose share of the output is nearest."""
    result = w.clone()
    kept = [1 - i / n_grid for i in range(int(max_shrink * n_grid))]
    for row in range(w.shape[0]):
        for start in range(0, w.shape[1], size):
            part, inputs = w[row : row + 1, start : start + size], x[:, start : start + size]
            low, high = float(part.min().clamp(max=0)), float(part.max().clamp(min=0))
            most = max(-low, high)
            tried = []
            for bottom, top in {
                "together": [(low * k, high * k) for k in kept],
                "apart": [(low * a, high * b) for a in kept for b in kept],
                "magnitude": [(max(low, -most * k), min(high, most * k)) for k in kept],
            }[ends]:
                scale = (top - bottom) / (2**bits - 1)
                zero = torch.tensor(round(-bottom / scale))
                rounded = snap(part, scale, zero, bits)
                error = (inputs @ (rounded - part).T).square().sum().item()
                tried.append((error, rounded))
            result[row, start : start + size] = min(tried, key=lambda pair: pair[0])[1]
    return result
