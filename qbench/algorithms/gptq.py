"""GPTQ: round one input channel at a time and let the remaining ones make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, arXiv:2210.17323, Algorithm 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qbench.algorithms.base import Algorithm, Kind
from qbench.calib.observers import Gram
from qbench.calib.stream import Block
from qbench.errors import Unsuitable
from qbench.quant.affine import QParams, choose_qparams, round_to_grid
from qbench.quant.scheme import QuantSpec, Scheme


@dataclass(frozen=True)
class GPTQ(Algorithm):
    """Second-order weight rounding.

    Attributes:
        damp: Added to the Hessian's diagonal, as a fraction of its mean (`percdamp`).
        block_size: Columns updated lazily together; affects speed only.
        act_order: Round columns by decreasing Hessian diagonal (`actorder`, `desc_act`).
        static_groups: Take every group's grid from the unrounded weight. Otherwise a group's grid is
            taken when its first column is reached, from a weight that makes up for earlier errors.
        true_sequential: Refresh statistics after each group of layers, so that later layers see the
            rounding of earlier ones in the same block.
    """

    damp: float = 0.01
    block_size: int = 128
    act_order: bool = True
    static_groups: bool = True
    true_sequential: bool = True

    kind: ClassVar[Kind] = "round"

    def __post_init__(self) -> None:
        if self.damp <= 0:
            raise ValueError(f"GPTQ's damp is {self.damp}, it must be positive")
        if self.block_size < 1:
            raise ValueError(f"GPTQ's block_size is {self.block_size}, it must be at least 1")

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)
        grouped = scheme.weight is not None and scheme.weight.granularity == "group"
        if grouped and self.act_order and not self.static_groups:
            raise Unsuitable(
                "GPTQ with act_order and without static_groups would group columns in their new order",
                "that needs an index at inference; set algo.static_groups=true or algo.act_order=false",
            )

    @torch.no_grad()
    def process(self, block: Block, scheme: Scheme) -> None:
        if scheme.weight is None:
            return
        links = list(block.family.links)
        for group in [[link] for link in links] if self.true_sequential else [links]:
            for link, (gram,) in block.observe(Gram, links=group).items():
                # Layers with one input have one Hessian: they are rounded as one tall weight.
                weights = [sink.weight for sink in block.sinks(link)]
                rounded = self.round(torch.cat(weights).to(gram), gram, scheme.weight)
                for weight, part in zip(weights, rounded.split([len(w) for w in weights]), strict=True):
                    weight.copy_(part)

    def round(self, w: Tensor, gram: Tensor, spec: QuantSpec) -> Tensor:
        """Round `w`, `(out, in)`, given the Gram matrix of its input, `(in, in)`.

        Raises:
            torch.linalg.LinAlgError: If the damped Hessian is not positive definite.
        """
        n = w.shape[1]
        size = spec.group_size or n
        dead = gram.diagonal() == 0  # channels that are never active; any weight serves, zero is on the grid
        w = w.masked_fill(dead, 0.0)
        scale, zero = (p.expand(len(w), -1, -1).squeeze(-1).clone() for p in choose_qparams(w, spec))

        order = torch.arange(n, device=w.device)
        if self.act_order:
            order = torch.argsort(gram.diagonal(), descending=True, stable=True)
        factor = self._inverse_factor(gram + torch.diag(dead.to(gram)), order).to(w)

        # From here on a column of the weight is a row, which lies together in memory.
        wt, scale, zero = w.T[order].contiguous(), scale.T.contiguous(), zero.T.contiguous()
        group = (order // size).tolist()
        q = torch.empty_like(wt)
        for start in range(0, n, self.block_size):
            stop = min(start + self.block_size, n)
            errors = torch.empty_like(wt[start:stop])
            for j in range(start, stop):
                g = group[j]
                if not self.static_groups and j % size == 0:
                    ahead = wt[j : j + size].clone()
                    if j + size > stop:  # columns beyond this block still wait for its errors so far
                        ahead[stop - j :] -= factor[start:j, stop : j + size].T @ errors[: j - start]
                    scale[g], zero[g] = (p.flatten() for p in self._grid(ahead.T, spec))
                q[j] = round_to_grid(wt[j], scale[g], zero[g], spec)
                errors[j - start] = (wt[j] - q[j]) / factor[j, j]
                wt[j:stop].addr_(factor[j, j:stop], errors[j - start], alpha=-1)
            wt[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        return q[torch.argsort(order)].T

    @staticmethod
    def _grid(columns: Tensor, spec: QuantSpec) -> QParams:
        return choose_qparams(columns, QuantSpec(spec.bits, spec.symmetric))

    def _inverse_factor(self, gram: Tensor, order: Tensor) -> Tensor:
        """Upper Cholesky factor of the damped inverse; row `j` says how column `j`'s error spreads."""
        gram = gram[order][:, order].double()
        damped = gram + self.damp * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            raise torch.linalg.LinAlgError(
                f"GPTQ: the damped Hessian of {len(gram)} inputs is not positive definite (minor {int(failed)}); "
                f"raise algo.damp above {self.damp}, or calibrate with more tokens"
            )
        return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
