"""SliM-LLM in loops: every allocation is tried as a whole, every τ for one row at a time."""

import torch
from torch import Tensor

from .gptq import grid, snap


def inverse_hessian(x: Tensor, damp: float) -> Tensor:
    hessian = 2 * x.T @ x / len(x)
    hessian += damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=x.dtype)
    return torch.linalg.inv(hessian)


def salience(w: Tensor, x: Tensor, damp: float) -> Tensor:
    spread = torch.linalg.cholesky(inverse_hessian(x, damp), upper=True).diagonal()
    return w**2 / spread**2


def nearest(part: Tensor, bits: int) -> Tensor:
    """One group, `(out, size)`, round to nearest; one bit is the sign of the distance from the mean."""
    if bits == 1:
        mean = part.mean(1, keepdim=True)
        return mean + (part - mean).sign() * (part - mean).abs().mean(1, keepdim=True)
    scale, zero = grid(part, bits, part.shape[1])
    return snap(part, scale, zero, bits)


def allocation(w: Tensor, x: Tensor, bits: int, size: int, damp: float) -> list[int]:
    """The bits of each group with which the softmax of the output diverges least from what it was."""
    n_groups = w.shape[1] // size
    weights = salience(w, x, damp).sum(0)
    order = sorted(range(n_groups), key=lambda g: float(weights[g * size : (g + 1) * size].sum()))
    log_target, tried = (x @ w.T).log_softmax(1), []
    for p in range(n_groups // 2 + 1):
        widths = [bits] * n_groups
        for g in order[:p]:
            widths[g] = bits - 1
        for g in order[n_groups - p :]:
            widths[g] = bits + 1
        parts = [nearest(part, b) for part, b in zip(w.split(size, 1), widths, strict=True)]
        log_p = (x @ torch.cat(parts, 1).T).log_softmax(1)
        tried.append((float((log_p.exp() * (log_p - log_target)).sum(1).mean()), widths))
    return min(tried, key=lambda pair: pair[0])[1]


def best_grid(
    part: Tensor,
    salience: Tensor,
    bits: int,
    salient_weight: float,
    threshold: float,
    reach: float,
    n_tau: int,
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of each row of one group, `(out,)` each."""
    cut = salience.mean() + threshold * salience.std()
    scale, zero = (p[:, 0] for p in grid(part, bits, part.shape[1]))
    best = scale.clone()
    for row in range(len(part)):
        least = float("inf")
        for step in (0, *range(1, n_tau + 1), *range(-1, -n_tau - 1, -1)):
            tried = scale[row] * (1 + reach * step / n_tau)
            error = (snap(part[row], tried, zero[row], bits) - part[row]).abs() ** 2.4
            total = float(torch.where(salience[row] > cut, error * salient_weight, error).sum())
            if total < least:
                least, best[row] = total, tried
    return best, zero


def rounded(
    w: Tensor,
    x: Tensor,
    widths: list[int],
    size: int,
    damp: float,
    salient_weight: float,
    threshold: float,
    n_tau: int,
) -> Tensor:
    """GPTQ column by column, each group on its best grid as it is when its first column is reached."""
    w, q = w.clone(), torch.zeros_like(w)
    inverse = inverse_hessian(x, damp)
    spread = torch.linalg.cholesky(inverse, upper=True).diagonal()
    hessian = torch.linalg.inv(inverse)
    for j in range(w.shape[1]):
        g, columns = j // size, slice(j // size * size, (j // size + 1) * size)
        if j % size == 0 and widths[g] == 1:
            low, high = (nearest(w[:, columns], 1).aminmax(dim=1)[i] for i in (0, 1))
        elif j % size == 0:
            weights = w[:, columns] ** 2 / spread[columns] ** 2
            scale, zero = best_grid(w[:, columns], weights, widths[g], salient_weight, threshold, 0.1, n_tau)
        if widths[g] == 1:
            q[:, j] = torch.where(w[:, j] < (low + high) / 2, low, high)
        else:
            q[:, j] = snap(w[:, j], scale, zero, widths[g])
        left = list(range(j, w.shape[1]))
        inverse = torch.linalg.inv(hessian[left][:, left])
        w[:, left] -= torch.outer((w[:, j] - q[:, j]) / inverse[0, 0], inverse[0])
    return q
