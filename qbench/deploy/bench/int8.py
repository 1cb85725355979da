"""torch's int8 products for CPUs: weights alone, or activations as well, rounded token by token on the way in."""

import torch
from torch import Tensor

from qbench.deploy.bench.backend import Subject
from qbench.deploy.bench.kernels import Kernel, TorchKernels, grid_of
from qbench.deploy.devices import Unit
from qbench.deploy.layers import QuantizedLayer
from qbench.quant.grid import TINY
from qbench.quant.spec import QuantSpec

_TOP = 127  # the largest code of an activation
_COLUMNS = 32  # the weight-only kernel reads beyond the end of rows that are no multiple of its vectors


class Int8WeightLinear(Kernel):
    """Codes from -128 to 127 times one scale a row; products in bfloat16.

    Args:
        codes: `(out, in)`.
        scale: `(out,)`.
    """

    unit: Unit = "fp32"

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__(bias)
        self.n_weights = codes.numel()
        self.register_buffer("codes", codes.to(torch.int8).contiguous())
        self.register_buffer("scale", scale.to(torch.bfloat16).contiguous())

    def product(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x.to(torch.bfloat16), self.codes, self.scale)


class Int8DynamicLinear(Kernel):
    """Integers times integers: a token's activations are rounded to its own symmetric grid of 8 bits.

    Args:
        codes: From -128 to 127, `(out, in)`.
        scale: `(out,)`.
        zero: `(out,)`, among the codes; `None` where all are 0.
    """

    unit: Unit = "int8"

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> None:
        super().__init__(bias)
        self.n_weights = codes.numel()
        self.register_buffer("codes", codes.to(torch.int8).contiguous())
        self.register_buffer("scale", scale.float().contiguous())
        self.register_buffer("zero", None if zero is None else zero.float().contiguous())

    def product(self, x: Tensor) -> Tensor:
        x = x.float()
        step = x.abs().amax(-1, keepdim=True) / _TOP
        step = torch.where(step <= TINY, 1.0, step)
        q = (x / step).round().to(torch.int8)
        y = torch._int_mm(q, self.codes.T).float()
        if self.zero is not None:
            y -= q.sum(-1, keepdim=True, dtype=torch.int32).float() * self.zero
        return y * step * self.scale


class TorchInt8(TorchKernels):
    name = "torch-int8"
    about = "torch's weight-only int8 kernel for CPUs; products in bfloat16, the rest in float32"

    def why_not_layer(self, layer: QuantizedLayer) -> str:
        if layer.activation is not None:
            return "its input is quantized, and the kernel leaves it in floating point; w8a8 runs on torch-int8-dynamic"
        if why := _why_not_rows(layer):
            return why
        if _signed(layer)[1].any():
            return "it has zero-points; the kernel takes symmetric weights (weight_symmetric=true)"
        if layer.weight.shape[1] % _COLUMNS:
            return f"it has {layer.weight.shape[1]} inputs; the kernel takes multiples of {_COLUMNS}"
        return ""

    def kernel(self, layer: QuantizedLayer, codes: Tensor, bias: Tensor | None) -> Int8WeightLinear:
        scale, _, shift = _signed(layer)
        return Int8WeightLinear(codes - shift, scale, bias)


class TorchInt8Dynamic(TorchKernels):
    name = "torch-int8-dynamic"
    about = "torch's product of int8 matrices; activations rounded token by token, the rest in float32"

    def why_not_layer(self, layer: QuantizedLayer) -> str:
        if layer.activation is not None and not _by_token(layer.activation):
            return (
                "its input is not rounded as here: to symmetric integers of 8 bits, on a range of each token"
            )
        return _why_not_rows(layer)

    def remark(self, subject: Subject) -> str:
        if subject.recipe is None or all(x.activation for x in subject.recipe.layers if x.spec):
            return ""
        return "rounds activations to 8 bits, which the recipe does not: faster, and another model than was evaluated"

    def kernel(self, layer: QuantizedLayer, codes: Tensor, bias: Tensor | None) -> Int8DynamicLinear:
        scale, zero, shift = _signed(layer)
        return Int8DynamicLinear(codes - shift, scale, zero if zero.any() else None, bias)


def _why_not_rows(layer: QuantizedLayer) -> str:
    spec, grid = grid_of(layer)
    if spec.format != "int":
        return f"its codes are {spec.format}; the kernel takes integers"
    if grid.scale.shape[1] != 1:
        return "its scales are shared by groups; the kernel takes one scale a row (group_size=-1)"
    return ""


def _by_token(act: QuantSpec) -> bool:
    return (
        act.format == "int" and act.bits == 8 and act.symmetric and act.symmetric_mode != "gptq"
        and act.granularity == "row" and act.dynamic
    )  # fmt: skip


def _signed(layer: QuantizedLayer) -> tuple[Tensor, Tensor, int]:
    """Scale and zero-point of each row, `(out,)`, and what is taken from codes so that they fit eight bits with a sign.

    Zero-points are those of the codes so shifted; a symmetric grid has zeros.
    """
    spec, grid = grid_of(layer)
    shift = 2 ** (spec.bits - 1) if spec.qmin >= 0 else 0
    return grid.scale.flatten(), grid.zero.flatten() - shift, shift
