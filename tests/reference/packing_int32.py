"""compressed-tensors' pack-quantized layout read by hand: codes lie one after another in a row of int32, low bits first."""

import torch
from torch import Tensor


def unpacked(packed: Tensor, bits: int, n: int) -> Tensor:
    """Codes `(rows, n)` with their sign, from int32 `(rows, n_words)`.

    Versions before 0.18 put 32 // bits codes in a word; later ones let a code span two.
    """
    dense = packed.shape[1] == -(-n * bits // 32)
    rows = []
    for words in packed.tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
        places = [
            bits * j if dense else 32 * (j // (32 // bits)) + bits * (j % (32 // bits)) for j in range(n)
        ]
        rows.append([(stream >> place) % 2**bits - 2 ** (bits - 1) for place in places])
    return torch.tensor(rows)


def dequantized(tensors: dict[str, Tensor], bits: int) -> Tensor:
    """The weight of one layer, in the dtype of its scales."""
    rows, columns = tensors["weight_shape"].tolist()
    codes, scale = unpacked(tensors["weight_packed"], bits, columns), tensors["weight_scale"]
    n_groups = scale.shape[1]
    zero = torch.zeros(rows, n_groups, dtype=torch.long)
    if "weight_zero_point" in tensors:  # packed along the rows
        zero = unpacked(tensors["weight_zero_point"].T.contiguous(), bits, rows).T
    groups = codes.view(rows, n_groups, -1) - zero[..., None]
    return (groups.to(scale.dtype) * scale[..., None]).view(rows, columns)
