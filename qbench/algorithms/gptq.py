"""GPTQ: round one input channel at a time and let the remaining ones make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, arXiv:2210.17323, Algorithm 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qbench.algorithms.base import Algorithm, Choice, Kind
from qbench.calib.block import Block
from qbench.calib.observers import Gram
from qbench.errors import Unsuitable
from qbench.quant.factor import inverse_factor
from qbench.quant.grid import QParams, choose_qparams, round_to_grid
from qbench.quant.mixed import choose_mixed, specs_by_group
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec

Choose = Callable[[Tensor, Tensor, QuantSpec], QParams]


def minmax(columns: Tensor, _: Tensor, spec: QuantSpec) -> QParams:
    """The grid that holds every weight of a group."""
    return choose_qparams(columns, spec)


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
    revision: ClassVar[int] = 2
    uses_bits: ClassVar[bool] = True

    @property
    def uses(self) -> frozenset[Choice]:  # type: ignore[override]
        return super().uses if self.static_groups else frozenset()

    def __post_init__(self) -> None:
        if self.damp <= 0:
            raise ValueError(f"GPTQ's damp is {self.damp}, it must be positive")
        if self.block_size < 1:
            raise ValueError(f"GPTQ's block_size is {self.block_size}, it must be at least 1")

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)
        if self.static_groups:
            return
        for spec in scheme.weights:
            if spec.granularity == "group" and self.act_order:
                raise Unsuitable(
                    "GPTQ with act_order and without static_groups would group columns in their new order",
                    "that needs an index at inference; set algo.static_groups=true or algo.act_order=false",
                )
            if spec.granularity in ("tensor", "block") or spec.scale_format == "e4m3" or spec.scale_bits < 16:
                raise Unsuitable(
                    "GPTQ without static_groups chooses one group's grid at a time",
                    f"in {scheme} groups depend on one another; set algo.static_groups=true",
                )

    @torch.no_grad()
    def process(self, block: Block) -> None:
        passes = block.sequential(Gram) if self.true_sequential else block.observe(Gram).items()
        for link, (gram,) in passes:
            for spec, names in block.alike(link):
                # Layers with one input have one Hessian: they are rounded as one tall weight.
                weights = [block.linear(name).weight for name in names]
                tall, bits = torch.cat(weights).to(gram), block.group_bits.get(names[0])
                rounded, grid = self.solve(
                    tall, gram, spec, block.chosen_grid(names), block.kept_mask(names), bits
                )
                sizes = [len(w) for w in weights]
                for weight, part in zip(weights, rounded.split(sizes), strict=True):
                    weight.copy_(part)
                for name, scale, zero in zip(
                    names, grid.scale.split(sizes), grid.zero.split(sizes), strict=True
                ):
                    one = 1 if spec.granularity == "tensor" else len(scale)  # its rows are one group
                    block.grids[name] = QParams(scale[:one], zero[:one])

    def round(self, w: Tensor, gram: Tensor, spec: QuantSpec, *more: Any, **named: Any) -> Tensor:
        """As `solve`, the weight alone."""
        return self.solve(w, gram, spec, *more, **named)[0]

    def solve(
        self,
        w: Tensor,
        gram: Tensor,
        spec: QuantSpec,
        grid: QParams | None = None,
        kept: Tensor | None = None,
        group_bits: Tensor | None = None,
        choose: Choose = minmax,
    ) -> tuple[Tensor, QParams]:
        """Round `w`, `(out, in)`, given the Gram matrix of its input, `(in, in)`; with the grid, `(out, n_groups, 1)` each.

        Args:
            grid: Fixed in advance by a clipping step, `(out, n_groups, 1)` each.
            kept: Mask of the weights that stay in floating point, `(out, in)`. Channels that are kept whole
                come last, so that they make up for the errors of all others.
            group_bits: The width of each group, `(n_groups,)`, where they differ.
            choose: Without `static_groups`: makes the grid of one group, `(out, 1, 1)` each, from its columns,
                `(out, group_size)`, their `U_jj`, `(group_size,)`, where `U` is the factor of the inverse Hessian,
                and the spec of one row.

        Raises:
            torch.linalg.LinAlgError: If the damped Hessian is not positive definite.
        """
        n = w.shape[1]
        size = spec.group_size or n
        dead = gram.diagonal() == 0  # channels that are never active; any weight serves, zero is on the grid
        w = w.masked_fill(dead if kept is None else dead & ~kept, 0.0)
        ranged = w if kept is None else w.masked_fill(kept, 0.0)
        grid_of_all = grid or choose_mixed(ranged, spec, group_bits)
        scale, zero = (p.to(w).expand(len(w), -1, -1).squeeze(-1).clone() for p in grid_of_all)
        specs = specs_by_group(spec, group_bits, n // size)
        fixed = self.static_groups or grid is not None

        importance = gram.diagonal() if self.act_order else torch.arange(n, 0, -1).to(gram)
        if kept is not None:
            importance = importance.masked_fill(kept.all(0), -1.0)
        order = torch.argsort(importance, descending=True, stable=True)
        factor = inverse_factor(gram, order, self.damp)

        # From here on a column of the weight is a row, which lies together in memory.
        wt, scale, zero = w.T[order].contiguous(), scale.T.contiguous(), zero.T.contiguous()
        del w, ranged  # this copy takes their place
        keep = None if kept is None else kept.T[order]
        groups = (order // size).tolist()
        begun = set[int]()
        for start in range(0, n, self.block_size):
            stop = min(start + self.block_size, n)
            # A block's rows in the weight's precision, so that there is no second matrix beside the factor.
            rows, errors = factor[start:stop].to(wt), torch.empty_like(wt[start:stop])
            for j in range(start, stop):
                g = groups[j]
                if not fixed and g not in begun:
                    begun.add(g)
                    columns = j + (order[j:] // size == g).nonzero().flatten()
                    ahead = wt[columns]
                    # Columns beyond this block still wait for its errors so far.
                    waiting = rows[: j - start, columns] * (columns >= stop)
                    ahead -= waiting.T @ errors[: j - start]
                    if keep is not None:
                        ahead.masked_fill_(keep[columns], 0.0)
                    one = replace(specs[g], granularity="row", group_size=None)
                    scale[g], zero[g] = (
                        p.flatten() for p in choose(ahead.T, factor.diagonal()[columns].to(wt), one)
                    )
                q = round_to_grid(wt[j], scale[g], zero[g], specs[g])
                if keep is not None:
                    q = torch.where(keep[j], wt[j], q)
                errors[j - start] = (wt[j] - q) / rows[j - start, j]
                wt[j:stop].addr_(rows[j - start, j:stop], errors[j - start], alpha=-1)
                wt[j] = q
            wt[stop:].addmm_(rows[:, stop:].T, errors, alpha=-1)
        return wt[torch.argsort(order)].T, QParams(scale.T[..., None], zero.T[..., None])
