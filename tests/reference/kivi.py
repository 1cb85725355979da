"""KIVI (arXiv:2402.02750), Algorithm 1, one head and one token after another, with a cache that is really kept."""

import math

import torch
from torch import Tensor


def quantize(x: Tensor, bits: int) -> Tensor:
    """Asymmetric, one range for the whole vector, which contains zero."""
    lo, hi = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = (hi - lo) / (2**bits - 1) or 1.0
    zero = round(-lo / scale)
    return torch.tensor(
        [(min(max(round(v / scale) + zero, 0), 2**bits - 1) - zero) * scale for v in x.tolist()],
        dtype=x.dtype,
    )


def decode(query: Tensor, key: Tensor, value: Tensor, bits: int, group: int, residual: int) -> Tensor:
    """What attention returns at each step; all `(seq_len, head_dim)`."""
    key_grouped: list[Tensor] = []
    key_residual: list[Tensor] = []
    value_grouped: list[Tensor] = []
    value_residual: list[Tensor] = []
    outputs = []
    for q, k, v in zip(query, key, value, strict=True):
        key_residual.append(k)
        value_residual.append(v)
        if len(key_residual) == residual:
            for start in range(0, residual, group):
                tokens = torch.stack(key_residual[start : start + group])
                channels = torch.stack([quantize(tokens[:, c], bits) for c in range(tokens.shape[1])], 1)
                key_grouped.extend(channels)
            key_residual = []
        if len(value_residual) > residual:
            oldest = value_residual.pop(0)
            value_grouped.append(torch.cat([quantize(part, bits) for part in oldest.split(group)]))
        keys = torch.stack(key_grouped + key_residual)
        values = torch.stack(value_grouped + value_residual)
        outputs.append((keys @ q / math.sqrt(len(q))).softmax(0) @ values)
    return torch.stack(outputs)
