"""Outlier Suppression+: centre each channel of the activations, then shrink the channels that stick out.

Wei et al., "Outlier Suppression+: Accurate Quantization of Large Language Models by Equivalent and Optimal Shifting
and Scaling", EMNLP 2023, arXiv:2304.09145: shift `z = (max + min) / 2`, scale `s = max(1, max|X − z| / t)`, with the
threshold t of the least output error, activations and weights quantized. In the paper the error of q, k, v is that of
attention's output; here it is that of the linear layers, on a sample of tokens.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from qbench.algorithms.base import Algorithm, Kind
from qbench.algorithms.let import ChannelRange
from qbench.calib.block import Block
from qbench.calib.sample import TokenSample
from qbench.errors import Unsuitable
from qbench.models.family import Link
from qbench.quant.grid import choose_qparams, fake_quantize, wide
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec


@dataclass(frozen=True)
class Layers:
    """Layers with one input and the same grids, as one tall layer, `(out, in)`."""

    weight: Tensor
    weight_spec: QuantSpec | None
    activation_spec: QuantSpec | None

    def output(self, x: Tensor, s: Tensor, ends: Tensor) -> Tensor:
        """What they make of `x / s` with weights times `s`, all quantized; `ends` are the channels' ranges."""
        w, x = self.weight * s, x / s
        if (spec := self.activation_spec) is not None:
            x = fake_quantize(x, spec, None if spec.dynamic else choose_qparams(ends / s, spec))
        if self.weight_spec is not None:
            w = fake_quantize(w, self.weight_spec)
        return x @ w.T


@dataclass(frozen=True)
class OutlierSuppressionPlus(Algorithm):
    """Shift and scale the outputs of norms. Only norms and layers that have biases are shifted.

    Attributes:
        n_grid: Thresholds that are tried, from the largest activation down to `least`; as many as needed so that
            they are at most `step` apart, if that is more.
        least: The lowest threshold: 0.1 in the authors' code for LLaMA, 1.0 in that for OPT and BLOOM.
        step: See `n_grid`.
        n_tokens: Of the calibration data, evenly spread, that errors are measured on.
    """

    n_grid: int = 100
    least: float = 0.1
    step: float = 0.5
    n_tokens: int = 512

    kind: ClassVar[Kind] = "transform"

    def __post_init__(self) -> None:
        if self.n_grid < 1 or self.least <= 0 or self.step <= 0 or self.n_tokens < 1:
            raise ValueError(
                f"Outlier Suppression+ has n_grid={self.n_grid}, least={self.least}, step={self.step}, "
                f"n_tokens={self.n_tokens}; all must be positive"
            )

    def check(self, scheme: Scheme) -> None:
        if not scheme.activations:
            raise Unsuitable(
                "Outlier Suppression+ needs activation bits",
                f"the scheme is {scheme}; set e.g. abits=8 or scheme=w8a8",
            )

    @torch.no_grad()
    def process(self, block: Block) -> None:
        norms = [k for k in block.scalings if block.scalable(k) and block.is_norm(k)]
        if not norms:
            raise NotImplementedError(
                "Outlier Suppression+ found no norm that feeds linear layers alone (post-norm blocks have none); "
                "use algo=rtn"
            )
        assert block.inputs is not None
        n_samples, seq_len = block.inputs.hidden.shape[:2]
        sample = partial(TokenSample, -(-n_samples * seq_len // self.n_tokens))
        layers = {link: found for link in norms if (found := _layers(block, link))}
        for link, (ends, x) in block.observe(ChannelRange, sample, links=list(layers)).items():
            source, followers, ends = block[str(link.source)], block.followers(link), wide(ends)
            if all("bias" in dict(module.named_parameters()) for module in (source, *followers)):
                shift = ends.mean(0)
                migrate_shift(source, followers, shift)
                ends, x = ends - shift, x - shift
            block.migrate(link, self.search(layers[link], x, ends))

    def search(self, layers: list[Layers], x: Tensor, ends: Tensor) -> Tensor:
        """The best scales for the layers that read `x`, `(n_tokens, in)`, shape `(in,)`.

        Args:
            ends: Lowest and highest value of each channel on all the data, `(2, in)`.
        """
        reach = ends.abs().amax(0)
        top = float(reach.max())
        if top <= self.least:
            return torch.ones_like(reach)
        n = max(self.n_grid, int(top / self.step))
        thresholds = [top - i * (top - self.least) / n for i in range(n + 1)]
        targets = [x @ alike.weight.T for alike in layers]
        errors = x.new_zeros(n + 1)
        for i, t in enumerate(thresholds):
            for alike, y in zip(layers, targets, strict=True):
                errors[i] += (alike.output(x, _scale(reach, t), ends) - y).square().sum()
        return _scale(reach, thresholds[int(errors.argmin())])


def _scale(reach: Tensor, threshold: float) -> Tensor:
    return (reach / threshold).clamp(min=1.0)


def _layers(block: Block, link: Link) -> list[Layers]:
    names: dict[tuple[QuantSpec | None, QuantSpec | None], list[str]] = {}
    for name in link.sinks:
        names.setdefault((block.weight_spec(name), block.activation_spec(name)), []).append(name)
    return [
        Layers(wide(torch.cat([block.linear(n).weight for n in group])), *specs)
        for specs, group in names.items()
        if any(specs)
    ]


@torch.no_grad()
def migrate_shift(source: nn.Module, readers: list[nn.Module], z: Tensor) -> None:
    """Subtract `z`, `(channels,)`, from the output of `source` and have the readers' biases make up for it, in place.

    Raises:
        AttributeError: If `source` has no bias.
    """
    bias = source.get_parameter("bias")
    bias.copy_(bias.double() - z.double())
    for reader in readers:
        weight, own = reader.get_parameter("weight"), reader.get_parameter("bias")
        own.copy_(own.double() + weight.double() @ z.double())
