"""EasyQuant's descent, one row at a time: Adam by its formula, and the gradient of the paper's Equation 2."""

import torch
from torch import Tensor


def outliers(w: Tensor, n_sigma: float) -> Tensor:
    mean, count = float(w.sum()) / w.numel(), w.numel()
    deviation = (float(((w - mean) ** 2).sum()) / (count - 1)) ** 0.5
    return torch.tensor([[abs(float(v) - mean) >= n_sigma * deviation for v in row] for row in w])


def rounded(row: Tensor, s: float, bits: int) -> Tensor:
    return s * (row / s).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def best_scale(row: Tensor, bits: int, lr: float, steps: int) -> float:
    """The scale of the symmetric grid with the least error that Adam meets, from max|w| on; `lr` is relative to it."""
    first = float(row.abs().max()) / (2 ** (bits - 1) - 1)
    s, m, v, met = first, 0.0, 0.0, []
    for t in range(1, steps + 2):
        q = rounded(row, s, bits)
        met.append((float(((q - row) ** 2).sum()), t, s))
        gradient = float(2 * ((q - row) * (q / s)).sum()) / first  # in a unit in which Adam's ε is small
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        s -= lr * first * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)) ** 0.5 + 1e-8)
        s = min(max(s, 0.01 * first), first)
    return min(met)[2]
