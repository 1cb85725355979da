"""Adam, written out, on all samples at once; the loss counts in units of its start."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def descend(
    loss_of: Callable[[dict[str, Tensor]], Tensor], start: dict[str, Tensor], rates: Sequence[float]
) -> dict[str, Tensor]:
    """What is trained, by name, after as many steps as there are rates."""
    x = {name: value.detach().clone() for name, value in start.items()}
    first = {name: torch.zeros_like(value) for name, value in x.items()}
    second = {name: torch.zeros_like(value) for name, value in x.items()}
    with torch.no_grad():
        unit = loss_of(x)
    for t, rate in enumerate(rates, start=1):
        leaves = {name: value.requires_grad_() for name, value in x.items()}
        gradients = torch.autograd.grad(loss_of(leaves) / unit, list(leaves.values()))
        for name, g in zip(leaves, gradients, strict=True):
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            step = first[name] / (1 - 0.9**t) / ((second[name] / (1 - 0.999**t)).sqrt() + 1e-8)
            x[name] = (x[name] - rate * step).detach()
    return x
