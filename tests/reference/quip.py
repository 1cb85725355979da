"""QuIP with dense matrices, line by line as in the paper: Algorithms 1 to 3, without greedy updates."""

import torch
from torch import Tensor


def dense(first: Tensor, second: Tensor, order: Tensor) -> Tensor:
    """(F₁ ⊗ F₂) P, with P x = x[order]."""
    permutation = torch.zeros(len(order), len(order), dtype=first.dtype)
    for row, column in enumerate(order.tolist()):
        permutation[row, column] = 1.0
    return torch.kron(first, second) @ permutation


def upper_ldl(h: Tensor) -> Tensor:
    """The strictly upper factor in H = (L + I) D (L + I)ᵀ, column by column from the last one."""
    n, left = len(h), h.clone()
    factor = torch.zeros_like(h)
    for k in reversed(range(n)):
        column = left[:, k] / left[k, k]
        factor[:k, k] = column[:k]
        left -= left[k, k] * torch.outer(column, column)
    return factor


def ldlq(w: Tensor, h: Tensor, bits: int) -> Tensor:
    """Codes of `w`, which lies between 0 and 2^b − 1: each column takes over the errors of those before."""
    feedback, q = upper_ldl(h), torch.zeros_like(w)
    for k in range(w.shape[1]):
        target = w[:, k] + (w[:, :k] - q[:, :k]) @ feedback[:k, k]
        q[:, k] = target.round().clamp(0, 2**bits - 1)
    return q


def quip(
    w: Tensor, h: Tensor, u: Tensor, v: Tensor, bits: int, rho: float, damp: float, per_row: bool
) -> Tensor:
    """Round `w`, `(out, in)`, with one scale for the whole matrix, or one for each of its rotated rows."""
    d = torch.diag((h.diagonal() / (w.T @ w).diagonal()) ** 0.25)
    h = torch.linalg.inv(d) @ h @ torch.linalg.inv(d)
    w, h = u @ w @ d @ v.T, v @ h @ v.T
    h = h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    s = rho * (w.square().mean(1, keepdim=True) if per_row else w.square().mean()).sqrt()
    top = 2**bits - 1
    codes = ldlq(((w / s + 1) / 2 * top).clamp(0, top), h, bits)
    return u.T @ (s * (codes / top * 2 - 1)) @ v @ torch.linalg.inv(d)
