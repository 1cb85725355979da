"""A model's decoder blocks, in memory or on disk (`qbench.models.disk`), one after another."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from qbench.models import disk
from qbench.models.family import family_of


def at_hand(model: Any, index: int) -> AbstractContextManager[nn.Module]:
    """A block with its weights in memory while the context lasts; edits stay."""
    return disk.at_hand(model, family_of(model).blocks, index)


def each_block(model: Any, path: str) -> Iterator[nn.Module]:
    """The blocks in turn, each with its weights in memory until the next is asked for; edits stay."""
    for index in range(len(model.get_submodule(path))):
        with disk.at_hand(model, path, index) as block:
            yield block
