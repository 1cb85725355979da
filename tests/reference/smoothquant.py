"""SmoothQuant's Equation 4, channel by channel."""

from collections.abc import Sequence

from torch import Tensor


def scales(x: Tensor, weights: Sequence[Tensor], alpha: float) -> list[float]:
    """`max|X_j|^α / max|W_j|^(1−α)` of inputs `(tokens, in)` and all weights `(out, in)` that they meet."""
    found = []
    for j in range(x.shape[1]):
        x_max = max(abs(v) for v in x[:, j].tolist())
        w_max = max(abs(v) for w in weights for v in w[:, j].tolist())
        found.append(x_max**alpha / w_max ** (1 - alpha))
    return found
