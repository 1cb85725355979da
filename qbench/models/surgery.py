"""Edits that leave the function of a model unchanged.

Each edit multiplies one weight and divides another, so that a quantizer meets easier numbers.
They run in float64 and in place.
"""

import torch
from torch import Tensor, nn

from qbench.models.rotate import is_rotated_online


@torch.no_grad()
def scale_columns(linear: nn.Linear, s: Tensor) -> None:
    """`W ← W diag(s)`: the layer now expects its input divided by `s`, shape `(in_features,)`."""
    linear.weight.copy_(linear.weight.double() * s.double())


@torch.no_grad()
def scale_rows(module: nn.Module, s: Tensor) -> None:
    """Multiply the output of a norm or a linear layer by `s`, shape `(out_features,)`."""
    for parameter in module.parameters(recurse=False):  # weight, and bias where there is one
        shape = (-1,) + (1,) * (parameter.ndim - 1)
        parameter.copy_(parameter.double() * s.double().view(shape))


def migrate_scale(source: nn.Module, sinks: list[nn.Linear], s: Tensor) -> None:
    """Divide the output of `source` by `s` and multiply the sinks' input columns by it.

    Raises:
        ValueError: If `source` does not have one output channel per scale. Under grouped-query
            attention a value head feeds several output heads, so that link cannot be scaled. Nor can one
            whose input is rotated on its way.
    """
    weight = source.get_parameter("weight")
    if weight.shape[0] != s.numel():
        raise ValueError(f"{s.numel()} scales do not fit a source with {weight.shape[0]} output channels")
    if any(is_rotated_online(sink) for sink in sinks):
        raise ValueError("the input is rotated online: scales of it cannot be moved into the layer before")
    scale_rows(source, 1.0 / s)
    for sink in sinks:
        scale_columns(sink, s)
