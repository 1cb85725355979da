"""LLM.int8(): leave the input channels with large activations in floating point, and round the rest to 8 bits.

Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", NeurIPS 2022, arXiv:2208.07339,
Equation 8: the set `O` of outlier dimensions. The scheme brings the rest: weights per channel and activations per
token, both symmetric (`scheme=w8a8`).

The paper finds the outliers of each input anew, so that all weights must be at hand in floating point as well. Here
they are found once, in the calibration data: the set holds whatever any of its samples would have had.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from qbench.algorithms.base import Algorithm, Kind
from qbench.algorithms.selection import keep
from qbench.calib.block import Block
from qbench.calib.observers import AbsMax
from qbench.errors import Unsuitable
from qbench.quant.scheme import Scheme


@dataclass(frozen=True)
class LLMInt8(Algorithm):
    """Keep each input channel that once reaches a magnitude, with its column of the weight.

    Attributes:
        threshold: The magnitude (the paper's `α`).
    """

    threshold: float = 6.0

    kind: ClassVar[Kind] = "select"

    def __post_init__(self) -> None:
        if self.threshold <= 0:
            raise ValueError(f"LLM.int8()'s threshold is {self.threshold}, it must be positive")

    def check(self, scheme: Scheme) -> None:
        if not scheme.activations:
            raise Unsuitable(
                "LLM.int8() needs activation bits", f"the scheme is {scheme}; set e.g. abits=8 or scheme=w8a8"
            )

    @torch.no_grad()
    def process(self, block: Block) -> None:
        for link, (peak,) in block.observe(AbsMax).items():
            for name in link.sinks:
                keep(block, name, peak >= self.threshold)
