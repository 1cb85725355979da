"""Fake quantization of what flows: the inputs of linear layers, and the keys and values of attention.

Keys and values are reached through transformers' attention registry, so that one function serves
every architecture, and generation through a cache as well: the cache keeps what was computed, and
attention reads it quantized. Keys arrive after the rotary embedding.

transformers takes seconds to import; it is imported where it is used, so that a command whose jobs are all
recorded does not wait for it.
"""

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from qbench.quant.affine import QParams, fake_quantize
from qbench.quant.scheme import QuantSpec

KV_ATTENTION = "qbench_sdpa_kv"

_kv_specs: WeakKeyDictionary[nn.Module, QuantSpec] = WeakKeyDictionary()


def quantize_input(linear: nn.Linear, spec: QuantSpec, qparams: QParams | None = None) -> None:
    """From now on, fake-quantize whatever enters `linear`: on its own grid, or on that of `qparams`."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (fake_quantize(args[0], spec, qparams), *args[1:])

    linear.register_forward_pre_hook(hook)


def quantize_kv(model: Any, spec: QuantSpec) -> None:
    """From now on, fake-quantize keys and values in every attention of `model`, one grid per token and head.

    Raises:
        ValueError: If the model runs another attention than `sdpa`, which this one replaces.
    """
    if model.config._attn_implementation != "sdpa":
        raise ValueError(
            f"the model runs attention {model.config._attn_implementation!r}, KV quantization needs 'sdpa'; "
            "set model.attn=sdpa"
        )
    _register()
    model.set_attn_implementation(KV_ATTENTION)
    for module in model.modules():
        _kv_specs[module] = spec


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    spec = _kv_specs[module]
    key, value = fake_quantize(key, spec), fake_quantize(value, spec)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    # Both are needed: without a mask of its own an unknown attention gets none, and is not causal in a batch.
    AttentionInterface.register(KV_ATTENTION, _attention)
    AttentionMaskInterface.register(KV_ATTENTION, sdpa_mask)
