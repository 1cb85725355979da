"""What a quantized weight takes when it is stored: nothing is free, neither scales nor what stays in floating point."""

from torch import Tensor

from qbench.quant.spec import QuantSpec

FLOAT_BITS = 16  # what stays in floating point is stored in half precision, whatever it was evaluated in
INDEX_BITS = 16  # of a column
POINTER_BITS = 32  # to the first kept weight of a row


def layer_bits(spec: QuantSpec | None, rows: int, columns: int, kept: Tensor | None = None) -> float:
    """Stored bits of a weight, `(rows, columns)`.

    Args:
        spec: Its grid; `None` for a weight in floating point.
        kept: What stays in floating point: channels, `(columns,)`, which are stored by value, with an index each, in
            place of their codes; or single weights, `(rows, columns)`, which are stored by value and column on top of
            a full grid. Scales and zero-points are there all the same.
    """
    if spec is None:
        return float(FLOAT_BITS * rows * columns)
    bits = spec.bits_per_element(rows, columns) * rows * columns
    if kept is None:
        return bits
    n = int(kept.sum())
    if kept.ndim == 1:
        return bits + n * (INDEX_BITS + (FLOAT_BITS - spec.bits) * rows)
    return bits + n * (INDEX_BITS + FLOAT_BITS) + POINTER_BITS * rows
