"""What a decoder block is called with: tensors in tuples and dicts."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def mapped(value: Any, change: Callable[[Any], Any], kinds: tuple[type, ...] = (Tensor,)) -> Any:
    """`value` with everything of these kinds in it, however deep in tuples and dicts, changed."""
    if isinstance(value, kinds):
        return change(value)
    if isinstance(value, tuple):
        return tuple(mapped(v, change, kinds) for v in value)
    if isinstance(value, dict):
        return {k: mapped(v, change, kinds) for k, v in value.items()}
    return value
