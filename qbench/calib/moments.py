"""How a tensor's elements are distributed, from batches of it.

Outliers are what makes a tensor hard to quantize: a range is as wide as the largest magnitude, and the kurtosis (3 for
a normal distribution, 1.8 for a uniform one) says how far the tails reach beyond the standard deviation.
"""

import torch
from torch import Tensor

from qbench.calib.observers import Observer


class Moments(Observer):
    """Largest magnitude, mean, standard deviation and kurtosis of all elements together, `(4,)`, float64.

    The kurtosis of what is constant is NaN.
    """

    def __init__(self) -> None:
        self._absmax = 0.0
        self._shift: float | None = None
        self._n = 0
        self._sums = torch.zeros(4, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        x = x.detach().double().flatten()
        if self._shift is None:  # sums of powers about a value near the mean lose no digits
            self._shift = float(x.mean())
        self._absmax = max(self._absmax, float(x.abs().max()))
        centred = x - self._shift
        square = centred.square()
        parts = (centred.sum(), square.sum(), (square * centred).sum(), square.square().sum())
        self._sums += torch.stack(parts).cpu()
        self._n += x.numel()

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        assert self._shift is not None, "nothing was seen"
        m1, m2, m3, m4 = (self._sums / self._n).tolist()
        variance = m2 - m1**2
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        kurtosis = fourth / variance**2 if variance > 0 else float("nan")
        found = (self._absmax, self._shift + m1, max(variance, 0.0) ** 0.5, kurtosis)
        return torch.tensor(found, dtype=torch.float64)
