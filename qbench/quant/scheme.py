"""What to quantize, and onto which grids. No torch here: the planner reads schemes by the thousand."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

from qbench.errors import Unsuitable
from qbench.quant.spec import (
    FORMAT_BITS,
    Format,
    Granularity,
    QuantSpec,
    RangeChoice,
    ScaleFormat,
    SymmetricMode,
)

Layout = Literal["token", "kivi", "tensor"]

# Formats that also say what shares a scale, and how it is stored: format, scale format, group size (OCP Microscaling
# Formats 1.0; NVFP4: NVIDIA's cuDNN and TensorRT documentation).
BLOCK_FORMATS: dict[str, tuple[Format, ScaleFormat, int]] = {
    "mxfp8": ("e4m3", "e8m0", 32),
    "mxfp8_e5m2": ("e5m2", "e8m0", 32),
    "mxfp6": ("e2m3", "e8m0", 32),
    "mxfp6_e3m2": ("e3m2", "e8m0", 32),
    "mxfp4": ("e2m1", "e8m0", 32),
    "nvfp4": ("e2m1", "e4m3", 16),
}


@dataclass(frozen=True)
class KVSpec:
    """The grids of keys (after the rotary embedding) and values.

    Attributes:
        key_by_channel: Whether a key's scale is shared by `group_size` tokens of one channel (KIVI), not by the
            channels of one token and head.
        residual: The last tokens that are kept in floating point, at each step of decoding.
        rotate: Multiply queries and keys by a Hadamard matrix before, which leaves their products unchanged (QuaRot).
    """

    key: QuantSpec
    value: QuantSpec
    key_by_channel: bool = False
    residual: int = 0
    rotate: bool = False

    @property
    def bits(self) -> int:
        return self.value.bits

    @property
    def dynamic(self) -> bool:
        return self.key.dynamic


@dataclass(frozen=True)
class Scheme:
    """The grids of a model's linear layers and of its KV cache; `None` leaves one in floating point.

    The printed form is the field's shorthand with what departs from its defaults behind it: `w4a16g128`,
    `w8a8-wsym`, `w4a16kv4`. Two schemes that differ print differently.

    Attributes:
        bmm: The grid of queries, and of keys and values where `kv` has none, in attention's products (OmniQuant's
            W6A6 and W4A4); attention's weights stay in floating point.
        overrides: What single layers have in place of `weight` and `activation`, by pattern; the last that fits counts.
    """

    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    kv: KVSpec | None = None
    bmm: QuantSpec | None = None
    overrides: tuple[tuple[str, "Scheme"], ...] = ()

    @classmethod
    def of(
        cls,
        wbits: int = 16,
        abits: int = 16,
        kvbits: int = 16,
        group_size: int | None = None,
        *,
        weight_symmetric: bool = False,
        weight_format: str = "int",
        weight_granularity: Literal["auto", "tensor", "block"] = "auto",
        symmetric_mode: SymmetricMode = "full",
        real_zero: bool = False,
        zero_in_range: bool = True,
        scale_bits: int = 16,
        scale_group: int = 16,
        act_symmetric: bool = True,
        act_format: str = "int",
        act_granularity: Literal["token", "group", "tensor"] = "token",
        act_group_size: int | None = None,
        act_range: RangeChoice = "minmax",
        act_symmetric_mode: SymmetricMode = "full",
        kv_layout: Layout = "token",
        kv_group_size: int | None = None,
        kv_symmetric: bool = False,
        kv_format: str = "int",
        kv_residual: int | None = None,
        kv_rotate: bool = False,
        quant_bmm: bool = False,
        overrides: Mapping[str, str] | None = None,
    ) -> "Scheme":
        """Build a scheme from the keys of the command line; 16 bits mean floating point.

        Raises:
            ValueError, Unsuitable: If a value is out of range, or values contradict each other.
        """
        group = None if group_size == -1 else group_size
        if group is not None and group < 1:
            raise ValueError(
                f"group_size is {group}, it must be positive; -1 means one group per output channel"
            )
        weight = activation = kv = None
        if wbits != 16:
            granularity: Granularity = "group" if group else "row"
            if weight_granularity != "auto":
                granularity = weight_granularity
            size = group if granularity != "tensor" else None
            weight = _spec(
                wbits, weight_format, weight_symmetric, granularity, size,
                symmetric_mode=symmetric_mode if weight_symmetric else "full",
                real_zero=real_zero and not weight_symmetric, zero_in_range=zero_in_range or weight_symmetric,
                scale_bits=scale_bits, scale_group=scale_group if scale_bits < 16 else 16,
            )  # fmt: skip
        if abits != 16:
            activation = _activation(
                abits,
                act_format,
                act_symmetric,
                act_granularity,
                act_group_size,
                act_range,
                act_symmetric_mode,
            )
        if kvbits != 16:
            kv = _kv(kvbits, kv_format, kv_layout, kv_group_size, kv_symmetric, kv_residual, kv_rotate)
        if quant_bmm and (activation is None or not activation.dynamic):
            raise Unsuitable(
                "quant_bmm needs dynamic activation bits", "set abits, and act_granularity=token"
            )
        base = cls(weight, activation, kv, activation if quant_bmm else None)
        return replace(base, overrides=tuple((p, base._changed(t)) for p, t in (overrides or {}).items()))

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Read the field's shorthand: `w4a16`, `w4a16g128`, `w8a8`, `w4a16kv4g128`.

        Weights are asymmetric per channel or per group, activations symmetric per token.
        """
        wbits, abits, kvbits, group = _read(text)
        return cls.of(wbits or 16, abits or 16, kvbits or 16, group)

    def _changed(self, text: str) -> "Scheme":
        """This scheme with the bits and the group size of a shorthand, for some layers."""
        wbits, abits, kvbits, group = _read(str(text))
        if kvbits:
            raise ValueError(f"scheme.overrides are for linear layers, {text!r} names KV bits")
        weight = _with_bits(self.weight, QuantSpec(wbits), group) if wbits and wbits != 16 else None
        act = _with_bits(self.activation, QuantSpec(abits, True), None) if abits and abits != 16 else None
        return Scheme(weight, act)

    def layer(self, block: int, name: str) -> "Scheme":
        """The scheme of one linear layer: `overrides` applied. Its `weight` and `activation` are to be read."""
        found = self
        for pattern, scheme in self.overrides:
            if fits(pattern, block, name):
                found = scheme
        return found

    @property
    def is_float(self) -> bool:
        parts = (self, *(scheme for _, scheme in self.overrides))
        return self.kv is None and self.bmm is None and all(not p.weight and not p.activation for p in parts)

    @property
    def weights(self) -> list[QuantSpec]:
        """All weight grids that occur."""
        parts = (self, *(scheme for _, scheme in self.overrides))
        return [part.weight for part in parts if part.weight is not None]

    @property
    def activations(self) -> list[QuantSpec]:
        """All activation grids that occur."""
        parts = (self, *(scheme for _, scheme in self.overrides))
        return [part.activation for part in parts if part.activation is not None]

    @property
    def needs_data(self) -> bool:
        """Whether some range comes from calibration data."""
        return any(not spec.dynamic for spec in self.activations) or bool(self.kv and not self.kv.dynamic)

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        w, a, kv = self.weight, self.activation, self.kv
        text = f"w{w.bits if w else 16}a{a.bits if a else 16}"
        text += f"kv{kv.bits}" if kv else ""
        text += f"g{w.group_size}" if w and w.group_size else ""
        if w:
            text += _departures(
                "w",
                w,
                QuantSpec(w.bits, granularity="group" if w.group_size else "row", group_size=w.group_size),
            )
        if a:
            text += _departures("a", a, QuantSpec(a.bits, symmetric=True))
        if kv:
            text += "-kivi" if kv.key_by_channel else ""
            text += _departures("kv", kv.value, QuantSpec(kv.bits))
            text += _departures("k", kv.key, replace(kv.value)) if kv.key != kv.value else ""
            text += f"-kvres{kv.residual}" if kv.residual else ""
            text += "-kvrot" if kv.rotate else ""
        text += "-bmm" if self.bmm else ""
        return text + "".join(f"-[{pattern}:{scheme}]" for pattern, scheme in self.overrides)

    @cached_property
    def label(self) -> str:
        """The printed form for tables; a long one has its overrides' number and digest in place of them."""
        if not self.overrides:
            return self._text
        base = str(replace(self, overrides=()))
        groups = [
            (text, [pattern for pattern, _ in group])
            for text, group in groupby(self.overrides, lambda one: str(one[1]))
        ]
        text = base + "".join(f"-[{','.join(patterns)}:{scheme}]" for scheme, patterns in groups)
        if len(text) <= _LABEL:
            return text
        digest = hashlib.sha256(self._text.encode()).hexdigest()[:6]
        return f"{base}-[{len(self.overrides)} overrides {digest}]"


