"""Some of a layer's inputs, for what no sum over them can tell: what rounding makes of each."""

import torch
from torch import Tensor

from qbench.calib.observers import Observer
from qbench.quant.grid import wide


class TokenSample(Observer):
    """Every so many tokens' inputs, `(n_tokens, in_features)`, whatever batches they come in."""

    def __init__(self, every: int) -> None:
        self.every, self.n_tokens = every, 0
        self._taken: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        self._taken.append(wide(x[-self.n_tokens % self.every :: self.every]))
        self.n_tokens += len(x)

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        return torch.cat(self._taken)
