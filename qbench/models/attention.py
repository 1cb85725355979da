"""Fake quantization inside attention: of keys and values as a cache would hold them, and of the products' operands.

transformers' attention registry lets one function serve nearly every architecture, and generation through a cache as
well: the cache keeps what was computed, and attention reads it quantized. Keys arrive after the rotary embedding.
Architectures with arithmetic of their own (Falcon, BLOOM, MPT) are given a cache that quantizes whatever is read from it.

Layouts (`KVSpec`): a grid for each token and head, or for its groups of channels; one fixed grid for a whole layer,
from calibration data; and KIVI's (Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", ICML
2024, arXiv:2402.02750). Where the last tokens stay in floating point, every query of a forward pass sees the cache
as it would be when that query's token is decoded (`qbench.models.decoding`), so that a perplexity has the error
that generation has. The operands of the products (`bmm`): OmniQuant (arXiv:2308.13137), W6A6 and W4A4.

transformers takes seconds to import; it is imported where it is used, so that a command whose jobs are all
recorded does not wait for it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import Tensor, nn

from qbench.errors import Unsuitable
from qbench.models.decoding import CACHES, attend, capped_softmax, causal_mask, keep_whole_past, recent
from qbench.models.family import Family, family_of
from qbench.models.hooks import on_device
from qbench.quant.grid import QParams, fake_quantize
from qbench.quant.hadamard import hadamard, hadamard_transform
from qbench.quant.scheme import KVSpec
from qbench.quant.spec import QuantSpec

QUANTIZED_ATTENTION = "qbench"  # transformers reads "sdpa" in a name as a demand for it

Listen = Callable[[Tensor], None]


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """What the attention of one block quantizes; each is equal to itself alone.

    Attributes:
        kv: The grids of keys and values.
        bmm: The grid of queries, and of keys and values where `kv` is `None`.
        key, value: The fixed grids of a static `kv`.
    """

    kv: KVSpec | None = None
    bmm: QuantSpec | None = None
    key: QParams | None = None
    value: QParams | None = None


# An attribute of the attention module, so that a copy of a quantized model is quantized too.
_SPEC, _LISTENERS = "qbench_attention_spec", "qbench_attention_listeners"


def use_quantized_attention(model: Any) -> None:
    """Let `model` run the attention that `quantize_attention` acts upon; until then it is its own, bit for bit.

    Raises:
        ValueError: If the model runs another attention than `sdpa`, which this one replaces, and could run that.
    """
    family = family_of(model)
    if family.attention == "own":
        for block in model.get_submodule(family.blocks):
            attention = block.get_submodule(str(family.attention_out).rpartition(".")[0])
            attention.register_forward_pre_hook(_through_cache, with_kwargs=True)
        return
    if other := irreplaceable(model):
        raise ValueError(
            f"the model runs attention {other!r}, quantized attention needs 'sdpa'; set model.attn=sdpa"
        )
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    # Both are needed: without a mask of its own an unknown attention gets none, and is not causal in a batch.
    AttentionInterface.register(QUANTIZED_ATTENTION, _attention)
    AttentionMaskInterface.register(QUANTIZED_ATTENTION, sdpa_mask)
    model.set_attn_implementation(QUANTIZED_ATTENTION)
    model.register_forward_pre_hook(_keep_key_groups, with_kwargs=True)


def irreplaceable(model: Any) -> str:
    """The attention that a model runs, if quantized attention cannot stand in for it; a skeleton will do."""
    own = str(model.config._attn_implementation)
    return "" if own == "sdpa" or (own == "eager" and not model._supports_sdpa) else own


def quantize_attention(
    layer: nn.Module,
    kv: KVSpec | None,
    bmm: QuantSpec | None,
    key: QParams | None = None,
    value: QParams | None = None,
) -> None:
    """From now on, fake-quantize in every attention inside `layer`, a decoder block; nothing, where all is `None`.

    Args:
        key, value: The fixed grids of a `kv` that is not dynamic: of keys, rotated if `kv.rotate`, and of values.

    Raises:
        ValueError: If a static `kv` comes without its grids, or a dynamic one with them.
    """
    if (kv is not None and not kv.dynamic) != (key is not None and value is not None):
        raise ValueError(
            "the grids of keys and values must be given exactly where kv.key.dynamic is unset; observe them with "
            "observe_kv, choose them with choose_qparams"
        )
    spec = AttentionSpec(kv, bmm, key, value) if kv or bmm else None
    for module in layer.modules():  # which of them is an attention, only the architecture knows
        setattr(module, _SPEC, spec)


def attention_spec(module: nn.Module) -> AttentionSpec | None:
    """What `quantize_attention` has set for a decoder block, or for a module inside."""
    spec: AttentionSpec | None = getattr(module, _SPEC, None)
    return spec


@contextmanager
def observe_kv(layer: nn.Module, kv: KVSpec, key: Listen, value: Listen) -> Iterator[None]:
    """Show the keys and values of a decoder block to `key` and `value`, before they are quantized, meanwhile.

    Both are `(batch, n_kv_heads, seq_len, head_dim)`; keys are rotated if `kv.rotate`.
    """
    for module in layer.modules():
        setattr(module, _LISTENERS, (kv.rotate, key, value))
    try:
        yield
    finally:
        for module in layer.modules():
            delattr(module, _LISTENERS)


def check_kv(family: Family, kv: KVSpec | None, bmm: QuantSpec | None = None) -> None:
    """Refuse grids that attention cannot have.

    Raises:
        Unsuitable: If there is no attention, groups do not divide the head or the residual window, a head has no Hadamard
            matrix, a grid would join tokens that are decoded one after another, or what an attention that is not run by
            transformers' registry does not show would have to be quantized.
    """
    if kv is None and bmm is None:
        return
    if family.attention == "none" or family.heads is None:
        raise Unsuitable("the model has no attention, hence no keys and values", "unset kvbits and bmm")
    sizes = {"key": family.heads.size, "value": family.heads.value_size, "bmm": family.heads.size}
    for name, spec in _along_the_head(kv, bmm):
        if spec.group_size and sizes[name] % spec.group_size:
            raise Unsuitable(
                "attention's groups must divide head_dim",
                f"the {name} grid's {spec.group_size} does not divide {sizes[name]}; choose a divisor, or no groups",
            )
        if spec.granularity in ("tensor", "block") and spec.dynamic:
            raise Unsuitable(
                "a dynamic grid in attention belongs to one token",
                f"the {name} grid's granularity is {spec.granularity}; choose row or group",
            )
    if kv is not None and kv.key_by_channel and (not kv.key.group_size or kv.residual % kv.key.group_size):
        raise Unsuitable(
            "kv_residual must be a multiple of the tokens that share a key's scale",
            f"{kv.residual} is not one of {kv.key.group_size}; keys are quantized when the window is full",
        )
    if kv is not None and kv.rotate:
        _check_rotation(family.heads.size)
    shown = kv is not None and not (kv.rotate or kv.residual or kv.key_by_channel)
    if family.attention == "own" and (bmm is not None or not shown):
        raise Unsuitable(
            "this architecture has an attention of its own, which shows only its cache",
            "keys and values by token can be quantized; unset bmm, kv_rotate, kv_residual and keys by channel",
        )


def _along_the_head(kv: KVSpec | None, bmm: QuantSpec | None) -> Iterator[tuple[str, QuantSpec]]:
    if kv is not None and not kv.key_by_channel:
        yield "key", kv.key
    if kv is not None:
        yield "value", kv.value
    if bmm is not None:
        yield "bmm", bmm


def _check_rotation(head_dim: int) -> None:
    try:
        hadamard(head_dim)
    except ValueError as error:
        raise Unsuitable(
            "kv_rotate needs a Hadamard matrix of head_dim",
            f"there is none of {head_dim}; set kv_rotate=false",
        ) from error


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: `(batch, n_heads, seq_len, head_dim)`, the keys of the cache included."""
    spec = attention_spec(module)
    if listeners := getattr(module, _LISTENERS, None):
        rotate, on_key, on_value = listeners
        on_key(hadamard_transform(key) if rotate else key)
        on_value(value)
    kv, bmm = (spec.kv, spec.bmm) if spec else (None, None)
    if kv and kv.rotate:  # H is orthonormal: (q H)(k H)ᵀ = q kᵀ
        query, key = hadamard_transform(query), hadamard_transform(key)
    if bmm:
        query = fake_quantize(query, bmm)
        if kv is None:
            key, value = fake_quantize(key, bmm), fake_quantize(value, bmm)
    if kv and spec and (kv.residual or kv.key_by_channel):
        cache = recent(key, value, kv, query.shape[2], kwargs.get("position_ids"))
        return attend(module, query, cache, attention_mask, **kwargs), None
    if kv and spec:
        key = fake_quantize(key, kv.key, spec.key and on_device(spec.key, key.device))
        value = fake_quantize(value, kv.value, spec.value and on_device(spec.value, value.device))
    if kwargs.get("softcap") is not None:  # which sdpa cannot
        return _capped(query, key, value, attention_mask, **kwargs), None
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError(
            f"{type(module).__name__} has attention sinks, which quantized attention does not"
        )
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, softcap: float, scaling: float, **_: Any
) -> Tensor:
    """Attention whose scores are capped by `softcap * tanh(scores / softcap)`, `(batch, seq_len, n_heads, head_dim)`."""
    n_readers = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(n_readers, 1), value.repeat_interleave(n_readers, 1)
    seen = causal_mask(mask, query.shape[2], key.shape[2], True, query.device)
    p = capped_softmax(query @ key.mT * scaling, softcap, seen)
    return (p.to(value.dtype) @ value).transpose(1, 2)


