"""AdaDim: let groups run along the input channels or along the output channels, whichever hurts a layer less.

Heo et al., "Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large Language
Models", ICLR 2024, arXiv:2309.15531. An input channel with large activations makes its weights matter more than
their neighbours in a row; with a scale of its own (per-IC quantization) it does not share a grid with them. The error
is that of the layer's output; in the authors' code that of the module around it for q, k, v and gate, up.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qbench.algorithms.base import Algorithm, Choice, Kind
from qbench.algorithms.gptq import GPTQ
from qbench.calib.block import Block
from qbench.calib.observers import Gram
from qbench.errors import Unsuitable
from qbench.quant.grid import QParams, choose_qparams, fake_quantize
from qbench.quant.output_error import output_error
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec
from qbench.quant.storage import layer_bits


@dataclass(frozen=True)
class AdaDim(Algorithm):
    """Choose for each layer between groups along the input channels, as ever, and along the output channels.

    A layer whose output channels do not divide into groups keeps the former. The report lists the layers that took the
    latter, `per_input`.

    Attributes:
        compensate: Round by GPTQ (the paper's GPTQ-ada), on the grids of the unrounded weights and in GPTQ's own
            defaults; otherwise to nearest (RTN-ada). The choice is made by the latter's errors in both.
    """

    compensate: bool = False

    kind: ClassVar[Kind] = "round"
    uses: ClassVar[frozenset[Choice]] = frozenset()
    uses_kept: ClassVar[bool] = False
    on_grid: ClassVar[bool] = False

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)
        if any(spec.granularity not in ("row", "group") for spec in scheme.weights):
            raise Unsuitable(
                "AdaDim turns rows or groups by a right angle",
                f"the scheme is {scheme}; set weight_granularity=auto",
            )

    @torch.no_grad()
    def process(self, block: Block) -> None:
        turned = []
        for link, (gram,) in block.sequential(Gram):
            for name in link.sinks:
                if (spec := block.weight_spec(name)) is None:
                    continue
                weight = block.linear(name).weight
                rounded, grid = self.round(weight.to(gram), gram, spec)
                weight.copy_(rounded)
                if grid is not None:
                    block.grids[name] = grid
                else:
                    turned.append(name)
                    block.stored_bits[name] = layer_bits(spec, weight.shape[1], weight.shape[0])
        block.report["per_input"] = turned

    def round(self, w: Tensor, gram: Tensor, spec: QuantSpec) -> tuple[Tensor, QParams | None]:
        """`w`, `(out, in)`, rounded the better way, and its grid; `None` where groups are along the output channels.

        Args:
            gram: Gram matrix of the layer's input, `(in, in)`.
        """
        grid = choose_qparams(w, spec)
        rounded = fake_quantize(w, spec, grid)
        if len(w) % (spec.group_size or 1) == 0:
            across = fake_quantize(w.T.contiguous(), spec).T
            along_error, across_error = (output_error(q - w, gram).sum() for q in (rounded, across))
            if across_error < along_error:
                return (self._across(w, gram, spec) if self.compensate else across), None
        return GPTQ().solve(w, gram, spec) if self.compensate else (rounded, grid)

    @staticmethod
    def _across(w: Tensor, gram: Tensor, spec: QuantSpec) -> Tensor:
        """By GPTQ, with groups along the output channels."""
        # A column meets as many grids as it has groups: to GPTQ, every column is a group, and every row has a grid.
        each = replace(spec, granularity="group", group_size=1)
        parts = choose_qparams(w.T.contiguous(), spec)
        size = spec.group_size or len(w)
        grid = QParams(*(p.squeeze(-1).repeat_interleave(size, 1).T[..., None] for p in parts))
        return GPTQ().round(w, gram, each, grid)
