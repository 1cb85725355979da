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
    w: Tensor,
    x: Tensor,
    bits: int,
    size: int,
    damp: float,
    act_order: bool,
    static_groups: bool,
    kept: Tensor | None = None,
) -> Tensor:
    """Round `w`, `(out, in)`, on inputs `x`, `(tokens, in)`, in float64, column by column.

    What is `kept` is not rounded and has no part in any range; columns that are kept whole come last.
    """
    n = w.shape[1]
    kept = torch.zeros_like(w, dtype=torch.bool) if kept is None else kept
    hessian = 2 * x.T @ x / len(x)
    hessian += damp * hessian.diagonal().mean() * torch.eye(n, dtype=x.dtype)
    order = list(range(n))
    if act_order:
        order.sort(key=lambda j: -float(hessian[j, j]))
    order.sort(key=lambda j: bool(kept[:, j].all()))
    w, q = w.clone(), torch.zeros_like(w)
    scale, zero = grid(w.masked_fill(kept, 0), bits, size)
    begun = set()
    for i, j in enumerate(order):
        left, g = order[i:], j // size
        if not static_groups and g not in begun:
            begun.add(g)
            own = w[:, g * size : (g + 1) * size].masked_fill(kept[:, g * size : (g + 1) * size], 0)
            scale[:, g], zero[:, g] = (p[:, 0] for p in grid(own, bits, size))
        q[:, j] = torch.where(kept[:, j], w[:, j], snap(w[:, j], scale[:, g], zero[:, g], bits))
        inverse = torch.linalg.inv(hessian[left][:, left])
        # Equation 2: spread the error of this column over those that are left.
        w[:, left] -= torch.outer((w[:, j] - q[:, j]) / inverse[0, 0], inverse[0])
    return q
