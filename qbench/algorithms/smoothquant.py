"""SmoothQuant: move the activations' outliers into the weights.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", ICML 2023, arXiv:2211.10438, Equation 4.
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
class SmoothQuant(Algorithm):
    """Divide each normalized channel by `s = max|X|^α / max|W|^(1−α)`.

    The paper smooths the outputs of norms only: the inputs of q, k, v and of the first layers of the MLP.

    Attributes:
        alpha: Share of the difficulty moved into the weights; 0.5 balances both.
    """

    alpha: float = 0.5

    kind: ClassVar[Kind] = "transform"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"SmoothQuant's alpha is {self.alpha}, it must be between 0 and 1")

    def check(self, scheme: Scheme) -> None:
        if not scheme.activations:
            raise Unsuitable(
                "SmoothQuant needs activation bits",
                f"the scheme is {scheme}; set e.g. abits=8 or scheme=w8a8",
            )

    @torch.no_grad()
    def process(self, block: Block) -> None:
        links = block.family.norm_links(block.layer)
        if not links:
            raise NotImplementedError(
                "SmoothQuant found no norm that feeds linear layers alone (post-norm blocks have none); use algo=rtn"
            )
        for link, (x_max,) in block.observe(AbsMax, links=links).items():
            sinks = block.sinks(link)
            w_max = torch.stack([sink.weight.abs().amax(0) for sink in sinks]).amax(0).to(x_max)
            s = x_max.clamp(min=1e-5) ** self.alpha / w_max.clamp(min=1e-5) ** (1 - self.alpha)
            block.migrate(link, s.clamp(min=1e-5))
