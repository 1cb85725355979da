"""DGQ's two searches, one row and one group at a time, on the inputs themselves."""

import torch
from torch import Tensor

from .gptq import snap


def scales(w: Tensor, x: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The unit of each row, `(out,)`, and the integers and zero-points of its groups, `(out, n_groups)`."""
    top, n_groups = 2**bits - 1, w.shape[1] // size
    units = torch.zeros(len(w), dtype=w.dtype)
    multiples = torch.zeros(len(w), n_groups, dtype=w.dtype)
    zeros = torch.zeros_like(multiples)
    for row in range(len(w)):
        wished = []
        for g in range(n_groups):
            part, inputs = w[row, g * size : (g + 1) * size], x[:, g * size : (g + 1) * size]
            low, high = float(part.min().clamp(max=0)), float(part.max().clamp(min=0))
            tried = []
            for i in range(1, 21):
                ratio = min(1.02 - i / 20 * 0.22, 1.0)
                scale = (high * ratio - low * ratio) / top
                zero = torch.tensor(float(round(-low * ratio / scale)), dtype=w.dtype)
                error = (inputs @ (snap(part, scale, zero, bits) - part)).square().sum().item()
                tried.append((error, scale, zero))
            _, scale, zeros[row, g] = min(tried, key=lambda t: t[0])
            wished.append(scale)
        tried = []
        for i in range(1, 81):
            unit = float(w[row].abs().max()) / 127 * (1.02 - i / 80 * 0.82)
            chosen, rounded = [], []
            for g, scale in enumerate(wished):
                zero = zeros[row, g]
                fits = [m for m in range(1, 128) if m * max(float(zero), top - float(zero)) <= 127]
                m = min(max(round(scale / unit), 1), max(fits))
                chosen.append(m)
                rounded.append(snap(w[row, g * size : (g + 1) * size], unit * m, zero, bits))
            error = (x @ (torch.cat(rounded) - w[row])).square().sum().item()
            tried.append((error, unit, chosen))
        _, units[row], best = min(tried, key=lambda t: t[0])
        multiples[row] = torch.tensor(best)
    return units, multiples, zeros
