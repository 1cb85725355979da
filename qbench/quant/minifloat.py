"""Small number formats as tables of their codes, and rounding to the nearest entry.

E4M3 and E5M2: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433, as in the Open Compute
Project's 8-bit Floating Point Specification. E3M2, E2M3 and E2M1: OCP Microscaling Formats (MX) Specification 1.0.
NF4: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, arXiv:2305.14314, equation 4.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import frexp

import torch
from torch import Tensor

from qbench.quant.spec import Format


@dataclass(frozen=True)
class MiniFloat:
    """A sign, `exponent` and `mantissa` bits, with subnormal numbers.

    Attributes:
        largest: The largest finite number; codes above it are not numbers.
        cast: torch's type, whose conversion from float32 rounds as we do, and faster.
    """

    exponent: int
    mantissa: int
    largest: float
    cast: torch.dtype | None = None

    @property
    def smallest_normal(self) -> float:
        bias = 2 ** (self.exponent - 1) - 1
        return 2.0 ** (1 - bias)


MINIFLOATS: dict[Format, MiniFloat] = {
    "e4m3": MiniFloat(4, 3, 448.0, torch.float8_e4m3fn),
    "e5m2": MiniFloat(5, 2, 57344.0, torch.float8_e5m2),
    "e3m2": MiniFloat(3, 2, 28.0),
    "e2m3": MiniFloat(2, 3, 7.5),
    "e2m1": MiniFloat(2, 1, 6.0),
}


def largest(name: Format) -> float:
    """The largest number of a format, at which it saturates."""
    return 1.0 if name == "nf4" else MINIFLOATS[name].largest


def largest_exponent(number: float) -> int:
    """`floor(log2(number))`, exactly."""
    return frexp(number)[1] - 1


@cache
def code_table(name: Format) -> Tensor:
    """The number of each code, shape `(2^bits,)`, float64; NaN for codes that stand for no finite number.

    Codes of floats are sign, exponent and mantissa, from the highest bit down; those of nf4 ascend with their
    numbers.
    """
    if name == "nf4":
        return _normal_quantiles()
    f = MINIFLOATS[name]
    code = torch.arange(2 ** (1 + f.exponent + f.mantissa))
    mantissa = (code % 2**f.mantissa).double() / 2**f.mantissa
    exponent = (code >> f.mantissa) % 2**f.exponent
    normal = (1 + mantissa) * 2.0 ** (exponent - 1).double()
    size = torch.where(exponent == 0, mantissa, normal) * f.smallest_normal
    sign = 1.0 - 2.0 * (code >> (f.exponent + f.mantissa)).double()
    return torch.where(size > f.largest, torch.nan, sign * size)


def round_to_format(x: Tensor, name: Format) -> Tensor:
    """Snap float32 or float64 numbers to the nearest of a format; what lies beyond its largest becomes that.

    Of two floats that are equally near, the one with an even mantissa is taken; of two entries of nf4, the lower.
    NaN stays.
    """
    if name == "nf4":
        return _nearest_entry(x, code_table(name).to(x))
    f = MINIFLOATS[name]
    x = x.clamp(-f.largest, f.largest)
    # torch converts from float64 by way of float32, which would round twice.
    if f.cast is not None and x.dtype == torch.float32:
        return x.to(f.cast).to(x.dtype)
    step = power_of_two_below(x.abs().clamp(min=f.smallest_normal)) * 2.0**-f.mantissa
    return (x / step).round() * step


def power_of_two_below(x: Tensor) -> Tensor:
    """The largest power of two that is not above each positive `x`, exactly; NaN where `x` is not finite."""
    return x / (2 * torch.frexp(x).mantissa)  # a quotient that is representable is exact


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override, no-untyped-def]
        return rounding(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override, no-untyped-def]
        return gradient, None


def straight_through(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """`rounding(x)` with the gradient of the identity (straight-through estimator)."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounding(
            x
        )  # a rounder calls this for every column, and an autograd function costs as much as the rounding
    return _StraightThrough.apply(x, rounding)


def _nearest_entry(x: Tensor, table: Tensor) -> Tensor:
    middle = (table[1:] + table[:-1]) / 2
    nearest = table.take(torch.bucketize(x, middle))
    return torch.where(x.isnan(), x, nearest)


def _normal_quantiles() -> Tensor:
    """Quantiles of the normal distribution, eight above zero, seven below, and zero; scaled to ±1.

    The largest probability lies between 1 − 1/30 and 1 − 1/32. It is rounded as in the authors' code, and so are the
    probabilities to float32: the published numbers are met to the last bit.
    """
    above = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 9)[:-1].double())
    below = -torch.special.ndtri(torch.linspace(0.9677083, 0.5, 8)[:-1].double())
    table = torch.cat([below, torch.zeros(1), above]).float().sort().values
    return (table / table.max()).double()
