"""QUIK: leave a fixed number of input channels, those with the largest activations, in floating point.

Ashkboos et al., "QUIK: Towards End-to-End 4-Bit Inference on Generative Large Language Models", EMNLP 2024,
arXiv:2310.09259, Section 3.2. GPTQ, which follows, rounds the columns of these channels last, that is not at all, so
that they make up for the errors of all others. The paper gives `down_proj` eight bits: `scheme.overrides`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from qbench.algorithms.base import Algorithm, Kind
from qbench.algorithms.selection import check_count, keep, largest
from qbench.calib.block import Block
from qbench.calib.observers import AbsMax
from qbench.quant.scheme import Scheme


@dataclass(frozen=True)
class QUIK(Algorithm):
    """Keep the input channels with the largest `max|x|`, with their columns of the weight.

    Attributes:
        share: Of a layer's input channels, at least one. The paper keeps 256 of the 4096 of LLaMA-2-7B, and as large a
            share of `down_proj`'s.
        n_outliers: The number itself, the same for all layers, in place of `share`.
    """

    share: float = 1 / 16
    n_outliers: int | None = None

    kind: ClassVar[Kind] = "select"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"QUIK's share is {self.share}, it must be between 0 and 1")
        if self.n_outliers is not None and self.n_outliers < 1:
            raise ValueError(
                f"QUIK's n_outliers is {self.n_outliers}, it must be at least 1; null leaves it to share"
            )

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)

    @torch.no_grad()
    def process(self, block: Block) -> None:
        """Raises ValueError if a layer has no more channels than it is to keep."""
        for link, (peak,) in block.observe(AbsMax).items():
            n = max(1, round(self.share * len(peak))) if self.n_outliers is None else self.n_outliers
            for name in link.sinks:
                check_count("QUIK", name, n, len(peak))
                keep(block, name, largest(peak, n))