_LABEL = 96  # characters that a table has room for


def fits(pattern: str, block: int, name: str) -> bool:
    """Whether a pattern names a layer: `down_proj`, `mlp.*`, `3.mlp.down_proj`, `0.*`."""
    full = f"{block}.{name}"
    parts = full.split(".")
    return any(fnmatchcase(".".join(parts[i:]), pattern) for i in range(len(parts)))


def _read(text: str) -> tuple[int | None, int | None, int | None, int | None]:
    match = re.fullmatch(r"w(\d+)a(\d+)(?:kv(\d+))?(?:g(\d+))?", text)
    if match is None:
        raise ValueError(f"cannot read scheme {text!r}; expected e.g. 'w4a16', 'w4a16g128' or 'w4a8kv4'")
    wbits, abits, kvbits, group = (int(g) if g else None for g in match.groups())
    return wbits, abits, kvbits, group


def _with_bits(base: QuantSpec | None, default: QuantSpec, group: int | None) -> QuantSpec:
    """`base` with the bits of `default`; a format that has other bits gives way to integers."""
    spec = base or default
    if spec.format != "int" and FORMAT_BITS[spec.format] != default.bits:
        spec = replace(spec, format="int", scale_format="float16")
    spec = replace(spec, bits=default.bits)
    return replace(spec, granularity="group", group_size=group) if group else spec


