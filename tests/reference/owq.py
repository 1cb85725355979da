"""OWQ's sensitivity, column by column, from the inputs themselves."""

from torch import Tensor

from .gptq import grid, snap


def weak_columns(w: Tensor, x: Tensor, bits: int, size: int, n: int) -> list[int]:
    """The `n` columns of `w`, `(out, in)`, with the largest `λ_j ‖ΔW_j‖²` on inputs `x`, `(tokens, in)`, in order."""
    scale, zero = grid(w, bits, size)
    sensitivity = []
    for j in range(w.shape[1]):
        change = snap(w[:, j], scale[:, j // size], zero[:, j // size], bits) - w[:, j]
        sensitivity.append(float((x[:, j] ** 2).sum()) * float((change**2).sum()))
    return sorted(sorted(range(w.shape[1]), key=lambda j: -sensitivity[j])[:n])
