"""What selections share: which channels, and where they are noted."""

import torch
from torch import Tensor

from qbench.calib.block import Block


def largest(score: Tensor, n: int) -> Tensor:
    """A mask of the `n` largest entries of a vector; of equal ones the first."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[torch.argsort(score, descending=True, stable=True)[:n]] = True
    return mask


def keep(block: Block, name: str, channels: Tensor) -> None:
    """Leave input channels of a layer in floating point, besides those that are left so already.

    `channels` is a mask, `(in,)`. How many there are is in the block's report.
    """
    earlier = block.kept.get(name)
    block.kept[name] = channels if earlier is None else channels | earlier
    block.report.setdefault("kept_channels", {})[name] = int(block.kept[name].sum())


def check_count(method: str, name: str, n: int, in_features: int) -> None:
    """Raise ValueError if a layer would keep all of its input channels."""
    if n >= in_features:
        raise ValueError(
            f"{method} is to keep {n} channels of {name}, which has {in_features}; let it keep fewer of them"
        )
