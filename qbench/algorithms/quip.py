"""QuIP: round in a random basis, where weights are even in size and no direction of the input stands out.

Chee et al., "QuIP: 2-Bit Quantization of Large Language Models With Guarantees", NeurIPS 2023, arXiv:2307.13304:
Algorithms 1 and 2 (incoherence processing) around Algorithm 3's adaptive rounding, LDLQ, which is the same as OPTQ
in its natural order (Theorem 6) and runs here as such.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qbench.algorithms.base import Algorithm, Choice, Kind
from qbench.algorithms.gptq import GPTQ
from qbench.calib.block import Block
from qbench.calib.observers import Gram
from qbench.errors import Unsuitable
from qbench.quant.basis import Basis
from qbench.quant.grid import QParams, group_sum, grouped
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec
from qbench.quant.storage import layer_bits


@dataclass(frozen=True)
class QuIP(Algorithm):
    """LDLQ on `U W D V^T`, with U and V random orthogonal and D diagonal.

    The grid is QuIP's own: 2^b levels from -rho to rho times the root mean square of the weights in the new basis,
    none of them zero. What shares a scale is the scheme's choice: the paper has one for a whole layer
    (`weight_granularity=tensor`).

    Attributes:
        rho: Half the grid's width, in standard deviations of the weight.
        damp: Added to the Hessian's diagonal, as a fraction of its mean (the paper's alpha).
        true_sequential: Refresh statistics after each group of layers.
        seed: Of the bases; each layer has its own.
    """

    rho: float = 2.4
    damp: float = 0.01
    true_sequential: bool = True
    seed: int = 0

    kind: ClassVar[Kind] = "round"
    on_grid: ClassVar[bool] = False
    uses: ClassVar[frozenset[Choice]] = frozenset()
    uses_kept: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rho <= 0 or self.damp <= 0:
            raise ValueError(f"QuIP's rho is {self.rho} and damp {self.damp}; both must be positive")

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)
        for spec in scheme.weights:
            plain = spec.format == "int" and spec.scale_format == "float16" and spec.scale_bits == 16
            if not plain or spec.bits < 2:
                raise Unsuitable(
                    "QuIP has a grid of its own, of 2 to 8 bits with a scale in float16",
                    f"the scheme is {scheme}; set weight_format=int, scale_bits=16 and wbits of at least 2",
                )

    @torch.no_grad()
    def process(self, block: Block) -> None:
        for link, (gram,) in block.sequential(Gram) if self.true_sequential else block.observe(Gram).items():
            for name in link.sinks:
                if (spec := block.weight_spec(name)) is None:
                    continue
                weight = block.linear(name).weight
                weight.copy_(self.round(weight.to(gram), gram, spec, self.bases(block, name)))
                # The bases are made from the seed; the rescaling is stored, in float16.
                block.stored_bits[name] = layer_bits(replace(spec, symmetric=True), *weight.shape)
                block.extra_bits[f"quip {name}"] = 16.0 * weight.shape[1]

    def bases(self, block: Block, name: str) -> tuple[Basis, Basis]:
        """U and V of a layer: of its outputs and of its inputs."""
        place = block.index * len(block.linears) + list(block.linears).index(name)
        generator = torch.Generator().manual_seed(self.seed * 100_003 + place)
        rows, columns = block.linear(name).weight.shape
        return Basis.random(rows, generator), Basis.random(columns, generator)

    def round(self, w: Tensor, gram: Tensor, spec: QuantSpec, bases: tuple[Basis, Basis]) -> Tensor:
        """Round `w`, `(out, in)`, given the Gram matrix of its input, `(in, in)`, in the bases of `(out, in)`.

        Raises:
            torch.linalg.LinAlgError: If the damped Hessian is not positive definite.
        """
        u, v = bases
        d = rescaling(w, gram)
        w = u.enter(v.enter(w * d).mT).mT
        gram = v.enter(v.enter(gram / d / d[:, None]).mT).mT
        g = grouped(w, spec)
        count = group_sum(torch.ones_like(g), spec)
        half = self.rho * (group_sum(g.square(), spec) / count).sqrt().clamp(min=torch.finfo(w.dtype).tiny)
        w = torch.minimum(torch.maximum(g, -half), half).view_as(w)
        steps = 2**spec.bits - 1
        grid = QParams(2 * half / steps, torch.full_like(half, steps / 2))
        own = replace(spec, symmetric=False, real_zero=True)
        w = GPTQ(self.damp, act_order=False).round(w, gram, own, grid)
        return v.leave(u.leave(w.mT).mT) / d


def rescaling(w: Tensor, gram: Tensor) -> Tensor:
    """D = (diag H / diag W^T W)^(1/4), `(in,)`, which makes the bound on the rounding error smallest."""
    h, w2 = gram.diagonal(), w.square().sum(0)
    # Dead channels, and columns of zeros, as in the authors' code.
    return (h.clamp(min=1e-8 * h.max()) / w2.clamp(min=1e-8 * w2.max())) ** 0.25
