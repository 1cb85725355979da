"""What a scheme means for a model in bits: of each layer by its own grid, scales and zero-points included."""

import re
from collections.abc import Iterator, Set
from dataclasses import replace
from functools import cache

from qbench.deploy.devices import Unit
from qbench.deploy.operators import Bits, Layer
from qbench.models.sizes import Attention, Block, Linear, Shape
from qbench.quant.scheme import KVSpec, Scheme
from qbench.quant.spec import QuantSpec
from qbench.quant.storage import FLOAT_BITS

_CODEBOOK = "nf4"  # its codes are looked up, and the numbers found multiplied


def widths(
    shape: Shape, scheme: Scheme, floating: float = FLOAT_BITS, kept: Set[str] = frozenset()
) -> tuple[Shape, Bits]:
    """The widths of every layer, and the shape with blocks told apart that the scheme treats differently.

    Args:
        floating: Bits of what the scheme leaves in floating point.
        kept: Names of layers that no scheme quantizes.
    """
    bare = Scheme()
    kinds, layers = list[Block](), dict[tuple[int, str], Layer]()
    for block in shape.blocks:
        groups: dict[tuple[Layer, ...], list[int]] = {}
        for index in block.at:
            found = tuple(
                _layer(bare if x.name in kept or x.role == "router" else scheme, index, x, floating)
                for x in block.linears
            )
            groups.setdefault(found, []).append(index)
        for found, at in groups.items():
            kinds.append(replace(block, at=tuple(at)))
            layers |= {(at[0], x.name): one for x, one in zip(block.linears, found, strict=True)}
    whole = replace(shape, blocks=tuple(kinds))
    kv, residual = _cache(shape, scheme.kv, floating), scheme.kv.residual if scheme.kv else 0
    activation = float(scheme.activation.bits) if scheme.activation else floating
    return whole, Bits(
        _mean(whole, layers, floating), activation, kv, floating, kv_code=float(scheme.kv.bits) if scheme.kv else floating,
        kv_residual=residual, floating=floating, narrow=_attention_unit(scheme), layers=layers,
    )  # fmt: skip


def narrow_unit(weight: str, activation: str) -> Unit:
    """What multiplies numbers of these formats where both have at most 8 bits."""
    integers = {weight == "int", activation == "int"}
    if len(integers) == 2 or _CODEBOOK in (weight, activation):
        return "fp16"
    return "int8" if integers == {True} else "fp8"


def _layer(scheme: Scheme, block: int, linear: Linear, floating: float) -> Layer:
    """Of all experts together where the scheme tells them apart: the mean widths, and the slowest unit."""
    found = [
        _single(own.weight, own.activation, linear.outputs, linear.inputs, floating)
        for own in (scheme.layer(block, name) for name in _names(linear, scheme))
    ]
    if len(set(found)) == 1:
        return found[0]
    return Layer(
        sum(x.weight for x in found) / len(found), sum(x.activation for x in found) / len(found),
        min((x.unit for x in found), key=("fp32", "fp16", "fp8", "int8").index),
    )  # fmt: skip


def _names(linear: Linear, scheme: Scheme) -> Iterator[str]:
    """As the scheme's patterns know the layer: each expert by its number."""
    if linear.role != "expert" or not scheme.overrides:
        yield linear.name
        return
    for number in range(linear.count):
        yield re.sub(r"experts(?=\.|$)", f"experts.{number}", linear.name, count=1)


@cache
def _single(
    weight: QuantSpec | None, act: QuantSpec | None, rows: int, columns: int, floating: float
) -> Layer:
    stored = weight.bits_per_element(rows, columns) if weight else floating
    codes = [float(spec.bits) if spec else floating for spec in (weight, act)]
    narrow = narrow_unit(weight.format, act.format) if weight and act else "fp16"
    return Layer(stored, codes[1], Bits(stored, narrow=narrow).unit(*codes))


def _attention_unit(scheme: Scheme) -> Unit:
    """Of products with keys and values, which are integers wherever they are quantized."""
    return narrow_unit("int", scheme.activation.format) if scheme.activation else "fp16"


def _mean(shape: Shape, layers: dict[tuple[int, str], Layer], floating: float) -> float:
    """Stored bits a weight of the linear layers, routers left out."""
    found = [
        (len(block.at) * x.n_weights, layers[block.at[0], x.name].weight)
        for block in shape.blocks
        for x in block.linears
        if x.role != "router"
    ]
    total = sum(n for n, _ in found)
    return sum(n * bits for n, bits in found) / total if total else floating


def _cache(shape: Shape, kv: KVSpec | None, floating: float) -> float:
    """Mean stored bits of an element of the cache, its floating-point residual aside."""
    attentions = [(len(block.at), block.attention) for block in shape.blocks if block.attention]
    if kv is None or not attentions:
        return floating
    kept = sum(n * attention.kept for n, attention in attentions)
    return sum(n * _kept_bits(attention, kv) for n, attention in attentions) / kept


def _kept_bits(attention: Attention, kv: KVSpec) -> float:
    """Bits that a token leaves in the cache of one block."""
    n, key = attention.n_kv_heads, kv.key.group_size if kv.key_by_channel else None
    parts = [(n, attention.key_dim, kv.key, key), (n, attention.value_dim, kv.value, None)]
    if attention.latent is not None:
        parts = [(1, attention.kept, kv.key, key)]
    # Keys by channel: a group is of tokens, but its scale's share is the same.
    return sum(heads * width * _each(spec, group or width) for heads, width, spec, group in parts)


def _each(spec: QuantSpec, width: int) -> float:
    """Of an element among so many that have scales of their own; what all share is stored once."""
    return float(spec.bits) if spec.granularity == "tensor" else spec.bits_per_element(1, width)
