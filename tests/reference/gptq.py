"""GPTQ's Algorithm 1 without its speed-ups: the inverse Hessian is made anew for every column."""

import torch
from torch import Tensor


def grid(w: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor]:
    """Asymmetric scale and zero of each row and group, `(out, n_groups)`; the range contains zero."""
    g = w.unflatten(1, (-1, size))
    low, high = g.amin(-1).clamp(max=0), g.amax(-1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    return scale, (-low / scale).round()


def snap(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return scale * (((x / scale).round() + zero).clamp(0, 2**bits - 1) - zero)


def gptq(
    w: Tensor, x: Tensor, bits: int, size: int, damp: float, act_order: bool, static_groups: bool
) -> Tensor:
    """Round `w`, `(out, in)`, on inputs `x`, `(tokens, in)`, in float64, column by column."""
    n = w.shape[1]
    hessian = 2 * x.T @ x / len(x)
    hessian += damp * hessian.diagonal().mean() * torch.eye(n, dtype=x.dtype)
    order = list(range(n))
    if act_order:
        order.sort(key=lambda j: -float(hessian[j, j]))
    w, q = w.clone(), torch.zeros_like(w)
    scale, zero = grid(w, bits, size)
    for i, j in enumerate(order):
        left = order[i:]
        if not static_groups and j % size == 0:
            scale, zero = (
                torch.cat((old[:, : j // size], new), 1)
                for old, new in zip((scale, zero), grid(w[:, j:], bits, size), strict=True)
            )
        q[:, j] = snap(w[:, j], scale[:, j // size], zero[:, j // size], bits)
        inverse = torch.linalg.inv(hessian[left][:, left])
        # Equation 2: spread the error of this column over those that are left.
        w[:, left] -= torch.outer((w[:, j] - q[:, j]) / inverse[0, 0], inverse[0])
    return q
