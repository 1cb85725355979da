"""OWQ: leave the input channels whose rounding would hurt the output most in floating point, within a budget of bits.

Lee et al., "OWQ: Outlier-Aware Weight Quantization for Efficient Fine-Tuning and Inference of Large Language Models",
AAAI 2024, arXiv:2306.02272: a column's sensitivity is `λ_j ‖ΔW_j‖²`, where `λ` is the diagonal of the Hessian. GPTQ,
which follows, rounds these weak columns last, that is not at all, so that they make up for the errors of all others.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from qbench.algorithms.base import Algorithm, Kind
from qbench.algorithms.selection import check_count, keep, largest
from qbench.calib.block import Block
from qbench.calib.observers import SquareMean
from qbench.quant.grid import fake_quantize
from qbench.quant.scheme import Scheme
from qbench.quant.storage import layer_bits


@dataclass(frozen=True)
class OWQ(Algorithm):
    """Keep the weak columns of each layer.

    Attributes:
        extra_bits: What they may add to the bits per weight of a block, to the nearest column of each layer; each
            layer has an equal part of it. The paper has models of 3.01 and 3.1 bits: 0.01 and 0.1.
        share: Of each layer's input channels, in place of `extra_bits`.
    """

    extra_bits: float = 0.1
    share: float | None = None

    kind: ClassVar[Kind] = "select"

    def __post_init__(self) -> None:
        if self.extra_bits <= 0:
            raise ValueError(f"OWQ's extra_bits is {self.extra_bits}, it must be positive")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(
                f"OWQ's share is {self.share}, it must be between 0 and 1; null leaves it to extra_bits"
            )

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)

    @torch.no_grad()
    def process(self, block: Block) -> None:
        """Raises ValueError if a layer has no more columns than it is to keep, or none is to keep any."""
        counts = self.counts(block)
        if counts and not any(counts.values()):
            raise ValueError(
                f"block {block.index}: OWQ's budget does not pay for one column of any layer; raise extra_bits above "
                f"{self.extra_bits} (large models need less of it), or set share"
            )
        for link, (curvature,) in block.observe(SquareMean).items():
            for name in [n for n in link.sinks if n in counts]:
                weight, spec = block.linear(name).weight.to(curvature), block.weight_spec(name)
                assert spec is not None
                perturbation = (fake_quantize(weight, spec) - weight).square().sum(0)
                check_count("OWQ", name, counts[name], len(curvature))
                keep(block, name, largest(curvature * perturbation, counts[name]))

    def counts(self, block: Block) -> dict[str, int]:
        """How many columns each layer that is to be quantized keeps."""
        specs = {name: spec for name in block.linears if (spec := block.weight_spec(name)) is not None}
        budget = (
            self.extra_bits * sum(block.linear(name).weight.numel() for name in specs) / max(1, len(specs))
        )
        counts = {}
        for name, spec in specs.items():
            rows, columns = block.linear(name).weight.shape
            one = torch.arange(columns) == 0
            price = layer_bits(spec, rows, columns, one) - layer_bits(spec, rows, columns)
            counts[name] = round(budget / price) if self.share is None else round(self.share * columns)
        return counts
