"""OmniQuant's clipping, with straight-through rounding written as what it is: adding a constant to the number."""

import torch
from torch import Tensor


class Rounding:
    """Rounds to the nearest code."""

    def round(self, name: str, x: Tensor) -> Tensor:
        return x.round()

    def clamp(self, x: Tensor, top: int) -> Tensor:
        return x.clamp(0, top)


class Frozen(Rounding):
    """Rounds at first and remembers by how much, and what was beyond the ends; from then on it does just that."""

    def __init__(self) -> None:
        self.moved: dict[str, Tensor] = {}
        self.below = self.above = None

    def round(self, name: str, x: Tensor) -> Tensor:
        return x + self.moved.setdefault(name, x.round() - x)

    def clamp(self, x: Tensor, top: int) -> Tensor:
        if self.below is None:
            self.below, self.above = x < -0.5, x > top + 0.5  # codes are whole numbers
        return x.masked_fill(self.below, 0).masked_fill(self.above, top)


def clipped(w: Tensor, bits: int, lower: Tensor, upper: Tensor, rounding: Rounding) -> Tensor:
    """Equation 2 for one group `w`, `(n,)`, with the logits of its ends."""
    low = w.min().clamp(max=0) * torch.sigmoid(lower)
    high = w.max().clamp(min=0) * torch.sigmoid(upper)
    scale = (high - low) / (2**bits - 1)
    zero = rounding.round("zero", -low / scale)
    codes = rounding.clamp(rounding.round("codes", w / scale) + zero, 2**bits - 1)
    return scale * (codes - zero)


def error(w: Tensor, x: Tensor, bits: int, lower: float, upper: float, rounding: Rounding) -> float:
    """`‖x (ŵ − w)‖²`."""
    ends = (torch.tensor(end, dtype=w.dtype) for end in (lower, upper))
    return float((x @ (clipped(w, bits, *ends, rounding) - w)).square().sum())


def slopes(w: Tensor, x: Tensor, bits: int, logits: tuple[float, float], step: float) -> list[float]:
    """Central differences of the error along each logit."""
    frozen = Frozen()
    (a, b), _ = logits, error(w, x, bits, *logits, frozen)
    sides = [((a + step, b), (a - step, b)), ((a, b + step), (a, b - step))]
    return [
        (error(w, x, bits, *up, frozen) - error(w, x, bits, *down, frozen)) / (2 * step) for up, down in sides
    ]


def least_error(w: Tensor, x: Tensor, bits: int, n: int) -> float:
    """The least error of one group over an `n × n` grid of the fractions kept."""
    tried = torch.linspace(0.3, 1.0, n, dtype=w.dtype).clamp(max=1 - 1e-9).logit().tolist()
    return min(error(w, x, bits, lower, upper, Rounding()) for lower in tried for upper in tried)
