"""Attention over a cache whose last tokens are in floating point, for all steps of decoding at once.

The query at position t sees what the cache holds when its token is decoded, its own key and value included:

    values    positions ≤ t − R are quantized; the last R are not
    keys      the same; or by channel (KIVI): positions < ⌊(t + 1) / F⌋ F are quantized

R is the residual window. Keys by channel share a scale over G tokens and are quantized F = R at a time, when the
window is full (KIVI, arXiv:2402.02750, Algorithm 1; the authors' code attends once more before it quantizes). With
R = 0 they wait for their group alone, F = G: a scale that G tokens share cannot be known before.

Where queries differ in what they see, scores of both kinds of keys are computed and each takes its own; so with values.
"""

from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qbench.quant.grid import fake_quantize, wide
from qbench.quant.scheme import KVSpec
from qbench.quant.spec import QuantSpec

# Queries are cut into runs: for the memory of their scores, and because only keys near the window's edge are seen
# in both ways by the queries of one run, and computed twice.
_SCORES = 1 << 24  # elements of one tensor of scores
_ROWS = 256


class Cache(NamedTuple):
    """Keys and values, `(batch, n_kv_heads, kv_len, head_dim)`, in floating point and quantized.

    `key_is_old` and `value_is_old`, `(batch or 1, 1, q_len, kv_len)`, say which of the two a query sees.
    """

    key: Tensor
    value: Tensor
    old_key: Tensor
    old_value: Tensor
    key_is_old: Tensor
    value_is_old: Tensor


def recent(key: Tensor, value: Tensor, kv: KVSpec, q_len: int, position_ids: Tensor | None) -> Cache:
    """What the last `q_len` tokens of a cache see of it, each at its own step of decoding.

    Args:
        position_ids: Of the queries, `(batch or 1, q_len)`: tells how many keys of a row are padding on the left.
            `None` where there is none.

    Raises:
        ValueError: If keys by channel lack the beginning of the sequence.
    """
    kv_len = key.shape[2]
    slot = torch.arange(kv_len, device=key.device)
    at = slot[kv_len - q_len :, None]
    value_is_old = (slot <= at - kv.residual)[None, None]
    old_value = fake_quantize(value, kv.value)
    if not kv.key_by_channel:
        return Cache(key, value, fake_quantize(key, kv.key), old_value, value_is_old, value_is_old)
    padding = _padding(kv_len, position_ids).to(key.device)[:, None, None, None]
    size = kv.key.group_size
    assert size is not None, "keys by channel have groups"
    flushed = kv.residual or size
    key_is_old = slot - padding < (at - padding + 1) // flushed * flushed
    old_key = _by_channel(key, kv.key, size, padding.flatten())
    return Cache(key, value, old_key, old_value, key_is_old, value_is_old)


