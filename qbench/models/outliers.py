"""Plant outlier channels in a model without changing what it computes.

Models of billions of parameters carry a few channels of their hidden states that are tens of times larger than
the others, in every block the same ones (Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for
Transformers at Scale", NeurIPS 2022, arXiv:2208.07339), and the gains of their norms amplify them (Wei et al.,
"Outlier Suppression", NeurIPS 2022, arXiv:2209.13325). Small models do not; here the gains get them: with D
diagonal, `W x = (W D⁻¹)(D x)`, and the quantizer meets `D x`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qbench.models.blocks import each_block
from qbench.models.family import Family, Link, family_of
from qbench.models.surgery import migrate_scale

SHARE = 64  # one hidden channel in so many is an outlier
LEAST = 2
_SEED = 0


def outlier_channels(hidden_size: int) -> Tensor:
    """The channels that are made outliers, ascending: one in `SHARE`, at least `LEAST`; a function of the width."""
    order = torch.randperm(hidden_size, generator=torch.Generator().manual_seed(_SEED))
    return order[: max(hidden_size // SHARE, LEAST)].sort().values


def norm_links(model: Any) -> tuple[Link, ...]:
    """The links of a block whose source is a norm; a skeleton will do.

    Raises:
        NotImplementedError: If there is none, or the architecture is not described.
    """
    family = family_of(model)
    links = _planted(family, model.get_submodule(family.blocks)[0])
    if not links:
        raise NotImplementedError(
            "outliers are planted in norms that feed linear layers alone, and this model has none "
            "(post-norm blocks); set model.outliers=null"
        )
    return links


def _planted(family: Family, block: nn.Module) -> tuple[Link, ...]:
    return tuple(link for link in family.norm_links(block) if link.source in family.norms)


def plant_outliers(model: Any, factor: float) -> None:
    """Multiply a few channels of every norm's output by `factor` and divide the columns that read them, in place.

    The channels are `outlier_channels` in every block. What the model computes is unchanged: exactly where
    `factor` is a power of two, which only moves exponents, otherwise to rounding in the model's dtype.

    Raises:
        NotImplementedError: If no norm of the model feeds linear layers alone.
    """
    family = family_of(model)
    norm_links(model)
    for block in each_block(model, family.blocks):
        for link in _planted(family, block):
            followers = [block.get_submodule(name) for name in (*link.sinks, *link.also)]
            first = block.get_submodule(link.sinks[0]).get_parameter("weight")
            s = torch.ones(first.shape[1], dtype=torch.float64, device=first.device)
            s[outlier_channels(len(s)).to(s.device)] = 1 / factor
            migrate_scale(block.get_submodule(link.source), followers, s)
