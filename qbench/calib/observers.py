"""Running statistics of a linear layer's input; each sees every calibration batch once."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Observer(ABC):
    """A statistic of the rows of `x`, `(..., in_features)`, kept in float32 at least."""

    value: Tensor

    @abstractmethod
    def update(self, x: Tensor) -> None: ...


def _rows(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return x if x.dtype == torch.float64 else x.float()


class _Mean(Observer):
    """Mean over tokens of something, batch by batch, so that no sum grows with the data."""

    def __init__(self) -> None:
        self.n_tokens = 0

    def _fold(self, total: Tensor, n_tokens: int) -> None:
        self.n_tokens += n_tokens
        if self.n_tokens == n_tokens:
            self.value = total / n_tokens
        else:
            self.value += (total - self.value * n_tokens) / self.n_tokens


class Gram(_Mean):
    """Mean of `x xᵀ` over tokens, `(in_features, in_features)`.

    Twice this is the Hessian of the layer's squared output error with respect to a weight row.
    """

    def update(self, x: Tensor) -> None:
        x = _rows(x)
        self._fold(x.T @ x, len(x))


class AbsMean(_Mean):
    """Mean magnitude of each input channel, `(in_features,)`."""

    def update(self, x: Tensor) -> None:
        x = _rows(x)
        self._fold(x.abs().sum(0), len(x))


class AbsMax(Observer):
    """Largest magnitude of each input channel, `(in_features,)`."""

    def update(self, x: Tensor) -> None:
        peak = _rows(x).abs().amax(0)
        self.value = torch.maximum(peak, self.value) if hasattr(self, "value") else peak


class Range(Observer):
    """Smallest and largest value of all channels together, `(2,)`."""

    def update(self, x: Tensor) -> None:
        low, high = _rows(x).aminmax()
        if hasattr(self, "value"):
            low, high = torch.minimum(low, self.value[0]), torch.maximum(high, self.value[1])
        self.value = torch.stack((low, high))
