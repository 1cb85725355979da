"""Salience-determined bit allocation, the first half of SliM-LLM: move bits from a layer's dull groups to its salient ones.

Huang et al., "SliM-LLM: Salience-Driven Mixed-Precision Quantization for Large Language Models", ICML 2025,
arXiv:2405.14917, section 3.2. A weight's salience is `δ_ij = w_ij² / U_jj²`, where `U` is the factor of the inverse
Hessian as in GPTQ; a group's is the sum over its weights in all rows.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qbench.algorithms.base import Algorithm, Kind
from qbench.calib.block import Block
from qbench.calib.observers import Gram, Observer
from qbench.errors import Unsuitable
from qbench.quant.factor import inverse_factor
from qbench.quant.grid import fake_quantize, grouped
from qbench.quant.mixed import of_width
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec


@dataclass(frozen=True)
class Ladder:
    """One layer, with fewer and with more bits in some of its groups.

    Attributes:
        weight: `(out, in)`; `bias`: `(out,)` or `None`.
        lower, same, upper: The weight rounded to one bit less, to the scheme's, to one more; `(out, n_groups, size)`.
        order: Groups, the least salient first.
    """

    weight: Tensor
    bias: Tensor | None
    lower: Tensor
    same: Tensor
    upper: Tensor
    order: Tensor

    def rungs(self) -> list[tuple[int, int]]:
        """Step by step, the next group that loses a bit and the next that gains one."""
        order = self.order.tolist()
        return list(zip(order, reversed(order), strict=True))[: len(order) // 2]


class Divergence(Observer):
    """`KL(softmax(x Ŵᵀ) ‖ softmax(x Wᵀ))`, mean over tokens, after each number of rungs, `(n_groups // 2 + 1,)`."""

    def __init__(self, ladder: Ladder) -> None:
        self.ladder = ladder
        self.total = torch.zeros(len(ladder.rungs()) + 1, dtype=torch.float64, device=ladder.weight.device)
        self.n_tokens = 0

    def update(self, x: Tensor) -> None:
        ladder = self.ladder
        x = x.reshape(-1, x.shape[-1]).to(ladder.weight)
        self.n_tokens += len(x)
        target = F.linear(x, ladder.weight, ladder.bias).log_softmax(-1)
        y = F.linear(x, ladder.same.flatten(1), ladder.bias)
        self.total[0] += divergence(y, target)
        by_group = x.unflatten(-1, ladder.same.shape[1:])
        for rung, (low, high) in enumerate(ladder.rungs(), start=1):
            # A rung changes two groups, and the output is the sum over groups of what each adds.
            y.addmm_(by_group[:, low], (ladder.lower - ladder.same)[:, low].T)
            y.addmm_(by_group[:, high], (ladder.upper - ladder.same)[:, high].T)
            self.total[rung] += divergence(y, target)

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        return self.total / self.n_tokens


def divergence(y: Tensor, target: Tensor) -> Tensor:
    """`KL(softmax(y) ‖ exp(target))`, summed over rows; `target` are logarithms."""
    log_p = y.log_softmax(-1)
    return (log_p.exp() * (log_p - target)).sum(dtype=torch.float64)


@dataclass(frozen=True)
class SBA(Algorithm):
    """Salience-determined bit allocation: take a bit from the least salient groups and give it to the most salient.

    As many groups gain as lose, so codes take as many bits as before; which number it is, from none to half of the
    groups, is decided by the divergence of the layer's output, round to nearest, from its own.

    Attributes:
        damp: Added to the Hessian's diagonal, as a fraction of its mean (`percdamp`).
    """

    damp: float = 0.01

    kind: ClassVar[Kind] = "allocate"

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)
        for spec in scheme.weights:
            if spec.granularity != "group" or spec.format != "int":
                raise Unsuitable(
                    "SliM-LLM's allocation moves bits between a layer's groups of integers",
                    f"the scheme is {scheme}; set group_size and weight_format=int",
                )
            if not 2 <= spec.bits <= 7:
                raise Unsuitable(
                    f"SliM-LLM's allocation needs a bit less and a bit more than {spec.bits}",
                    "set wbits between 2 and 7",
                )

    @torch.no_grad()
    def process(self, block: Block) -> None:
        for link, (gram,) in block.observe(Gram).items():
            ladders = {n: self.ladder(block, n, gram, s) for n in link.sinks if (s := block.weight_spec(n))}
            if not ladders:
                continue
            observers = [partial(Divergence, ladder) for ladder in ladders.values()]
            found = block.observe(*observers, links=[link])[link]
            for (name, ladder), by_rung in zip(ladders.items(), found, strict=True):
                n = int(by_rung.argmin())
                block.report.setdefault("widened_groups", {})[name] = n
                if n:
                    spec = block.weight_spec(name)
                    assert spec is not None
                    bits = torch.full_like(ladder.order, spec.bits)
                    bits[ladder.order[:n]] -= 1
                    bits[ladder.order[-n:]] += 1
                    block.group_bits[name] = bits

    def ladder(self, block: Block, name: str, gram: Tensor, spec: QuantSpec) -> Ladder:
        """The weight on three grids, and the order of its groups; what is kept is on none, and has no salience."""
        linear, kept = block.linear(name), block.kept_mask((name,))
        w = linear.weight.to(gram)
        free = w if kept is None else w.masked_fill(kept, 0.0)

        def rounded(bits: int) -> Tensor:
            q = fake_quantize(free, of_width(spec, bits))
            return grouped(q if kept is None else torch.where(kept, w, q), spec)

        lower, same, upper = (rounded(bits) for bits in (spec.bits - 1, spec.bits, spec.bits + 1))
        importance = grouped(salience(free, spread(gram, self.damp)), spec).sum((0, 2))
        bias = None if linear.bias is None else linear.bias.to(gram)
        return Ladder(w, bias, lower, same, upper, importance.argsort(stable=True))


def spread(gram: Tensor, damp: float) -> Tensor:
    """`U_jj` of each input channel, `(in,)`, where `U` is the upper factor of the damped inverse Hessian."""
    order = torch.arange(len(gram), device=gram.device)
    return inverse_factor(gram, order, damp).diagonal().to(gram)


def salience(w: Tensor, spread: Tensor) -> Tensor:
    """`w_ij² / U_jj²` of each weight, `(out, in)`."""
    return (w / spread).square()
