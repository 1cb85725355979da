"""DGQ: groups of 4 bits inside rows of 8 bits, so that integer arithmetic serves a whole row.

Zhang et al., "Dual Grained Quantization: Efficient Fine-Grained Quantization for LLM", arXiv:2310.04836. A group's
scale is an integer times the row's: `ŵ = unit · m · (q − z)`, and `m (q − z)` are the int8 weights that kernels
multiply with int8 activations. Ranges are searched in two phases: each group's, then each row's unit.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.algorithms.awq_clip import shrunk
from qbench.algorithms.base import Algorithm, Choice, Kind
from qbench.calib.block import Block
from qbench.calib.observers import Gram
from qbench.errors import Unsuitable
from qbench.quant.grid import QParams, grouped, round_to_grid
from qbench.quant.output_error import output_error, row_chunks, search_range_by_output
from qbench.quant.scheme import Scheme
from qbench.quant.spec import SCALE_BITS, QuantSpec
from qbench.quant.storage import layer_bits

INT8 = 127
MULTIPLE_BITS = 8  # of a group's integer


@dataclass(frozen=True)
class DGQ(Algorithm):
    """Choose grids whose scales are multiples of the row's, and whose every point is an int8 number of the row's units.

    The authors narrow the codes where `m (q − z)` would not fit into int8; here `m` is narrowed.

    Attributes:
        n_grid, shrink: Ranges tried for a group: from all of it down to `1.02 − shrink`, in steps of `shrink / n_grid`.
        n_units, shrink_units: The same for a row's unit, where all of it is the largest weight / 127.
    """

    n_grid: int = 20
    shrink: float = 0.22
    n_units: int = 80
    shrink_units: float = 0.82

    kind: ClassVar[Kind] = "clip"
    chooses: ClassVar[frozenset[Choice]] = frozenset({"scales", "multiples"})
    uses: ClassVar[frozenset[Choice]] = frozenset()

    def __post_init__(self) -> None:
        if min(self.n_grid, self.n_units) < 1 or not all(0 < s < 1 for s in (self.shrink, self.shrink_units)):
            raise ValueError(
                f"DGQ has n_grid={self.n_grid}, shrink={self.shrink}, n_units={self.n_units}, "
                f"shrink_units={self.shrink_units}; counts must be at least 1, shares between 0 and 1"
            )

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)
        for spec in scheme.weights:
            plain = spec.format == "int" and spec.scale_bits == 16 and not spec.real_zero
            if spec.granularity != "group" or not plain or not 2 <= spec.bits <= 4:
                raise Unsuitable(
                    "DGQ puts groups of 2 to 4 bits inside int8",
                    f"the scheme is {scheme}; set e.g. wbits=4 abits=8 group_size=128, and no other format",
                )

    @torch.no_grad()
    def process(self, block: Block) -> None:
        for link, (gram,) in block.observe(Gram).items():
            for name in link.sinks:
                if (spec := block.weight_spec(name)) is None:
                    continue
                w, kept = block.linear(name).weight.to(gram), block.kept_mask((name,))
                block.grids[name] = self.grid(w if kept is None else w.masked_fill(kept, 0.0), gram, spec)
                bits = layer_bits(spec, w.shape[0], w.shape[1], block.kept.get(name))
                # A group has an integer in place of its scale, and a row a scale.
                bits += (MULTIPLE_BITS - SCALE_BITS["float16"]) * block.grids[name].scale.numel()
                block.stored_bits[name] = bits + SCALE_BITS["float16"] * len(w)

    def grid(self, w: Tensor, gram: Tensor, spec: QuantSpec) -> QParams:
        """Grids for `w`, `(out, in)`, given the Gram matrix of its input, `(in, in)`."""
        ratios = [min(1.02 - i / self.n_grid * self.shrink, 1.0) for i in range(1, self.n_grid + 1)]
        scale, zero = search_range_by_output(w, gram, spec, [shrunk(r, r) for r in ratios])
        chunks = row_chunks(w, spec)
        multiples = [
            self._multiples(w[rows], QParams(scale[rows], zero[rows]), gram, spec) for rows in chunks
        ]
        return QParams(torch.cat(multiples), zero)

    def _multiples(self, w: Tensor, wished: QParams, gram: Tensor, spec: QuantSpec) -> Tensor:
        """Scales near the wished ones that are multiples of the best unit of each row."""
        g, scale, zero = grouped(w, spec), *wished
        most = INT8 // torch.maximum(zero - spec.qmin, spec.qmax - zero)
        whole = w.abs().amax(1)[:, None, None] / INT8
        whole = torch.where(whole > 0, whole, scale[:, :1])  # rows of zeros: any unit serves
        best, least = scale, torch.full_like(w[:, 0], torch.inf)
        for i in range(1, self.n_units + 1):
            unit = whole * (1.02 - i / self.n_units * self.shrink_units)
            tried = unit * torch.minimum((scale / unit).round().clamp(min=1), most)
            delta = round_to_grid(g, tried, zero, spec) - g
            error = output_error(delta.view_as(w), gram)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better[:, None, None], tried, best)
        return best
