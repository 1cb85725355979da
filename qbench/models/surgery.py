"""Edits that leave the function of a model unchanged.

Each edit multiplies one weight and divides another, so that a quantizer meets easier numbers.
They run in float64 and in place.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qbench.models.norms import scale_gain
from qbench.models.rotate import is_rotated_online


@torch.no_grad()
def scale_columns(reader: nn.Module, s: Tensor) -> None:
    """`W ← W diag(s)`: a layer, or a router, now expects its input divided by `s`, shape `(in_features,)`."""
    weight = reader.get_parameter("weight")
    weight.copy_(weight.double() * s.double())


@torch.no_grad()
def scale_rows(module: nn.Module, s: Tensor, rows: Tensor | None = None) -> None:
    """Multiply the output of a norm or a linear layer by `s`, shape `(out_features,)`, or that of some `rows` of it."""
    if not isinstance(module, nn.Linear):
        scale_gain(module, s)
        return
    for parameter in module.parameters(recurse=False):  # weight, and bias where there is one
        factor = s.to(parameter.device, torch.float64).view((-1,) + (1,) * (parameter.ndim - 1))
        part = slice(None) if rows is None else rows.to(parameter.device)
        parameter[part] = (parameter[part].double() * factor).to(parameter.dtype)


def migrate_scale(
    source: nn.Module, sinks: Iterable[nn.Module], s: Tensor, rows: Tensor | None = None
) -> None:
    """Divide the output of `source` by `s` and multiply the sinks' input columns by it.

    Args:
        rows: The outputs that feed the sinks, in their order; all if `None`.

    Raises:
        ValueError: If `source` does not have one such output per scale. Under grouped-query
            attention a value head feeds several output heads, so that link cannot be scaled. Nor can one
            whose input is rotated on its way.
    """
    n_outputs, sinks = len(source.get_parameter("weight")) if rows is None else len(rows), list(sinks)
    if n_outputs != s.numel():
        raise ValueError(f"{s.numel()} scales do not fit a source with {n_outputs} output channels")
    if any(is_rotated_online(sink) for sink in sinks):
        raise ValueError("the input is rotated online: scales of it cannot be moved into the layer before")
    scale_rows(source, 1.0 / s, rows)
    for sink in sinks:
        scale_columns(sink, s)
