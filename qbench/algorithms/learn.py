"""Gradient descent on one block: what learned methods share."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbench.calib.block import Block
from qbench.calib.stream import Stream
from qbench.quant.grid import wide

# A loss that has grown by less has not: where quantization costs next to nothing, steps only make it tremble.
TREMBLE = 0.005

Weights = Callable[[], dict[str, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]
Schedule = Callable[[int], float]


def squared_error(y: Tensor, target: Tensor) -> Tensor:
    return (wide(y) - wide(target)).square().mean()


def steps_of(epochs: int, inputs: Stream, batch_size: int) -> int:
    """How many steps of the optimizer show it every sample `epochs` times."""
    return epochs * math.ceil(len(inputs.hidden) / batch_size)


def constant(step: int) -> float:
    """A schedule: learning rates stay."""
    return 1.0


def falling(steps: int) -> Schedule:
    """A schedule: learning rates fall linearly to zero."""
    return lambda step: 1 - step / steps


def fit(
    block: Block,
    name: str,
    weights: Weights,
    optimizer: torch.optim.Optimizer,
    *,
    inputs: Stream,
    targets: Stream,
    steps: int,
    batch_size: int,
    seed: int,
    loss: Loss = squared_error,
    schedule: Schedule = constant,
) -> tuple[float, float]:
    """Train what `weights` depends on until the block's output on `inputs` is near `targets`.

    The block runs with `weights()` in place of its own parameters, and with its inputs quantized as the scheme has
    it; nothing of the block is changed. There is nothing to learn where the loss is that of the dtype's own rounding.

    Args:
        name: Of the method, for messages and for the report.
        weights: Makes the block's parameters, by name, from what is trained.
        steps: Of the optimizer, on `batch_size` samples each; every sample is met once before any is met again.
        schedule: Factor of the learning rates at a step.

    Returns:
        The mean loss over all samples before and after; it is also in the block's report.

    Raises:
        FloatingPointError: If the loss is not finite, or has grown; names the block.
    """
    generator = torch.Generator().manual_seed(seed + block.index)
    rates = [group["lr"] for group in optimizer.param_groups]
    queue: list[Tensor] = []

    def mean_loss() -> float:
        return _mean_loss(block, weights, inputs, targets, loss, batch_size)

    least = _rounding(targets, loss)

    with block.quantized_activations():
        before = _finite(mean_loss(), block, name, "before its first step")
        for step in range(steps if before > least else 0):
            if not queue:
                queue = list(torch.randperm(len(inputs.hidden), generator=generator).split(batch_size))
            batch = queue.pop()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step)
            with torch.enable_grad():
                optimizer.zero_grad(set_to_none=True)
                now = loss(block.run(inputs.hidden[batch], weights()), targets.hidden[batch].to(block.device))
                # Adam's epsilon is absolute, and half precision has a least number: losses count from their start.
                (now / before).backward()  # type: ignore[no-untyped-call]
            _finite(now.item(), block, name, f"in step {step + 1} of {steps}")
            optimizer.step()
        after = mean_loss()
    block.report[f"{name}_loss"] = [before, after]
    if not after <= before * (1 + TREMBLE):
        raise FloatingPointError(
            f"block {block.index}: {name} diverged, its loss grew from {before:.4g} to {after:.4g} in {steps} steps; "
            "lower its learning rate, or give it more steps"
        )
    return before, after


def _finite(loss: float, block: Block, name: str, when: str) -> float:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"block {block.index}: {name} met a loss of {loss} {when}; lower its learning rate, or use float32"
        )
    return loss


@torch.no_grad()
def _rounding(targets: Stream, loss: Loss) -> float:
    """The loss of outputs that are off by the dtype's machine epsilon."""
    target = wide(targets.hidden[:1])
    return loss(target * (1 + torch.finfo(targets.hidden.dtype).eps), target).item()


@torch.no_grad()
def _mean_loss(
    block: Block, weights: Weights, inputs: Stream, targets: Stream, loss: Loss, batch_size: int
) -> float:
    """By batches as in training: a loss may be of a batch's statistics, whose mean is not that of all samples."""
    made, total = weights(), 0.0
    for x, target in zip(*(stream.hidden.split(batch_size) for stream in (inputs, targets)), strict=True):
        total += loss(block.run(x, made), target.to(block.device)).item() * len(x)
    return total / len(inputs.hidden)


def adam(*groups: tuple[list[Tensor], float], decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW over groups of (tensors, learning rate); tensors become trainable."""
    parts: list[dict[str, Any]] = [
        {"params": [t.requires_grad_() for t in tensors], "lr": rate} for tensors, rate in groups if tensors
    ]
    return torch.optim.AdamW(parts, weight_decay=decay)