def _spec(
    bits: int, name: str, symmetric: bool, granularity: Granularity, size: int | None, **more: Any
) -> QuantSpec:
    """A grid by the name of its format; block formats bring their own groups."""
    if name == "int":
        return QuantSpec(bits, symmetric, granularity, size, **more)
    more |= {"symmetric_mode": "full", "real_zero": False, "zero_in_range": True}
    if name in BLOCK_FORMATS:
        format_, scale_format, own = BLOCK_FORMATS[name]
        if size not in (None, own):
            raise Unsuitable(f"{name} has groups of {own}", f"group_size is {size}; set {own}, or -1")
        return QuantSpec(bits, True, "group", own, format_, scale_format, **more)
    if name not in FORMAT_BITS:
        raise ValueError(f"unknown format {name!r}; known: int, {', '.join((*FORMAT_BITS, *BLOCK_FORMATS))}")
    return QuantSpec(bits, True, granularity, size, name, **more)


def _activation(
    bits: int,
    name: str,
    symmetric: bool,
    granularity: str,
    size: int | None,
    range_: RangeChoice,
    mode: SymmetricMode,
) -> QuantSpec:
    shared: Granularity = {"token": "row", "group": "group", "tensor": "tensor"}[granularity]  # type: ignore[assignment]
    static = granularity == "tensor"
    if (shared == "group") != (size is not None):
        raise ValueError(
            f"act_granularity is {granularity} and act_group_size is {size}; set both, or neither"
        )
    if range_ != "minmax" and not static:
        raise Unsuitable(f"act_range={range_} is for static ranges", "set act_granularity=tensor")
    more: dict[str, Any] = {
        "dynamic": not static,
        "range": range_,
        "symmetric_mode": mode if symmetric else "full",
    }
    if name in BLOCK_FORMATS and static:
        raise Unsuitable(f"{name} activations have one scale a group", "set act_granularity=token")
    return _spec(
        bits, name, symmetric, shared, size, outer_row=BLOCK_FORMATS.get(name, "")[1:2] == ("e4m3",), **more
    )


def _kv(
    bits: int,
    name: str,
    layout: Layout,
    size: int | None,
    symmetric: bool,
    residual: int | None,
    rotate: bool,
) -> KVSpec:
    if name in BLOCK_FORMATS:
        raise Unsuitable(f"keys and values have no groups of {name}", "set kv_format=e4m3 or int")
    if layout == "kivi":  # arXiv:2402.02750: groups of 32, the last 128 tokens in full precision
        spec = _spec(bits, name, symmetric, "group", size or 32)
        return KVSpec(
            spec, spec, key_by_channel=True, residual=128 if residual is None else residual, rotate=rotate
        )
    if layout == "tensor":
        if residual or size:
            raise Unsuitable(
                "a static KV range has neither groups nor a residual window", "set kv_layout=token"
            )
        spec = _spec(bits, name, symmetric, "tensor", None, dynamic=False)
    else:
        spec = _spec(bits, name, symmetric, "group" if size else "row", size)
    return KVSpec(spec, spec, residual=residual or 0, rotate=rotate)


def _departures(prefix: str, spec: QuantSpec, default: QuantSpec) -> str:
    """How a grid differs from what the shorthand says of it already."""
    words, said = [], {"bits", "format"}
    block = next(
        (n for n, o in BLOCK_FORMATS.items() if o == (spec.format, spec.scale_format, spec.group_size)), None
    )
    if block:
        words.append(block)
        said |= {"symmetric", "granularity", "group_size", "scale_format", "outer_row"}
    elif spec.format != default.format:
        words.append(spec.format)
        said |= {"symmetric"}
    if spec.granularity == "tensor" and not spec.dynamic:
        words.append("tensor")
        said |= {"granularity", "dynamic"}
    for field in fields(QuantSpec):
        value = getattr(spec, field.name)
        if field.name not in said and value not in (getattr(default, field.name), "group"):
            words.append(
                _WORDS[field.name][value] if field.name in _WORDS else f"{_SHORT.get(field.name, '')}{value}"
            )
    return "".join(f"-{prefix}{word}" for word in words)


_WORDS = {
    "symmetric": ("asym", "sym"),
    "outer_row": ("", "rowscale"),
    "real_zero": ("", "realzero"),
    "zero_in_range": ("nozero", ""),
    "dynamic": ("static", "dynamic"),
}
_SHORT = {"group_size": "g", "scale_bits": "scale", "scale_group": "by"}
