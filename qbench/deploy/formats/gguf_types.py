"""GGUF's types of weights: which hold a grid as it is, and how weights are rounded to the others.

Every type has one scale for 32 neighbours of a row, in float16 (MXFP4: a power of two); some have a minimum beside it. A
coarser grid is many such blocks with one scale, so groups of 64 or 128, and whole rows, are held too. Layouts are those
of `gguf.quants.dequantize`, which tests hold them against; K-quants and IQ4_NL are rounded by llama.cpp, since that
package can but read them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType, QuantError
from gguf import quants as gguf_quants
from numpy.typing import NDArray
from torch import Tensor

from qbench.deploy.llamacpp import ggml_quantized
from qbench.quant.grid import QParams
from qbench.quant.spec import QuantSpec

Packed = NDArray[np.uint8]
_BLOCK = 32
_K = GGMLQuantizationType


@dataclass(frozen=True)
class Kind:
    """A type, as `--to gguf-<name>` names it.

    Attributes:
        file: What a file of it is called in its own metadata.
        low, high: The integers that a scale is multiplied with; `None` where codes cannot be given.
        minimum: Whether a minimum is added to it, rather than none.
        instead: What llama.cpp takes in its place for rows that its blocks do not divide.
        needs_llamacpp: Whether only llama.cpp rounds to it.
    """

    type: GGMLQuantizationType
    file: LlamaFileType
    low: int | None = None
    high: int | None = None
    minimum: bool = False
    instead: GGMLQuantizationType | None = None
    needs_llamacpp: bool = False

    @property
    def name(self) -> str:
        return self.type.name.lower()

    @property
    def block(self) -> int:
        """Neighbours of a row that are stored together."""
        return GGML_QUANT_SIZES[self.type][0]

    @property
    def bits(self) -> float:
        """Of each weight, scales included."""
        size, stored = GGML_QUANT_SIZES[self.type]
        return 8 * stored / size

    def holds(self, spec: QuantSpec, in_features: int) -> bool:
        """Whether codes of a grid can be stored as they are, and only scales and minima are rounded to float16."""
        if in_features % _BLOCK or (spec.group_size or _BLOCK) % _BLOCK:
            return False
        if self.type == _K.MXFP4:
            return spec.format == "e2m1" and spec.scale_format == "e8m0"
        if self.low is None or self.high is None or spec.format != "int":
            return False
        if self.minimum:
            return spec.qmin == 0 and spec.qmax <= self.high
        if not spec.symmetric:  # integer zero-points are among the codes, so a difference has one bit more
            real = spec.real_zero or spec.bits == 1
            return not real and spec.qmax <= self.high
        zero = 2 ** (spec.bits - 1) if spec.symmetric_mode == "gptq" else 0
        return self.low <= spec.qmin - zero and spec.qmax - zero <= self.high


KINDS = {
    kind.name: kind
    for kind in (
        Kind(_K.Q2_K, LlamaFileType.MOSTLY_Q2_K, instead=_K.IQ4_NL, needs_llamacpp=True),
        Kind(_K.Q3_K, LlamaFileType.MOSTLY_Q3_K_S, instead=_K.IQ4_NL, needs_llamacpp=True),
        Kind(_K.MXFP4, LlamaFileType.MOSTLY_MXFP4_MOE),
        Kind(_K.Q4_0, LlamaFileType.MOSTLY_Q4_0, -8, 7),
        Kind(_K.IQ4_NL, LlamaFileType.MOSTLY_IQ4_NL, needs_llamacpp=True),
        Kind(_K.Q4_K, LlamaFileType.MOSTLY_Q4_K_S, instead=_K.Q5_0, needs_llamacpp=True),
        Kind(_K.Q4_1, LlamaFileType.MOSTLY_Q4_1, 0, 15, minimum=True),
        Kind(_K.Q5_0, LlamaFileType.MOSTLY_Q5_0, -16, 15),
        Kind(_K.Q5_K, LlamaFileType.MOSTLY_Q5_K_S, instead=_K.Q5_1, needs_llamacpp=True),
        Kind(_K.Q5_1, LlamaFileType.MOSTLY_Q5_1, 0, 31, minimum=True),
        Kind(_K.Q6_K, LlamaFileType.MOSTLY_Q6_K, instead=_K.Q8_0, needs_llamacpp=True),
        Kind(_K.Q8_0, LlamaFileType.MOSTLY_Q8_0, -128, 127),
        Kind(_K.F16, LlamaFileType.MOSTLY_F16),
        Kind(_K.BF16, LlamaFileType.MOSTLY_BF16),
        Kind(_K.F32, LlamaFileType.ALL_F32),
    )
}
FLOATS = {torch.float32: KINDS["f32"], torch.float16: KINDS["f16"], torch.bfloat16: KINDS["bf16"]}


def smallest_holding(spec: QuantSpec, in_features: int) -> Kind | None:
    """The type with fewest bits that holds a grid as it is."""
    held = [kind for kind in KINDS.values() if kind.holds(spec, in_features)]
    return min(held, key=lambda kind: kind.bits, default=None)


def fitting(kind: Kind, in_features: int) -> Kind | None:
    """The type itself, or what llama.cpp takes in its place, for rows of that length; `None` where neither divides."""
    if in_features % kind.block == 0:
        return kind
    return None if kind.instead is None else fitting(KINDS[kind.instead.name.lower()], in_features)


def packed(kind: Kind, codes: Tensor, grid: QParams, spec: QuantSpec) -> Packed:
    """Codes `(out, in)` as the type stores them, `(out, bytes)`; `holds` was asked before.

    Raises:
        ValueError: If a zero-point is none of the codes, or a scale or minimum is beyond float16.
    """
    scale, zero = (_by_block(part, codes.shape, spec) for part in grid)
    if kind.type == _K.MXFP4:
        exponent = (np.log2(scale) + 127).round().astype(np.uint8)
        return _joined(exponent[..., None], _nibbles(_blocks(codes)))
    d, q = _half(scale), _blocks(codes).astype(np.float32)
    if kind.minimum:
        # Of the rounded scale, so that what is rounded twice is the minimum alone.
        m = _half(-d.astype(np.float64) * zero)
        return _joined(_bytes(d), _bytes(m), _integers(q, kind))
    assert kind.low is not None, "it holds integers"
    return _joined(_bytes(d), _integers(q - zero[..., None].astype(np.float32), kind))


def rounded(kind: Kind, weight: Tensor) -> Packed:
    """A weight `(out, in)` as the type's own quantizer rounds it, `(out, bytes)`; its grid is another then.

    Raises:
        ValueError: If it fails on it.
    """
    values = np.ascontiguousarray(weight.detach().float().cpu().numpy())
    if kind.needs_llamacpp:
        return ggml_quantized(values, int(kind.type), GGML_QUANT_SIZES[kind.type])
    try:
        data = gguf_quants.quantize(values, kind.type)
    except QuantError as error:
        raise ValueError(f"gguf cannot round a weight of shape {values.shape} to {kind.name}") from error
    return np.ascontiguousarray(data).view(np.uint8)


def unpacked(kind: Kind, data: Packed) -> Tensor:
    """The weight that llama.cpp computes from what is stored, float32 `(out, in)`."""
    return torch.from_numpy(np.array(gguf_quants.dequantize(data, kind.type), dtype=np.float32))


def _by_block(part: Tensor, shape: torch.Size, spec: QuantSpec) -> NDArray[np.float64]:
    """A scale or zero-point of each block, `(out, in / 32)`, from one of each group."""
    (rows, columns), values = shape, part.detach().double().cpu()
    if spec.granularity == "tensor":
        return np.full((rows, columns // _BLOCK), values.item())
    groups = values.reshape(-1, values.shape[-2]).expand(rows, -1)
    return np.asarray(groups.repeat_interleave(columns // _BLOCK // groups.shape[1], 1).numpy())


def _blocks(codes: Tensor) -> NDArray[np.int32]:
    return np.asarray(codes.cpu().numpy().reshape(len(codes), -1, _BLOCK))


def _half(values: NDArray[np.float64]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError(f"scales and minima reach {np.abs(values).max():.3g}, GGUF's float16 ends at 65504")
    return half


def _bytes(half: NDArray[np.float16]) -> Packed:
    return np.ascontiguousarray(half[..., None]).view(np.uint8)


def _integers(q: NDArray[np.float32], kind: Kind) -> Packed:
    """Integers `(out, blocks, 32)`, from `low` to `high`, as the type stores them."""
    assert kind.low is not None
    assert kind.high is not None
    if (q != q.round()).any() or q.min() < kind.low or q.max() > kind.high:
        raise ValueError(
            f"codes less zero-points reach from {q.min():g} to {q.max():g}, {kind.name} has integers from {kind.low} to "
            f"{kind.high}; the zero-points are none of the grid's codes"
        )
    if kind.type == _K.Q8_0:
        return q.astype(np.int8).view(np.uint8)
    unsigned = (q - kind.low).astype(np.uint8)
    low = _nibbles(unsigned & 15)
    if kind.high - kind.low <= 15:
        return low
    return _joined(np.packbits(unsigned >> 4, axis=-1, bitorder="little"), low, flat=False)


def _nibbles(codes: NDArray[np.int32] | Packed) -> Packed:
    """Four bits of each: those of the first half of a block below those of the second."""
    halves = codes.astype(np.uint8)
    return halves[..., : _BLOCK // 2] | (halves[..., _BLOCK // 2 :] << np.uint8(4))


def _joined(*parts: Packed, flat: bool = True) -> Packed:
    """What blocks consist of, `(out, blocks, ...)` each, one behind the other; flat: `(out, bytes)`."""
    whole = np.concatenate(parts, axis=-1)
    return np.ascontiguousarray(whole.reshape(len(whole), -1) if flat else whole)
