"""AWQ: protect the weights that meet large activations by scaling them up before rounding.

Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and
Acceleration", MLSys 2024, arXiv:2306.00978, Section 3.2: Equations 4 and 5, and its clipping.

The output error of a rounded weight is measured exactly from the Gram matrix `G` of its input,
`‖X Δᵀ‖² = n tr(Δ G Δᵀ)`, so that no activation need be kept and no candidate costs a forward pass. It
is the error of the linear layers, as in Equation 4; the authors' code measures that of the module
around them (attention, MLP), which differs for q, k, v and gate, up.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.algorithms.base import Algorithm, Kind
from qbench.calib.observers import AbsMean, Gram
from qbench.calib.stream import Block
from qbench.models.surgery import migrate_scale
from qbench.quant.affine import choose_qparams, fake_quantize, grouped, round_to_grid
from qbench.quant.scheme import QuantSpec, Scheme


def output_error(delta: Tensor, gram: Tensor) -> Tensor:
    """`tr(Δ G Δᵀ)` summed over the leading axes; `delta` is `(..., rows, n)`, `gram` `(..., n, n)`."""
    return ((delta @ gram) * delta).sum()


@dataclass(frozen=True)
class AWQScale(Algorithm):
    """Per-channel scales `s = mean|X|^r`, with the `r` that hurts the layers' output least.

    Attributes:
        n_grid: Number of exponents `r` tried, `0, 1/n, …, (n−1)/n`.
    """

    n_grid: int = 20

    kind: ClassVar[Kind] = "transform"

    def __post_init__(self) -> None:
        if self.n_grid < 1:
            raise ValueError(f"AWQ's scale n_grid is {self.n_grid}, it must be at least 1")

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)

    @torch.no_grad()
    def process(self, block: Block, scheme: Scheme) -> None:
        if scheme.weight is None:
            return
        links = [link for link in block.family.links if block.scalable(link)]
        # One pass serves all links: a link's scale is undone by its sinks, so no later input feels it.
        for link, (gram, mean) in block.observe(Gram, AbsMean, links=links).items():
            assert link.source is not None
            weight = torch.cat([sink.weight for sink in block.sinks(link)]).to(gram)
            migrate_scale(
                block[link.source], block.sinks(link), self.search(weight, gram, mean, scheme.weight)
            )

    def search(self, w: Tensor, gram: Tensor, mean: Tensor, spec: QuantSpec) -> Tensor:
        """The best scales for `w`, `(out, in)`, shape `(in,)`."""
        best, best_error = torch.ones_like(mean), torch.tensor(float("inf"))
        for step in range(self.n_grid):
            s = (mean ** (step / self.n_grid)).clamp(min=1e-4)
            s = s / (s.max() * s.min()).sqrt()
            error = output_error(fake_quantize(w * s, spec) / s - w, gram)
            if error < best_error:
                best, best_error = s, error
        return best


@dataclass(frozen=True)
class AWQClip(Algorithm):
    """Shrink each group's range to the fraction that hurts the group's share of the output least.

    The fraction applies to both ends of an asymmetric range, so clipping is as symmetric as the
    grid. Queries and keys are left alone, as in the authors' code: their errors meet in a product.

    Attributes:
        n_grid: Steps from the whole range to none.
        max_shrink: Share of those steps tried: 0.5 tries 1, 0.95, … 0.55 of the range.
    """

    n_grid: int = 20
    max_shrink: float = 0.5

    kind: ClassVar[Kind] = "clip"

    def __post_init__(self) -> None:
        if not 0 < self.max_shrink < 1 or self.max_shrink * self.n_grid < 1:
            raise ValueError(
                f"AWQ's clip tries n_grid * max_shrink = {self.n_grid} * {self.max_shrink} ranges; "
                "max_shrink must be between 0 and 1, and their product at least 1"
            )

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)

    @torch.no_grad()
    def process(self, block: Block, scheme: Scheme) -> None:
        if scheme.weight is None:
            return
        for link, (gram,) in block.observe(Gram).items():
            for name in link.sinks:
                if name not in block.family.query_key:
                    weight = block.linear(name).weight
                    weight.copy_(self.clip(weight.to(gram), gram, scheme.weight))

    def clip(self, w: Tensor, gram: Tensor, spec: QuantSpec) -> Tensor:
        """`w`, `(out, in)`, clamped group by group to the best of the tried ranges."""
        g = grouped(w, spec)  # (out, n_groups, group_size)
        n_groups, size = g.shape[-2:]
        blocks = gram.view(n_groups, size, n_groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        best = torch.ones(*g.shape[:-1], 1).to(g)
        best_error = torch.full_like(best, float("inf"))
        for step in range(int(self.max_shrink * self.n_grid)):
            keep = 1 - step / self.n_grid
            scale, zero = choose_qparams(w, spec, (keep, keep))
            delta = round_to_grid(g.clamp(*self._range(g, keep, spec)), scale, zero, spec) - g
            # (groups, out, size) batches the product with one Gram block per group
            by_group = delta.transpose(0, 1)
            error = ((by_group @ blocks) * by_group).sum(-1).T[..., None]
            best = torch.where(error < best_error, keep, best)
            best_error = torch.minimum(error, best_error)
        return g.clamp(*self._range(g, best, spec)).reshape(w.shape)

    @staticmethod
    def _range(g: Tensor, keep: Tensor | float, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        lo, hi = g.amin(-1, keepdim=True).clamp(max=0), g.amax(-1, keepdim=True).clamp(min=0)
        if spec.symmetric:
            hi = torch.maximum(-lo, hi)
            lo = -hi
        return lo * keep, hi * keep
