"""SpQR's Algorithm 1 without its speed-ups: every weight is left out in turn, every inverse is made anew."""

import torch
from torch import Tensor


def range_grid(values: Tensor, bits: int) -> tuple[float, float]:
    """Scale and real zero-point of the asymmetric grid of some weights; its range contains zero."""
    low, high = min(0.0, *values.tolist(), 0.0), max(0.0, *values.tolist(), 0.0)
    scale = (high - low) / (2**bits - 1) or 1.0
    return scale, -low / scale


def snap(x: Tensor, scale: float, zero: float, bits: int) -> Tensor:
    return scale * ((x / scale + zero).round().clamp(0, 2**bits - 1) - zero)


def without(group: Tensor, left_out: list[int]) -> Tensor:
    return group[[j for j in range(len(group)) if j not in left_out]]


def falls(group: Tensor, importance: Tensor, bits: int) -> list[float]:
    """By how much the error of a group falls when each weight is left out of it."""
    everything = float(((snap(group, *range_grid(group, bits), bits) - group) ** 2 * importance).sum())
    found = []
    for j in range(len(group)):
        rest, weights = without(group, [j]), without(importance, [j])
        error = ((snap(rest, *range_grid(rest, bits), bits) - rest) ** 2 * weights).sum()
        found.append(everything - float(error))
    return found


def second_level(values: list[float], bits: int) -> list[float]:
    """Round a run of scales, or of zero-points, to their own min-max grid."""
    low, high = min(values), max(values)
    step = (high - low) / (2**bits - 1) or 1.0
    return [low + step * round((value - low) / step) for value in values]


def spqr(
    w: Tensor,
    x: Tensor,
    bits: int,
    size: int,
    damp: float,
    threshold: float,
    act_order: bool,
    simplified: bool = False,
    scale_bits: int | None = None,
    scale_group: int = 16,
) -> tuple[Tensor, Tensor]:
    """Round `w`, `(out, in)`, on inputs `x`, in float64; returns it, and a mask of what is kept."""
    rows, n = w.shape
    hessian = 2 * x.T @ x / len(x)
    hessian += damp * hessian.diagonal().mean() * torch.eye(n, dtype=x.dtype)
    order = sorted(range(n), key=lambda j: -float(hessian[j, j])) if act_order else list(range(n))
    inverses = [torch.linalg.inv(hessian[order[i:]][:, order[i:]]) for i in range(n)]
    importance = torch.zeros(n, dtype=w.dtype)
    for i, j in enumerate(order):
        importance[j] = 1 / inverses[i][0, 0]
    threshold = threshold * float((w.var(0) * importance).mean())
    grids = {}
    for g in range(n // size):
        columns = slice(g * size, (g + 1) * size)
        for r in range(rows):
            group = w[r, columns]
            gains = [] if simplified else falls(group, importance[columns], bits)
            left_out = [j for j, gain in enumerate(gains) if gain > threshold]
            grids[r, g] = range_grid(without(group, left_out), bits)
        for start in range(0, rows, scale_group) if scale_bits else ():
            run = range(start, min(start + scale_group, rows))
            ranges = [(-scale * zero, scale) for scale, zero in (grids[r, g] for r in run)]
            scales = second_level([scale for _, scale in ranges], scale_bits)
            zeros = second_level(
                [-low / scale for (low, _), scale in zip(ranges, scales, strict=True)], scale_bits
            )
            grids |= {(r, g): grid for r, grid in zip(run, zip(scales, zeros, strict=True), strict=True)}
    w, q, kept = w.clone(), torch.zeros_like(w), torch.zeros_like(w, dtype=torch.bool)
    for i, j in enumerate(order):
        inverse = inverses[i]
        q[:, j] = torch.stack([snap(w[r, j], *grids[r, j // size], bits) for r in range(rows)])
        kept[:, j] = (w[:, j] - q[:, j]) ** 2 / inverse[0, 0] > threshold
        q[:, j] = torch.where(kept[:, j], w[:, j], q[:, j])
        w[:, order[i:]] -= torch.outer((w[:, j] - q[:, j]) / inverse[0, 0], inverse[0])
    return q, kept
