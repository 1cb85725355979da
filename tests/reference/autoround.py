"""AutoRound's Algorithm 1 for one block, on all samples at once, with signs and bounds written out."""

from collections.abc import Callable

import torch
from torch import Tensor


def straight(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def rounded(w: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, bits: int, size: int) -> Tensor:
    """Equation 3 on an asymmetric grid; `alpha` and `beta` are `(out, n_groups)`."""
    g, v = w.unflatten(1, (-1, size)), v.unflatten(1, (-1, size))
    low = (g.amin(-1).clamp(max=0) * beta)[..., None]
    high = (g.amax(-1).clamp(min=0) * alpha)[..., None]
    scale = (high - low) / (2**bits - 1)
    zero = straight(-low / scale).clamp(0, 2**bits - 1)
    codes = (straight(g / scale + v) + zero).clamp(0, 2**bits - 1)
    return (scale * (codes - zero)).flatten(1)


def learn(
    run: Callable[[dict[str, Tensor]], Tensor],
    weights: dict[str, Tensor],
    target: Tensor,
    bits: int,
    size: int,
    steps: int,
) -> dict[str, Tensor]:
    """The rounded weights, by name, of the step whose loss is least."""
    trained = {}
    for name, w in weights.items():
        share = torch.ones(len(w), w.shape[1] // size, dtype=w.dtype)
        trained[name] = [torch.zeros_like(w), share, share.clone()]
    least, best = float("inf"), {}
    for step in range(steps):
        for parts in trained.values():
            for p in parts:
                p.requires_grad_()
        made = {name: rounded(w, *trained[name], bits, size) for name, w in weights.items()}
        loss = ((run(made) - target) ** 2).mean()
        if float(loss.detach()) < least:
            least, best = float(loss.detach()), {name: w.detach() for name, w in made.items()}
        loss.backward()
        rate = (1 - step / steps) / steps
        for name, (v, alpha, beta) in trained.items():
            trained[name] = [
                (v - rate * v.grad.sign()).clamp(-0.5, 0.5).detach(),
                (alpha - rate * alpha.grad.sign()).clamp(0, 1).detach(),
                (beta - rate * beta.grad.sign()).clamp(0, 1).detach(),
            ]
    return best