def attend(
    module: nn.Module,
    query: Tensor,
    cache: Cache,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Tensor:
    """Softmax attention, in float32 at least, `(batch, q_len, n_heads, head_dim)`; `query` has the heads before.

    Raises:
        NotImplementedError: If the model adds to its scores what is not covered here, or drops some out.
        ValueError: If the last keys are empty places of a static cache.
    """
    _check_covered(dropout, kwargs)
    repeats = query.shape[1] // cache.key.shape[1]
    key, value, old_key, old_value = (
        x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in cache[:4]
    )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = causal_mask(attention_mask, query.shape[2], key.shape[2], causal, query.device)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = min(max(_SCORES // (query.shape[0] * query.shape[1] * key.shape[2]), 1), _ROWS)
    outputs = []
    for start in range(0, query.shape[2], rows):
        part = slice(start, start + rows)
        seen = _seen(mask[:, :, part])
        k, v, old_k, old_v = (x[:, :, seen] for x in (key, value, old_key, old_value))
        is_old = cache.key_is_old[:, :, part, seen]
        scores = _scores(wide(query[:, :, part]), wide(k), wide(old_k), is_old)
        p = capped_softmax(scores * scaling, softcap, mask[:, :, part, seen]).to(v.dtype)
        outputs.append(_weighted_sum(p, v, old_v, cache.value_is_old[:, :, part, seen]))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def _check_covered(dropout: float, kwargs: dict[str, Any]) -> None:
    unknown = [name for name in ("s_aux", "sinks", "position_bias", "cache") if kwargs.get(name) is not None]
    if unknown or dropout:
        raise NotImplementedError(
            f"attention with {', '.join(unknown) or 'dropout'} cannot keep its last tokens in floating point; set "
            "kv_residual=0 and kv_layout=token, and put the model in evaluation mode"
        )


def keep_whole_past(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A model's arguments with a cache that forgets nothing in place of an empty one that keeps a sliding window.

    Masks still hide what has left the window.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    name = next(name for name in CACHES if name in signature(model.forward).parameters)
    cache = next((kwargs[n] for n in CACHES if kwargs.get(n) is not None), None)
    if cache is None:
        if kwargs.get("use_cache") is False:
            return kwargs
        cache = DynamicCache(config=model.config)
    if cache.get_seq_length() == 0:
        cache.layers = [
            DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer
            for layer in cache.layers
        ]
    return {key: value for key, value in kwargs.items() if key not in CACHES} | {name: cache}


CACHES = ("cache", "past_key_values")  # as models call it since transformers 5.24, and before


def go_on(out: Any) -> dict[str, Any]:
    """What a model must be called with to go on from its output `out`: the cache, by the name that it has there."""
    for name in CACHES:
        if out.get(name) is not None:
            return {name: out[name]}
    raise NotImplementedError(
        f"the model gives no cache to go on from, only {', '.join(out)}; one is needed to decode"
    )


def _padding(kv_len: int, position_ids: Tensor | None) -> Tensor:
    """How many keys on the left are padding, by row, `(batch or 1,)`."""
    if position_ids is None or position_ids.ndim != 2:
        return torch.zeros(1, dtype=torch.long)
    last = position_ids[:, -1]
    padding = torch.where(last < 0, 0, kv_len - 1 - last)  # a last token that is padding itself may be at -1
    if (padding < 0).any():
        raise ValueError(
            f"the cache holds {kv_len} keys at position {int(last.max())}, and keys by channel need all of the "
            "sequence; pass an empty DynamicCache() to the model, which keeps more than a sliding window"
        )
    return padding


def _by_channel(key: Tensor, spec: QuantSpec, size: int, padding: Tensor) -> Tensor:
    """Keys with scales shared by the tokens of a group, groups counted from each row's first token.

    What fills the last group is no token of the sequence; no query sees that group quantized.
    """
    kv_len = key.shape[2]
    slot = torch.arange(kv_len, device=key.device)
    if padded := bool(padding.any()):
        key = _taken(key, (slot + padding[:, None]) % kv_len)
    tokens_last = nn.functional.pad(key.mT, (0, -kv_len % size))
    old = fake_quantize(tokens_last, spec).mT[:, :, :kv_len]
    return _taken(old, (slot - padding[:, None]) % kv_len) if padded else old


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of `(batch, heads, tokens, dim)` in the `order` of each row, `(batch or 1, tokens)`."""
    return x.gather(2, order[:, None, :, None].expand(x.shape))


def causal_mask(mask: Tensor | None, q_len: int, kv_len: int, causal: bool, device: torch.device) -> Tensor:
    """The mask as sdpa takes it, boolean or to be added, `(batch or 1, heads or 1, q_len, kv_len)`."""
    if mask is None:
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
        # As in sdpa, the first query sees the first key; with more keys than queries these are empty places.
        mask = mask.tril()[None, None] if causal and q_len > 1 else mask[None, None]
    last = mask[..., -1, -1]
    if not (last if mask.dtype == torch.bool else last > torch.finfo(mask.dtype).min / 2).any():
        raise ValueError(
            f"no query sees the last of {kv_len} keys, as in a static cache; use a dynamic one "
            "(cache_implementation='dynamic')"
        )
    return mask


def _seen(mask: Tensor) -> slice:
    """The keys from the first to the last that some query sees."""
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    keys = visible.flatten(0, 2).any(0).nonzero()
    return slice(int(keys[0]), int(keys[-1]) + 1) if len(keys) else slice(None)


def _scores(query: Tensor, key: Tensor, old_key: Tensor, is_old: Tensor) -> Tensor:
    a, b = _differ(is_old)
    mixed = torch.where(is_old[..., a:b], query @ old_key[:, :, a:b].mT, query @ key[:, :, a:b].mT)
    return torch.cat((query @ old_key[:, :, :a].mT, mixed, query @ key[:, :, b:].mT), -1)


def _weighted_sum(p: Tensor, value: Tensor, old_value: Tensor, is_old: Tensor) -> Tensor:
    a, b = _differ(is_old)
    old = p[..., :b].masked_fill(~is_old[..., :b], 0) @ old_value[:, :, :b]
    return old + p[..., a:].masked_fill(is_old[..., a:], 0) @ value[:, :, a:]


def _differ(is_old: Tensor) -> tuple[int, int]:
    """Every query sees the keys before the first number as old, and those from the second on as new."""
    n_old = is_old.sum(-1)
    return int(n_old.min()), int(n_old.max())


def capped_softmax(scores: Tensor, softcap: float | None, mask: Tensor) -> Tensor:
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask.dtype != torch.bool:
        return (scores + mask).softmax(-1)
    # Not −∞: a query that is padding sees no key at all, and must not become NaN.
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
