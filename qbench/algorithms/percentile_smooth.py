"""Percentile clipping smoothing: bring the few channels with the largest activations down to a percentile.

Zhang et al., "Dual Grained Quantization: Efficient Fine-Grained Quantization for LLM", arXiv:2310.04836, where it
comes before the dual-grained grids of `dgq`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from qbench.algorithms.base import Algorithm, Kind
from qbench.calib.block import Block
from qbench.calib.observers import AbsMax
from qbench.errors import Unsuitable
from qbench.quant.scheme import Scheme


@dataclass(frozen=True)
class PercentileSmooth(Algorithm):
    """Divide the channels whose largest activation exceeds a percentile of all channels', so that it equals that.

    Acts on the outputs of norms and on the input of the MLP's last layer. The authors leave the latter alone in OPT.

    Attributes:
        share: Of the channels that are scaled; the percentile is 100 (1 − share).
    """

    share: float = 0.005

    kind: ClassVar[Kind] = "transform"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"percentile smoothing has share={self.share}, it must be between 0 and 1")

    def check(self, scheme: Scheme) -> None:
        if not scheme.activations:
            raise Unsuitable(
                "percentile smoothing needs activation bits",
                f"the scheme is {scheme}; set abits=8, or leave it out with algo.steps.smooth=null",
            )

    @torch.no_grad()
    def process(self, block: Block) -> None:
        links = [k for k in block.scalings if block.scalable(k) and k.source != block.family.value]
        for link, (peak,) in block.observe(AbsMax, links=links).items():
            rank = int(len(peak) * self.share + 1.5)  # of the largest channel that stays as it is
            level = peak.topk(rank).values[-1].clamp(min=1e-4)
            block.migrate(link, (peak / level).clamp(min=1.0))
