"""torch's weight-only int4 product for CPUs: unsigned codes of 4 bits, in groups, scales and offsets in bfloat16.

The kernel computes `x @ Wᵀ` with `W = (q - 8) · scale + offset` (torch/testing/_internal/common_quantization.py,
`_group_quantize_tensor`), so that `offset = scale · (8 - zero)`.
"""

import torch
from torch import Tensor

from qbench.deploy.bench.kernels import Kernel, TorchKernels, grid_of
from qbench.deploy.devices import Unit
from qbench.deploy.layers import QuantizedLayer

_GROUPS = (256, 128, 64, 32)
_ROWS = 16  # the packing takes rows by so many
_BITS = 4
_MIDDLE = 8


class Int4Linear(Kernel):
    """A layer of unsigned 4-bit codes.

    Args:
        codes: From 0 to 15, `(out, in)`.
        scale, zero: `(out, in / group)`, zero-points among the codes.
    """

    unit: Unit = "fp32"  # codes are unpacked, and multiplied as floating-point numbers

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None) -> None:
        super().__init__(bias)
        self.n_weights = codes.numel()
        self.group = codes.shape[1] // scale.shape[1]
        offset = scale * (_MIDDLE - zero)
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1))
        both = torch.stack([scale.T, offset.T], -1).to(torch.bfloat16).contiguous()
        self.register_buffer("scales_and_offsets", both)

    def product(self, x: Tensor) -> Tensor:
        # With float32 activations the kernel is not vectorized, and some thirty times slower.
        x = x.to(torch.bfloat16)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group, self.scales_and_offsets)


class TorchInt4(TorchKernels):
    name = "torch-int4"
    about = "torch's weight-only int4 kernel for CPUs; products in bfloat16, the rest in float32"

    def why_not_layer(self, layer: QuantizedLayer) -> str:
        spec, grid = grid_of(layer)
        rows, columns = layer.weight.shape
        size = columns // grid.scale.shape[1]
        if layer.activation is not None:
            return "its input is quantized, and the kernel leaves it in floating point; w8a8 runs on torch-int8-dynamic"
        if spec.format != "int" or spec.bits > _BITS:
            return f"its codes are {spec.format} of {spec.bits} bits; the kernel takes integers of at most {_BITS}"
        if rows % _ROWS:
            return f"it has {rows} outputs; the kernel takes multiples of {_ROWS}"
        if _group(size) is None:
            return f"its groups have {size} weights; the kernel takes multiples of {_GROUPS[-1]}"
        return ""

    def kernel(self, layer: QuantizedLayer, codes: Tensor, bias: Tensor | None) -> Int4Linear:
        spec, grid = grid_of(layer)
        shift = -spec.qmin
        size = codes.shape[1] // grid.scale.shape[1]
        group = _group(size)
        assert group is not None, "why_not_layer was asked"
        # A long group becomes several that the kernel knows, of the same scale.
        scale, zero = (part.squeeze(-1).float().repeat_interleave(size // group, 1) for part in grid)
        return Int4Linear(codes + shift, scale, zero + shift, bias)


def _group(size: int) -> int | None:
    """The kernel's longest group that divides one of `size` weights."""
    return next((group for group in _GROUPS if size % group == 0), None)