class _Reading:
    """In the place of a cache: keeps what the cache keeps, or nothing, and is read quantized."""

    def __init__(self, cache: Any, module: nn.Module) -> None:
        self._cache, self._module = cache, module

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._cache is not None:
            key, value = self._cache.update(key, value, *args, **kwargs)
        if listeners := getattr(self._module, _LISTENERS, None):
            _, on_key, on_value = listeners
            on_key(key)
            on_value(value)
        if (spec := attention_spec(self._module)) is None or spec.kv is None:
            return key, value
        return (
            fake_quantize(key, spec.kv.key, spec.key and on_device(spec.key, key.device)),
            fake_quantize(value, spec.kv.value, spec.value and on_device(spec.value, value.device)),
        )

    def get_seq_length(self, *args: Any) -> int:
        return 0 if self._cache is None else int(self._cache.get_seq_length(*args))


def _through_cache(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Put `_Reading` where an attention looks for its cache, if there is something to quantize or to listen to."""
    if attention_spec(module) is None and getattr(module, _LISTENERS, None) is None:
        return None
    bound = signature(module.forward).bind_partial(*args, **kwargs)
    name = next(n for n in (*CACHES, "layer_past") if n in signature(module.forward).parameters)
    kwargs = {k: v for k, v in bound.arguments.items() if k != "kwargs"} | bound.arguments.get("kwargs", {})
    return (), kwargs | {name: _Reading(kwargs.get(name), module)}


def _keep_key_groups(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Where keys share scales along tokens, a cache must not forget part of a group at a sliding window's edge."""
    specs = map(attention_spec, model.modules())
    if any(spec and spec.kv and spec.kv.key_by_channel for spec in specs):
        kwargs = keep_whole_past(model, kwargs)
    return args, kwargs
