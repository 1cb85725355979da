"""Running statistics of a linear layer's input; each sees every calibration batch once."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from qbench.quant.grid import wide
from qbench.quant.ranges import Histogram
from qbench.quant.spec import QuantSpec


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


class Gram(Observer):
    """Mean of `x xᵀ` over tokens, `(in_features, in_features)`.

    Twice this is the Hessian of the layer's squared output error with respect to a weight row. There is one matrix: its
    value is that which the next update changes.
    """

    def __init__(self) -> None:
        self.n_tokens = 0

    def update(self, x: Tensor) -> None:
        x = _rows(x)
        n = x.shape[1]
        if not self.n_tokens:
            self._matrix = x.new_zeros(n, n)
        old, self.n_tokens = self.n_tokens, self.n_tokens + len(x)
        # The matrix is symmetric: panels from the diagonal to the right are enough, nine sixteenths of the arithmetic.
        for start, width in _panels(n):
            columns = x[:, start : start + width]
            self._matrix[start : start + width, start:].addmm_(
                columns.T, x[:, start:], beta=old / self.n_tokens, alpha=1 / self.n_tokens
            )

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        matrix = self._matrix
        for start, width in _panels(len(matrix)):
            stop = start + width
            corner = matrix[start:stop, start:stop].triu()
            matrix[start:stop, start:stop] = corner + corner.triu(1).T
            matrix[stop:, start:stop] = matrix[start:stop, stop:].T
        return matrix


_PANELS, _NARROWEST = 8, 64


def _panels(n: int) -> list[tuple[int, int]]:
    """Where runs of channels start, and how many each has at most."""
    width = max(-(-n // _PANELS), _NARROWEST)
    return [(start, width) for start in range(0, n, width)]


class AbsMean(_Mean):
    """Mean magnitude of each input channel, `(in_features,)`."""

    def update(self, x: Tensor) -> None:
        x = _rows(x)
        self._fold(x.abs().sum(0), len(x))


class SquareMean(_Mean):
    """Mean square of each input channel, `(in_features,)`: the diagonal of `Gram`."""

    def update(self, x: Tensor) -> None:
        x = _rows(x)
        self._fold(x.square().sum(0), len(x))


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


PERCENTILE = (
    99.99  # Wu et al., "Integer Quantization for Deep Learning Inference", arXiv:2004.09602, section 5
)


class AverageRange(Observer):
    """Mean over samples of each one's smallest and largest value, `(2,)` (LLMC's static min-max).

    `x` is `(n_samples, ..., features)`, or `(n_samples * seq_len, features)`: some layers flatten what enters them.
    """

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self.n_samples = 0
        self._total, self._dtype = torch.zeros(2, dtype=torch.float64), torch.float32

    def update(self, x: Tensor) -> None:
        """Raises ValueError if flat rows are not whole samples."""
        if x.dim() == 2:
            if len(x) % self.seq_len:
                raise ValueError(
                    f"{len(x)} rows are not whole samples of {self.seq_len} tokens, whose ranges are to be averaged; "
                    "use act_range=minmax for layers that see part of the tokens"
                )
            x = x.reshape(-1, self.seq_len, x.shape[-1])
        samples = wide(x).flatten(1)
        # In float64: the sum must not tell how the samples were cut into batches.
        ends = torch.stack((samples.amin(1), samples.amax(1))).double()
        self._total = self._total.to(x.device) + ends.sum(1)
        self._dtype = samples.dtype
        self.n_samples += len(samples)

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        return (self._total / self.n_samples).to(self._dtype)


class _HistogramRange(Observer):
    def __init__(self) -> None:
        self.histogram = Histogram()

    def update(self, x: Tensor) -> None:
        self.histogram.add(x)


class PercentileRange(_HistogramRange):
    """What `PERCENTILE` per cent of all values do not fall below, and do not exceed, `(2,)`."""

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        return torch.cat(self.histogram.percentile(PERCENTILE)).flatten()


class ErrorRange(_HistogramRange):
    """The range with the least mean squared rounding error on the grid of `spec`, `(2,)`."""

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        return torch.cat(self.histogram.mse_range(self.spec)).flatten()


class Without(Observer):
    """Another statistic, of the channels that are not `kept` in floating point, a mask `(in_features,)`."""

    def __init__(self, kept: Tensor, observer: Observer) -> None:
        self.kept, self.observer = kept, observer

    def update(self, x: Tensor) -> None:
        self.observer.update(x[..., ~self.kept.to(x.device)])

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        return self.observer.value


def observer_for(spec: QuantSpec, seq_len: int, kept: Tensor | None = None) -> Callable[[], Observer]:
    """What makes the observer of a static range: its value is `(lo, hi)`, for `choose_qparams(value, spec)`.

    Args:
        spec: Its `range` says which.
        seq_len: Tokens of a calibration sample.
        kept: Channels that have no part in the range, a mask `(in_features,)`.
    """
    kinds: dict[str, Callable[[], Observer]] = {
        "minmax": Range,
        "average": partial(AverageRange, seq_len),
        "percentile": PercentileRange,
        "mse": partial(ErrorRange, spec),
    }
    make = kinds[spec.range]
    return make if kept is None else lambda: Without(kept, make())
