"""TesseraQ for one block, on all samples at once, with Adam, the hardening and the sigmoid written out."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .gptq import grid


def stretched(x: Tensor) -> Tensor:
    return torch.clamp(1.2 * torch.sigmoid(x) - 0.1, 0, 1)


def start(w: Tensor, bits: int, size: int) -> dict[str, Tensor]:
    """What is known of a weight on its min-max grid, `(out, n_groups, size)`: nothing is rounded yet."""
    scale, zero = (p[..., None] for p in grid(w, bits, size))
    codes = w.unflatten(1, (-1, size)) / scale + zero
    share = (codes - codes.floor() + 0.1) / 1.2
    v = torch.log(share / (1 - share))
    return {"scale": scale, "zero": zero, "floor": codes.floor(), "v": v, "u": torch.zeros_like(scale)}


def weight(state: dict[str, Tensor], bits: int, hard: bool) -> Tensor:
    up = (state["v"] > 0).double() if hard else stretched(state["v"])
    codes = (state["floor"] + up).clamp(0, 2**bits - 1)
    return (state["scale"] * 2 * stretched(state["u"]) * (codes - state["zero"])).flatten(1)


def harden(v: Tensor, soft: float) -> Tensor:
    """All but the `soft` share nearest to one half become certain."""
    flat = v.flatten().clone()
    order = sorted(range(len(flat)), key=lambda i: float((stretched(flat[i]) - 0.5).abs()))
    for i in order[round(soft * len(flat)) :]:
        flat[i] = float("inf") if flat[i] > 0 else -float("inf")
    return flat.view(v.shape)


def learn(
    run: Callable[[dict[str, Tensor]], Tensor],
    weights: dict[str, Tensor],
    target: Tensor,
    bits: int,
    size: int,
    soft: Sequence[float],
    steps: int,
    lr: float,
    scale_lr: float,
    decay: float,
) -> dict[str, Tensor]:
    """The rounded weights, by name; the loss counts in units of that of round to nearest."""
    states = {name: start(w, bits, size) for name, w in weights.items()}
    with torch.no_grad():
        unit = ((run({n: weight(s, bits, hard=True) for n, s in states.items()}) - target) ** 2).mean()
    for share in soft:
        moments = {}
        for state in states.values():
            state["v"] = harden(state["v"], share)
        for t in range(1, steps + 1):
            for state in states.values():
                state["v"] = state["v"].detach().requires_grad_()
                state["u"] = state["u"].detach().requires_grad_()
            loss = ((run({n: weight(s, bits, hard=False) for n, s in states.items()}) - target) ** 2).mean()
            (loss / unit).backward()
            for name, state in states.items():
                for key, rate, pull in (("v", lr, 0.0), ("u", scale_lr, decay)):
                    x = state[key]
                    gradient = x.grad + pull * x.detach() if pull else x.grad
                    first, second = moments.get((name, key), (torch.zeros_like(x), torch.zeros_like(x)))
                    first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
                    moments[name, key] = first.detach(), second.detach()
                    step = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
                    state[key] = (x - rate * step).detach()
    return {name: weight(state, bits, hard=True) for name, state in states.items()}
