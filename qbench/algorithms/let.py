"""Learnable equivalent transformation: trainable scales and shifts of the channels between modules.

Shao et al., "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models", ICLR 2024,
arXiv:2308.13137, Equation 3: `X W + B = [(X − δ) / s] [s W] + [B + δ W]`, and 5: `Q Kᵀ = (Q / s) (s Kᵀ)`. They start
from the scales of SmoothQuant (arXiv:2211.10438, Equation 4), the shifts of Outlier Suppression+ (arXiv:2304.09145,
Equation 3), and from one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qbench.calib.block import Block
from qbench.calib.observers import Observer
from qbench.models.family import Link
from qbench.models.norms import gain_offset
from qbench.quant.grid import wide

Parameters = dict[str, Tensor]


class Edit(Protocol):
    """A change of parameters that leaves the block's function as it is."""

    @property
    def trained(self) -> list[Tensor]: ...

    def apply(self, parameters: Parameters) -> None:
        """Replace parameters, by name, in `parameters`; differentiable."""


class ChannelRange(Observer):
    """Smallest and largest value of each input channel, `(2, in_features)`."""

    def update(self, x: Tensor) -> None:
        x = wide(x.reshape(-1, x.shape[-1]))
        low, high = x.amin(0), x.amax(0)
        if hasattr(self, "value"):
            low, high = torch.minimum(low, self.value[0]), torch.maximum(high, self.value[1])
        self.value = torch.stack((low, high))


@dataclass(frozen=True)
class LinkScale:
    """Equation 3 at one link.

    Attributes:
        log_scale: `log s`, `(channels,)`. The paper trains `s` and keeps it from zero, which `exp` never reaches.
        shift: `δ`, `(channels,)`; `None` where a module has no bias to take it up.
        rows: The outputs of the source that feed the sinks; all if `None`.
        offset: What the source, a norm, adds to its weight.
    """

    link: Link
    log_scale: Tensor
    shift: Tensor | None
    rows: Tensor | None = None
    offset: float = 0.0

    @property
    def trained(self) -> list[Tensor]:
        return [self.log_scale] if self.shift is None else [self.log_scale, self.shift]

    def apply(self, parameters: Parameters) -> None:
        s, source = self.log_scale.exp(), self.link.source
        if self.shift is not None:
            bias = parameters[f"{source}.bias"]
            rows = torch.arange(len(bias)) if self.rows is None else self.rows
            parameters[f"{source}.bias"] = bias.index_add(
                0, rows.to(bias.device), self.shift.to(bias), alpha=-1
            )
            for name in (*self.link.sinks, *self.link.also):
                moved = parameters[f"{name}.weight"] @ self.shift.to(parameters[f"{name}.weight"])
                parameters[f"{name}.bias"] = parameters[f"{name}.bias"] + moved
        for name in (*self.link.sinks, *self.link.also):
            parameters[f"{name}.weight"] = parameters[f"{name}.weight"] * s
        _scale_rows(parameters, str(source), 1 / s, self.rows, self.offset)


@dataclass(frozen=True)
class ProductScale:
    """Equation 5.

    A rotary embedding turns pairs of channels, half a head apart, so that both must have one scale; the authors' code
    lets them differ, which changes the function. Query heads that read one key head share its scales.

    Attributes:
        log_scale: `log s`, `(key heads, channels)`; of the first half of each head's channels if `rotary`.
        heads: Query heads for each key head.
    """

    query: str
    key: str
    log_scale: Tensor
    rotary: bool
    heads: int

    @property
    def trained(self) -> list[Tensor]:
        return [self.log_scale]

    def apply(self, parameters: Parameters) -> None:
        s = self.log_scale.exp()
        s = torch.cat((s, s), 1) if self.rotary else s
        _scale_rows(parameters, self.key, s.flatten())
        _scale_rows(parameters, self.query, 1 / s.repeat_interleave(self.heads, 0).flatten())


def _scale_rows(
    parameters: Parameters, name: str, s: Tensor, rows: Tensor | None = None, offset: float = 0.0
) -> None:
    """Multiply the output of a norm or a linear layer by `s`, `(channels,)`, or that of some `rows`."""
    weight = parameters[f"{name}.weight"]
    if rows is not None:
        s = torch.ones(len(weight)).to(s).index_put((rows.to(s.device),), s)
    scaled = (weight + offset if offset else weight) * (s if weight.ndim == 1 else s[:, None])
    parameters[f"{name}.weight"] = scaled - offset if offset else scaled
    if (bias := parameters.get(f"{name}.bias")) is not None:
        parameters[f"{name}.bias"] = bias * s


def transformed(parameters: Parameters, edits: Sequence[Edit]) -> Parameters:
    """The parameters that the edits change, by name, after all of them; of the dtype that they had."""
    edited = dict(parameters)
    for edit in edits:
        edit.apply(edited)
    return {name: p.to(parameters[name].dtype) for name, p in edited.items() if p is not parameters[name]}


def initial_edits(block: Block, alpha: float) -> list[Edit]:
    """What a block is transformed with at first: `s = max|X|^α / max|W|^(1−α)`, `δ` in the middle of X's range.

    Links inside the MLP are left alone, as in the paper: where they end, gradients of scales are unstable. Queries and
    keys are scaled only where the scheme quantizes them: rows have scales of their own in a weight's grid.
    """
    norms_and_values = [
        k
        for k in block.scalings
        if block.scalable(k) and (k.source == block.family.value or block.is_norm(k))
    ]
    found = block.observe(ChannelRange, links=norms_and_values)
    edits: list[Edit] = [_link_scale(block, link, ends, alpha) for link, (ends,) in found.items()]
    if block.scheme.bmm is not None or block.scheme.kv is not None:
        edits += _product_scales(block)
    return edits


def _link_scale(block: Block, link: Link, ends: Tensor, alpha: float) -> LinkScale:
    source = block[str(link.source)]
    modules = [source, *block.followers(link)]
    biased = all("bias" in dict(module.named_parameters()) for module in modules)
    shift = ends.mean(0) if biased else None
    x_max = (ends if shift is None else ends - shift).abs().amax(0).clamp(min=1e-5)
    w_max = torch.stack([sink.weight.abs().amax(0) for sink in block.sinks(link)]).amax(0).clamp(min=1e-5)
    log_scale = alpha * x_max.log() - (1 - alpha) * w_max.to(x_max).log()
    offset = gain_offset(source) if block.is_norm(link) else 0.0
    return LinkScale(link, log_scale, shift, block.source_rows(link), offset)


def _product_scales(block: Block) -> list[Edit]:
    family, heads = block.family, block.family.heads
    if family.value is None or family.rotary == "other" or heads is None or heads.fused != "apart":
        return []  # they are clipped, or a rotary embedding turns other channels together than Llama's
    query, key = family.query_key
    attention = block[key.rpartition(".")[0]]
    if set(attention.children()) - {block.linear(name) for name in block.linears}:
        return []  # norms of queries and keys, which undo what is done to the layers before them
    rotary = family.rotary == "halves"
    start = torch.zeros(heads.keys, heads.size // 2 if rotary else heads.size)
    return [
        ProductScale(
            query, key, start.to(wide(block.linear(key).weight)), rotary, heads.queries // heads.keys
        )
    ]
