"""AWQ's clipping: shrink each group's range to the fraction that hurts the group's share of the output least.

Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and
Acceleration", MLSys 2024, arXiv:2306.00978; it is in the authors' code rather than in the paper. How an asymmetric
range is clipped: Gong et al., "LLMC: Benchmarking Large Language Model Quantization with a Versatile Compression
Toolkit", EMNLP 2024, arXiv:2405.06001.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qbench.algorithms.base import Algorithm, Choice, Kind
from qbench.calib.block import Block
from qbench.calib.observers import Gram
from qbench.errors import Unsuitable
from qbench.quant.grid import QParams
from qbench.quant.output_error import Ends, Range, search_range_by_output
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec


@dataclass(frozen=True)
class AWQClip(Algorithm):
    """Choose each group's grid by the group's share of the output error, on the calibration data.

    Queries and keys are left alone, as in the authors' code: their errors meet in a product.

    Attributes:
        n_grid: Steps from the whole range to none.
        max_shrink: Share of those steps tried: 0.5 tries 1, 0.95, … 0.55 of the range.
        ends: `"together"`: both ends of an asymmetric range shrink by one fraction, as in LLMC (`clip_sym: false`).
            `"apart"`: each by its own, which tries the square of that number of ranges. `"magnitude"`: whatever lies
            beyond a fraction of max|w| is cut off on both sides, as in the authors' code. On a symmetric grid the
            first and the last are the same.
    """

    n_grid: int = 20
    max_shrink: float = 0.5
    ends: Literal["together", "apart", "magnitude"] = "together"

    kind: ClassVar[Kind] = "clip"
    uses: ClassVar[frozenset[Choice]] = frozenset()
    revision: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not 0 < self.max_shrink < 1 or self.max_shrink * self.n_grid < 1:
            raise ValueError(
                f"AWQ's clip tries n_grid * max_shrink = {self.n_grid} * {self.max_shrink} ranges; "
                "max_shrink must be between 0 and 1, and their product at least 1"
            )
        if self.ends not in ("together", "apart", "magnitude"):
            raise ValueError(f"AWQ's clip has ends={self.ends!r}; choose 'together', 'apart' or 'magnitude'")

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)
        if self.ends == "apart" and any(spec.symmetric for spec in scheme.weights):
            raise Unsuitable(
                "a symmetric grid has one range, not two ends",
                f"the scheme is {scheme}; set ends=together, or weight_symmetric=false",
            )

    @torch.no_grad()
    def process(self, block: Block) -> None:
        for link, (gram,) in block.observe(Gram).items():
            for name in link.sinks:
                spec = block.weight_spec(name)
                if spec is None or name in block.family.query_key:
                    continue
                w, kept = block.linear(name).weight.to(gram), block.kept_mask((name,))
                w = w if kept is None else w.masked_fill(kept, 0.0)
                block.grids[name] = self.clip(w, gram, spec)

    def clip(self, w: Tensor, gram: Tensor, spec: QuantSpec) -> QParams:
        """For each group of `w`, `(out, in)`, the grid of the best of the tried ranges."""
        return search_range_by_output(w, gram, spec, self._ranges())

    def _ranges(self) -> Iterator[Range]:
        kept = [1 - step / self.n_grid for step in range(int(self.max_shrink * self.n_grid))]
        if self.ends == "apart":
            return (shrunk(low, high) for low, high in product(kept, repeat=2))
        return (shrunk(f, f) if self.ends == "together" else _cut_off(f) for f in kept)


def shrunk(lower: float, upper: float) -> Range:
    """Keeps these fractions of a range's ends."""
    return lambda low, high: (low * lower, high * upper)


def _cut_off(fraction: float) -> Range:
    def ends(low: Tensor, high: Tensor) -> Ends:
        most = torch.maximum(low.abs(), high.abs()) * fraction
        return torch.maximum(low, -most), torch.minimum(high, most)

    return ends
