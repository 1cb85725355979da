"""AWQ: protect the weights that meet large activations by scaling them up before rounding.

Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and
Acceleration", MLSys 2024, arXiv:2306.00978, Section 3.2: Equations 4 and 5. Its clipping is `awq_clip`.

The error of a candidate is that of the linear layers' outputs, as in Equation 4, measured from the Gram matrix of
their input: no activation need be kept and no candidate costs a forward pass. The authors' code measures that of the
module around them (attention, MLP), which differs for q, k, v and gate, up. Activations are not quantized in the
search, whatever the scheme: the scales are made for weights.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.algorithms.base import Algorithm, Kind
from qbench.calib.block import Block
from qbench.calib.observers import AbsMean, Gram
from qbench.models.family import Link
from qbench.models.rotate import is_rotated_online
from qbench.models.surgery import scale_columns, scale_rows
from qbench.quant.grid import fake_quantize, grouped
from qbench.quant.output_error import output_error, row_chunks
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec

Weights = list[tuple[Tensor, QuantSpec]]


@dataclass(frozen=True)
class AWQScale(Algorithm):
    """Per-channel scales `s = mean|X|^r`, with the `r` that hurts the layers' output least.

    Attributes:
        n_grid: Number of exponents `r` tried, `0, 1/n, …, (n−1)/n`.
        duo: Divide by `w^(1−r)`, with `w` a channel's mean magnitude relative to the largest of the group: the first
            version of the paper, LLMC's `v1`, AutoAWQ's `duo_scaling`.
        gqa: Under grouped-query attention also scale the input of the output projection: heads that read one value
            head share its scales (LLMC's `do_gqa_trans`). Without it this input is left alone, as in the authors'
            code.
    """

    n_grid: int = 20
    duo: bool = False
    gqa: bool = False

    kind: ClassVar[Kind] = "transform"

    def __post_init__(self) -> None:
        if self.n_grid < 1:
            raise ValueError(f"AWQ's scale n_grid is {self.n_grid}, it must be at least 1")

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)

    @torch.no_grad()
    def process(self, block: Block) -> None:
        # One pass serves all links: a link's scale is undone by its sinks, so no later input feels it. Links without
        # scales are observed too, for the clipping that follows.
        # Experts are observed twice: each by itself for its clipping, and together with what shares their norm.
        links = tuple(dict.fromkeys((*block.links, *block.scalings)))
        for link, (gram, mean) in block.observe(Gram, AbsMean, links=links).items():
            if link not in block.scalings or not any(block.alike(link)):
                continue
            if not (block.scalable(link) or self._shares(block, link)):
                continue
            assert link.source is not None
            weights = [
                (torch.cat([block.linear(name).weight for name in names]).to(gram), spec)
                for spec, names in block.alike(link)
            ]
            layers = [
                (block.linear(name).weight, spec) for spec, names in block.alike(link) for name in names
            ]
            relative = relative_magnitude(layers).to(mean) if self.duo else None
            if block.scalable(link):
                block.migrate(link, self.search(weights, gram, mean, relative))
                continue
            heads = _heads(block, link)
            mean, relative = (x if x is None else _tied(x, heads).flatten() for x in (mean, relative))
            s = self.search(weights, gram, mean, relative)
            scale_rows(block[link.source], 1 / s.view(heads)[:, 0].flatten(), block.source_rows(link))
            for sink in block.sinks(link):
                scale_columns(sink, s)

    def _shares(self, block: Block, link: Link) -> bool:
        """Whether several heads read one head of the link's source, and their scales are asked for."""
        online = any(is_rotated_online(sink) for sink in block.sinks(link))
        return self.gqa and link.source == block.family.value and not online

    def search(self, weights: Weights, gram: Tensor, mean: Tensor, relative: Tensor | None = None) -> Tensor:
        """The best scales for layers that share an input, `(out, in)` each, shape `(in,)`.

        Args:
            gram: Gram matrix of the input, `(in, in)`; `mean`: its mean magnitude, `(in,)`.
            relative: What `relative_magnitude` says of the weights, to divide by.
        """
        exponents = [step / self.n_grid for step in range(self.n_grid)]
        candidates = torch.stack([_scale(r, mean, relative) for r in exponents])
        errors = gram.new_zeros(self.n_grid)
        for w, spec in weights:
            for part in (w[rows] for rows in row_chunks(w, spec)):
                for i, s in enumerate(candidates):
                    errors[i] += output_error(fake_quantize(part * s, spec) / s - part, gram).sum()
        return candidates[errors.argmin()]


def relative_magnitude(layers: Weights) -> Tensor:
    """Each input channel's mean magnitude, relative to the largest weight of a group, `(in,)`; the layers' average."""
    means = []
    for weight, spec in layers:
        g = grouped(weight.abs(), spec)
        means.append((g / g.amax(-1, keepdim=True).clamp(min=1e-6)).view_as(weight).mean(0))
    return torch.stack(means).mean(0)


def _scale(r: float, mean: Tensor, relative: Tensor | None) -> Tensor:
    s = mean**r
    if relative is not None:
        s = s / (relative ** (1 - r) + 1e-4)  # AutoAWQ's constant, for channels without weights
    s = s.clamp(min=1e-4)
    return s / (s.max() * s.min()).sqrt()


def _heads(block: Block, link: Link) -> tuple[int, int, int]:
    """Value heads, heads that read each, and channels of a head."""
    heads = block.family.heads
    assert heads is not None, "there are values, hence heads"
    return (
        heads.keys,
        block.linear(link.sinks[0]).in_features // (heads.keys * heads.value_size),
        heads.value_size,
    )


def _tied(x: Tensor, heads: tuple[int, int, int]) -> Tensor:
    """The mean over the heads that read one value head, `(value heads, heads of each, channels)`."""
    return x.view(heads).mean(1, keepdim=True).expand(heads)
