"""HQQ as its formulae stand: one group at a time, quantize, dequantize, shrink, mean."""

import torch
from torch import Tensor

from .gptq import grid


def zeros(
    w: Tensor, bits: int, size: int, p: float, beta: float, kappa: float, steps: int
) -> tuple[Tensor, list[float]]:
    """The zero-points that were best, `(out, n_groups)`, and the mean error before each step."""
    scale, _ = grid(w, bits, size)
    zero = -w.unflatten(1, (-1, size)).amin(-1).clamp(max=0) / scale
    best, errors = zero, []
    for _ in range(steps):
        updated, total = zero.clone(), 0.0
        for row in range(zero.shape[0]):
            for group in range(zero.shape[1]):
                part = w[row, group * size : (group + 1) * size]
                s, z = scale[row, group], zero[row, group]
                q = torch.round(part / s + z).clamp(0, 2**bits - 1)
                error = part - s * (q - z)
                total += error.abs().sum().item()
                shrunk = torch.tensor(
                    [
                        0.0 if e == 0 else (1 if e > 0 else -1) * max(abs(e) - abs(e) ** (p - 1) / beta, 0.0)
                        for e in error.tolist()
                    ],
                    dtype=w.dtype,
                )
                updated[row, group] = (q - (part - shrunk) / s).mean()
        errors.append(total / w.numel())
        if len(errors) > 1 and errors[-1] >= min(errors[:-1]):
            break
        best, zero = zero, updated
        beta *= kappa
    return best, errors
