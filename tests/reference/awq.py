"""AWQ by brute force: run every candidate on the inputs and keep the one with the smallest error."""

import torch
from torch import Tensor

from .gptq import grid, snap


def best_scale(w: Tensor, x: Tensor, bits: int, size: int, n_grid: int) -> Tensor:
    magnitude, best = x.abs().mean(0), (float("inf"), torch.ones(x.shape[1], dtype=x.dtype))
    for i in range(n_grid):
        s = (magnitude ** (i / n_grid)).clamp(min=1e-4)
        s = s / (s.max() * s.min()) ** 0.5
        ws = w * s
        scale, zero = (p.repeat_interleave(size, 1) for p in grid(ws, bits, size))
        error = (x @ w.T - (x / s) @ snap(ws, scale, zero, bits).T).square().sum().item()
        best = min(best, (error, s), key=lambda pair: pair[0])
    return best[1]


def best_clip(w: Tensor, x: Tensor, bits: int, size: int, n_grid: int, max_shrink: float) -> Tensor:
    """Each row and group by itself: the clamped weights whose share of the output is nearest."""
    result = w.clone()
    for row in range(w.shape[0]):
        for start in range(0, w.shape[1], size):
            part, inputs = w[row : row + 1, start : start + size], x[:, start : start + size]
            low, high = part.min().clamp(max=0), part.max().clamp(min=0)
            tried = []
            for i in range(int(max_shrink * n_grid)):
                keep = 1 - i / n_grid
                scale = (high - low) * keep / (2**bits - 1)
                zero = (-low * keep / scale).round()
                clamped = part.clamp(low * keep, high * keep)
                error = (inputs @ (snap(clamped, scale, zero, bits) - part).T).square().sum().item()
                tried.append((error, clamped))
            result[row, start : start + size] = min(tried, key=lambda pair: pair[0])[1]
    return result
