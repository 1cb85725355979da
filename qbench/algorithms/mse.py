"""Narrow each group's range until the rounded weights are nearest to the weights themselves.

The `mse` option of the authors' code of GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323) and of LLMC (Gong et al.,
EMNLP 2024, arXiv:2405.06001), with their constants.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from qbench.algorithms.base import Algorithm, Choice, Kind
from qbench.calib.block import Block
from qbench.calib.observers import Gram
from qbench.errors import Unsuitable
from qbench.quant.ranges import search_range
from qbench.quant.scheme import Scheme


@dataclass(frozen=True)
class MSEClip(Algorithm):
    """Choose each group's grid to minimize `Σ |ŵ − w|^p`.

    Attributes:
        n_grid: Steps from the whole range to none (`grid`).
        max_shrink: Share of those steps tried (`maxshrink`).
        p: Of the norm (`norm`); 2.4 weighs large errors more than squares would.
        apart: Shrink both ends of an asymmetric range independently, which tries the square of that number of ranges.
        weighted: Count each channel's errors by the mean square of its input, the diagonal of the Gram matrix. This
            needs data; with `p=2` it is the output error without what channels have in common.
    """

    n_grid: int = 100
    max_shrink: float = 0.8
    p: float = 2.4
    apart: bool = False
    weighted: bool = False

    kind: ClassVar[Kind] = "clip"
    uses: ClassVar[frozenset[Choice]] = frozenset()

    def __post_init__(self) -> None:
        if not 0 < self.max_shrink < 1 or self.max_shrink * self.n_grid < 1:
            raise ValueError(
                f"MSE clipping tries n_grid * max_shrink = {self.n_grid} * {self.max_shrink} ranges; "
                "max_shrink must be between 0 and 1, and their product at least 1"
            )
        if self.p <= 0:
            raise ValueError(f"MSE clipping has p={self.p}, it must be positive")

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        return self.weighted

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)
        if self.apart and any(spec.symmetric for spec in scheme.weights):
            raise Unsuitable(
                "a symmetric grid has one range, not two ends",
                f"the scheme is {scheme}; set apart=false, or weight_symmetric=false",
            )

    @torch.no_grad()
    def process(self, block: Block) -> None:
        grams = block.observe(Gram) if self.weighted else {}
        for link in block.links:
            weight = grams[link][0].diagonal() if self.weighted else None
            for name in link.sinks:
                if (spec := block.weight_spec(name)) is None:
                    continue
                w, kept = block.linear(name).weight, block.kept_mask((name,))
                block.grids[name] = search_range(
                    w if kept is None else w.masked_fill(kept, 0.0), spec, weight,
                    self.n_grid, self.max_shrink, self.p, asymmetric=self.apart,
                )  # fmt: skip
