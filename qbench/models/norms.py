"""What norms compute, whatever they are called: found by asking them, since architectures write their own.

`norm(x) = gain * normalized(x) + bias`; some keep the gain less one (Gemma), some have none (OLMo), and some subtract
the mean, as `nn.LayerNorm` does, under a name of their own (Cohere).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def gain_offset(norm: nn.Module) -> float:
    """What a norm adds to its weight to make the gain: 0, or 1.

    Raises:
        NotImplementedError: If it is neither.
    """
    weight = norm.get_parameter("weight")
    x = torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype, device=weight.device)[None]
    nothing = _called(norm, x, weight=torch.zeros_like(weight))
    if not nothing.any():
        return 0.0
    if not _called(norm, x, weight=torch.full_like(weight, -1.0)).any():
        return 1.0
    raise NotImplementedError(
        f"the gain of {type(norm).__name__} is neither its weight nor its weight plus one; add it to "
        "qbench/models/norms.py"
    )


def centres(norm: nn.Module) -> bool:
    """Whether a norm subtracts the mean over channels."""
    n = (
        norm.weight.numel() if getattr(norm, "weight", None) is not None else 8
    )  # without gains any width will do
    like = next(norm.parameters(), torch.zeros(1))
    if shape := getattr(norm, "normalized_shape", None):
        n = shape[-1]
    x = torch.full((1, n), 2.0, dtype=like.dtype, device=like.device)  # all of it is mean
    return not _called(norm, x, weight=torch.ones(n).to(like)).any()


def plain_norm(norm: Any, like: Tensor) -> nn.RMSNorm:
    """What is left of a norm whose gains are folded, on a stream without a mean: an RMSNorm of the same epsilon."""
    told = (getattr(norm, name, None) for name in ("eps", "variance_epsilon", "epsilon"))
    eps = next((float(value) for value in told if value is not None), None)
    plain = nn.RMSNorm(
        like.shape[-1], _epsilon(norm, like) if eps is None else eps, dtype=like.dtype, device=like.device
    )
    return plain.requires_grad_(False).train(norm.training)


def _epsilon(norm: nn.Module, like: Tensor) -> float:
    """What is added to the variance, from an input whose variance is next to nothing: `norm(x) = x / √(σ² + ε)`."""
    x = torch.tensor([1e-9, -1e-9], dtype=torch.float64, device=like.device).repeat(like.shape[-1] // 2)[None]
    return float((x / _called(norm, x, weight=torch.ones(like.shape[-1])))[0, 0]) ** 2


def scale_gain(norm: nn.Module, s: Tensor) -> None:
    """Multiply the output of a norm by `s`, `(channels,)`, in place."""
    offset, weight = gain_offset(norm), norm.get_parameter("weight")
    with torch.no_grad():
        weight.copy_((weight.double() + offset) * s.double() - offset)
        if (bias := getattr(norm, "bias", None)) is not None:
            bias.copy_(bias.double() * s.double())


@torch.no_grad()
def _called(norm: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The norm's output for another weight and no bias."""
    own = {name: torch.zeros_like(p) for name, p in norm.named_parameters(recurse=False)}
    made: Tensor = functional_call(norm, own | ({"weight": weight.to(x)} if "weight" in own else {}), (x,))
    return made
