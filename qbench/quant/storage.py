"""What a quantized weight takes when it is stored: nothing is free, neither scales nor what stays in floating point."""

import torch
from torch import Tensor

from qbench.quant.mixed import by_width
from qbench.quant.spec import QuantSpec

FLOAT_BITS = 16  # what stays in floating point is stored in half precision, whatever it was evaluated in
INDEX_BITS = 16  # of a column
POINTER_BITS = 32  # to the first kept weight of a row
WIDTH_BITS = 3  # which of the widths 1 to 8 a group has


def layer_bits(
    spec: QuantSpec | None,
    rows: int,
    columns: int,
    kept: Tensor | None = None,
    group_bits: Tensor | None = None,
) -> float:
    """Stored bits of a weight, `(rows, columns)`.

    Args:
        spec: Its grid; `None` for a weight in floating point.
        kept: What stays in floating point: channels, `(columns,)`, which are stored by value, with an index each, in
            place of their codes; or single weights, `(rows, columns)`, which are stored by value and column on top of
            a full grid. Scales and zero-points are there all the same.
        group_bits: Where groups differ in width, that of each, `(n_groups,)`; it is stored too.
    """
    if spec is None:
        return float(FLOAT_BITS * rows * columns)
    if group_bits is None:
        bits, widths = spec.bits_per_element(rows, columns) * rows * columns, torch.tensor([spec.bits])
    else:
        bits, widths = WIDTH_BITS * float(len(group_bits)), group_bits
        for part, groups in by_width(spec, group_bits):
            n = len(groups) * (columns // len(group_bits))
            bits += part.bits_per_element(rows, n) * rows * n
    if kept is None:
        return bits
    n = int(kept.sum())
    if kept.ndim == 1:
        codes = int(widths.cpu().repeat_interleave(columns // len(widths))[kept.cpu()].sum())
        return bits + n * (INDEX_BITS + FLOAT_BITS * rows) - codes * rows
    return bits + n * (INDEX_BITS + FLOAT_BITS) + POINTER_BITS * rows
