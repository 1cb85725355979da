"""Layers in the terms of `gptqmodel`, which owns GPTQ's and AWQ's layouts, and its packing of them.

Its packing rounds the weight that it is given. Here it is given codes, as a weight whose scales are one, so that nothing is
left to round.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qbench.deploy.layers import QuantizedLayer


class Parts(NamedTuple):
    """A layer in the terms of the format.

    Attributes:
        codes: int32 `(out, in)`, from 0.
        scale: float16 `(out, n_groups)`.
        zero: int32 `(out, n_groups)`, what the code of zero is.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def steps(self) -> Tensor:
        """How many scales each weight is, int32 `(out, in)`."""
        size = self.codes.shape[1] // self.zero.shape[1]
        return self.codes - self.zero.repeat_interleave(size, 1)


def parts_of(layer: QuantizedLayer) -> Parts:
    """A layer in the terms of the format.

    Raises:
        ValueError: If the weight is not codes of one grid with integer zero-points, or a scale is beyond float16.
    """
    codes, spec, grid = layer.codes().cpu(), layer.spec, layer.grid
    assert spec is not None
    assert grid is not None
    rows = len(codes)
    shift = 2 ** (spec.bits - 1) if spec.symmetric and spec.symmetric_mode != "gptq" else 0
    scale, zero = (part.cpu().expand(rows, -1, 1).squeeze(-1) for part in grid)
    half = scale.half()
    if not half.isfinite().all():
        raise ValueError(
            f"{layer.name} has a scale of {scale.max():.3g}, and float16 ends at 65504; export with --to compressed-tensors"
        )
    zero = zero + shift
    if not torch.equal(zero, zero.round().clamp(0, 2**spec.bits - 1)):
        raise ValueError(
            f"{layer.name} has zero-points that are no codes of {spec.bits} bits; export with --to hf"
        )
    return Parts(codes + shift, half, zero.int())


def can_pack(layout: Mapping[str, Any], where: Mapping[str, str], kernel: str) -> bool:
    """Whether the library has such a layout.

    Args:
        layout: Bits, group size, and what else its layers are made with.
        where: The format by its names.
        kernel: What computes it, by the library's name.
    """
    from gptqmodel.utils.packing import hf_check_packing_feasibility

    return bool(hf_check_packing_feasibility(**layout, **where, backend=kernel, device="cpu"))


def kernel_for(layout: Mapping[str, Any], where: Mapping[str, str], kernel: str) -> Any:
    """The class of its layers for a layout; arguments as those of `can_pack`."""
    from gptqmodel.utils.importer import hf_select_quant_linear_v2

    return hf_select_quant_linear_v2(**layout, **where, backend=kernel, pack=True, device_map="cpu")


def packed(kind: Any, layout: Mapping[str, Any], parts: Parts) -> Any:
    """A layer of the class `kind`, with scales of one and zero-points as they are."""
    from gptqmodel.utils.packing import hf_pack_layer

    rows, columns = parts.codes.shape
    module = kind(**layout, in_features=columns, out_features=rows, bias=False, register_buffers=False)
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(parts.steps.float(), requires_grad=False)
    g_idx = torch.arange(columns, dtype=torch.int32) // (columns // parts.zero.shape[1])
    # Asked for `gptq_v2`, it adds one to zero-points that it has packed as they are (7.6.0).
    hf_pack_layer(module, linear, torch.ones(parts.zero.shape), parts.zero, g_idx, checkpoint_format="gptq")
    return module.eval()


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what gptqmodel tells of itself out of the output; its warnings go where errors go."""
    with redirect_stdout(StringIO()):
        from gptqmodel.utils.logger import setup_logger
    setup_logger().setLevel("WARNING")
    with redirect_stdout(sys.stderr):
        yield
