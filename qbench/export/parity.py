"""Whether a checkpoint, loaded as its users load it, is the model that was evaluated.

Three models read the same real text. The *evaluated* one is fake-quantized. The *expected* one has the weights that the
format stores (rounded to its dtype) and quantizes inputs as its readers do. The *loaded* one is what its library makes of
the files. Loaded and expected are one function: they may differ by the order of sums alone. How far that moves logits
is measured, not assumed: the expected model runs once more with every linear layer's output moved by a unit in
the last place, up or down at random. Whatever is not rounding (a permuted group, a wrong zero-point, a lost hook)
is far beyond that.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbench.evaluate.divergence import agreement, divergence

Logits = Callable[[Tensor], Tensor]  # of (batch, seq_len) tokens, (batch, seq_len, vocab) in float32

# One run is one draw of the roundings; another draw, and kernels that add in another order, make several times that.
ALLOWED = 4.0


@dataclass(frozen=True)
class Difference:
    """Between the logits of two models: largest and mean, KL divergence in nats, share of equal likeliest tokens."""

    largest: float
    mean: float
    kl: float
    agreement: float


@dataclass(frozen=True)
class InEngine:
    """What an engine that rounds inputs in a way of its own makes of a checkpoint.

    Attributes:
        evaluated: Against the model that was evaluated; `expected_kl`: KL from the expected model.
        inputs_kl: KL that rounding inputs so makes of the expected model by itself; `rounding_kl`: that of sums alone.
    """

    name: str
    evaluated: Difference
    expected_kl: float
    inputs_kl: float
    rounding_kl: float
    ppl: float

    @property
    def holds(self) -> bool:
        """Whether its own rounding explains it: two draws of the same roundings are at most twice as far apart as one is."""
        return self.expected_kl <= self.allowed

    @property
    def allowed(self) -> float:
        """Of KL, which is of second order in a difference of logits."""
        return 2 * self.inputs_kl + ALLOWED**2 * self.rounding_kl


@dataclass(frozen=True)
class Parity:
    """What the comparison found.

    Attributes:
        text: What was read, in `n_windows` windows of `seq_len` tokens.
        evaluated: Loaded against evaluated; `expected`: loaded against expected.
        floor: Mean difference of logits that rounding makes of the expected model.
        ppl_evaluated, ppl_loaded: Perplexity on the text.
    """

    text: str
    n_windows: int
    seq_len: int
    evaluated: Difference
    expected: Difference
    floor: float
    ppl_evaluated: float
    ppl_loaded: float
    engine: InEngine | None = None

    @property
    def is_exact(self) -> bool:
        return self.evaluated.largest == 0.0

    @property
    def holds(self) -> bool:
        """Whether loaded and expected differ by rounding alone."""
        return self.expected.mean <= ALLOWED * self.floor or self.expected.largest == 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"exact": self.is_exact}


def logits(model: Any, windows: Tensor, batch_size: int = 4) -> Tensor:
    """Of all windows, float32 on the CPU."""
    with torch.inference_mode():
        parts = [model(ids, use_cache=False).logits.float().cpu() for ids in windows.split(batch_size)]
    return torch.cat(parts)


def difference(reference: Tensor, found: Tensor) -> Difference:
    """Of `found` from `reference`, both `(n, seq_len, vocab)`."""
    # A window at a time: in float64, logits over a large vocabulary are larger than many a model.
    gaps = ((a.double() - b.double()).abs() for a, b in zip(found.split(1), reference.split(1), strict=True))
    largest, mean = torch.stack([torch.stack((gap.max(), gap.mean())) for gap in gaps]).unbind(1)
    return Difference(
        float(largest.max()), float(mean.mean()),
        max(0.0, float(divergence(reference, found).mean())), float(agreement(reference, found).mean()),
    )  # fmt: skip


def rounding_floor(model: Any, windows: Tensor, reference: Tensor) -> Difference:
    """Of logits, when each linear layer's output moves by a unit in the last place, at random."""
    with _disturbed(model):
        return difference(reference, logits(model, windows))


def perplexity_of(found: Tensor, windows: Tensor) -> float:
    """Of next tokens, over all windows."""
    flat = found[:, :-1].flatten(0, 1)
    return math.exp(float(nn.functional.cross_entropy(flat, windows[:, 1:].flatten())))


@contextmanager
def _disturbed(model: Any) -> Iterator[None]:
    generator = torch.Generator().manual_seed(0)

    def disturb(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        sign = torch.randint(0, 2, output.shape, generator=generator).to(output.device) * 2 - 1
        return (output * (1 + sign * torch.finfo(output.dtype).eps)).to(output.dtype)

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_hook(disturb).remove)
        yield
