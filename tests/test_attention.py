"""Fake quantization inside attention: what is decoded is what a forward pass sees."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import DynamicCache

from qbench.errors import Unsuitable
from qbench.models import decoding
from qbench.models.attention import (
    attention_spec,
    check_kv,
    observe_kv,
    quantize_attention,
    use_quantized_attention,
)
from qbench.models.family import Heads, family_of
from qbench.quant.grid import choose_qparams, fake_quantize
from qbench.quant.hadamard import hadamard
from qbench.quant.scheme import KVSpec, Scheme
from qbench.quant.spec import QuantSpec

from .conftest import CONFIGS, random_model
from .reference.kivi import decode

EPS = torch.finfo(torch.float64).eps
# Sums of some hundred terms in another order, twice through every layer; a code that is rounded otherwise is 1e9 times more.
CLOSE = {"rtol": 0, "atol": 1e4 * EPS}
HEAD_DIM = 12

TWO = QuantSpec(2)
LAYOUTS = {
    "token": KVSpec(TWO, TWO),
    "groups": KVSpec(QuantSpec(2, False, "group", 4), QuantSpec(3, False, "group", 6)),
    "residual": KVSpec(TWO, TWO, residual=5),
    "rotated": KVSpec(TWO, TWO, rotate=True, residual=3),
    "kivi": Scheme.of(kvbits=2, kv_layout="kivi", kv_group_size=4, kv_residual=8).kv,
    "kivi-two-groups": Scheme.of(
        kvbits=2, kv_layout="kivi", kv_group_size=2, kv_residual=4, kv_rotate=True
    ).kv,
    "kivi-no-window": Scheme.of(kvbits=2, kv_layout="kivi", kv_group_size=4, kv_residual=0).kv,
}
MODELS = ["llama-gqa-tied", "mistral-window", "opt"]


def layers_of(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule(family_of(model).blocks))


def quantized(name: str, kv: KVSpec | None, bmm: QuantSpec | None = None) -> nn.Module:
    model = random_model(name)
    use_quantized_attention(model)
    for layer in layers_of(model):
        quantize_attention(layer, kv, bmm)
    return model


def logits(model: nn.Module, tokens: Tensor, **kwargs) -> Tensor:
    return model(tokens, use_cache=False, **kwargs).logits


def decoded(model: nn.Module, tokens: Tensor, prefill: int) -> Tensor:
    """Logits with a cache: `prefill` tokens at once, then a few at once, then one by one."""
    cache, parts = None, []
    for part in tokens.split([prefill, 3, *[1] * (tokens.shape[1] - prefill - 3)], 1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, 1)


def heads(*lengths: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, h, 29, HEAD_DIM, generator=g, dtype=torch.float64) for h in lengths]


class Attention(nn.Module):
    """An attention of four query heads and two of keys and values, as transformers calls it."""

    num_key_value_groups = 2
    is_causal = True


def attention(kv: KVSpec | None, query, key, value, mask=None, bmm=None, static=(), **kwargs) -> Tensor:
    from transformers import AttentionInterface

    use_quantized_attention(random_model("llama"))
    module = Attention()
    quantize_attention(module, kv, bmm, *static)
    return AttentionInterface()["qbench"](module, query, key, value, mask, **kwargs)[0].transpose(1, 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_without_a_spec_is_sdpa_bit_for_bit(name, tokens):
    model = random_model(name)
    expected, generated = logits(model, tokens), model.generate(tokens[:1], max_new_tokens=4, do_sample=False)
    use_quantized_attention(model)
    assert torch.equal(logits(model, tokens), expected)
    assert attention_spec(layers_of(model)[0]) is None
    quantize_attention(layers_of(model)[0], LAYOUTS["kivi"], TWO)
    assert attention_spec(layers_of(model)[0].self_attn).kv == LAYOUTS["kivi"]
    assert not torch.equal(logits(model, tokens), expected)
    quantize_attention(layers_of(model)[0], None, None)
    assert torch.equal(logits(model, tokens), expected)
    assert torch.equal(model.generate(tokens[:1], max_new_tokens=4, do_sample=False), generated)


def test_another_attention_than_sdpa_is_refused(llama):
    llama.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="'eager', quantized attention needs 'sdpa'; set model"):
        use_quantized_attention(llama)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_forward_pass_sees_what_decoding_sees(name, layout, tokens):
    model = quantized(name, LAYOUTS[layout])
    whole = logits(model, tokens)
    for prefill in (1, 13):
        torch.testing.assert_close(decoded(model, tokens, prefill), whole, **CLOSE)
    assert (whole - logits(random_model(name), tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_comes_later_changes_nothing(layout, tokens):
    model = quantized("llama", LAYOUTS[layout])
    torch.testing.assert_close(logits(model, tokens[:, :18]), logits(model, tokens)[:, :18], **CLOSE)


@pytest.mark.parametrize("layout", ["residual", "kivi"])
@pytest.mark.parametrize("name", MODELS)
def test_generation_chooses_what_forward_passes_choose(name, layout, tokens):
    model = quantized(name, LAYOUTS[layout])
    generated = model.generate(tokens[:1, :14], max_new_tokens=12, do_sample=False)
    for end in range(14, 26):
        assert generated[0, end] == logits(model, generated[:, :end])[0, -1].argmax()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama-gqa-tied", "opt"])
def test_padding_on_the_left_changes_nothing(name, layout, tokens):
    """As generation in a batch pads; groups of keys are counted from each row's first token."""
    model = quantized(name, LAYOUTS[layout])
    padded, seen = tokens[:2].clone(), torch.ones(2, 32, dtype=torch.long)
    padded[0] = torch.cat([torch.zeros(5, dtype=torch.long), tokens[0, :27]])
    seen[0, :5] = 0
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    together = logits(model, padded, attention_mask=seen, position_ids=positions)
    torch.testing.assert_close(together[:1, 5:], logits(model, tokens[:1, :27]), **CLOSE)
    torch.testing.assert_close(together[1:], logits(model, tokens[1:2]), **CLOSE)


@pytest.mark.parametrize(("group", "residual"), [(4, 4), (4, 12), (6, 12), (2, 30)])
def test_kivi_is_the_papers_algorithm_run_step_by_step(group, residual):
    query, key, value = heads(4, 2, 2)
    kv = Scheme.of(kvbits=2, kv_layout="kivi", kv_group_size=group, kv_residual=residual).kv
    found = attention(kv, query, key, value)
    for sample in range(2):
        for head in range(4):
            expected = decode(
                query[sample, head], key[sample, head // 2], value[sample, head // 2], 2, group, residual
            )
            torch.testing.assert_close(found[sample, head], expected, rtol=0, atol=100 * EPS)


def test_a_window_keeps_its_tokens_in_floating_point(tokens):
    """And the rotation of queries and keys leaves their products alone; so do all forms of masks."""
    query, key, value = heads(4, 2, 2)
    expected = sdpa(query, key, value, is_causal=True, enable_gqa=True)
    causal = torch.ones(29, 29, dtype=torch.bool).tril()[None, None]
    added = torch.zeros(1, 1, 29, 29, dtype=torch.float64).masked_fill(~causal, float("-inf"))
    for kv in (
        KVSpec(TWO, TWO, residual=29, rotate=True),
        KVSpec(QuantSpec(2, False, "group", 4), TWO, True, 32),
    ):
        for mask in (None, causal, added):
            torch.testing.assert_close(
                attention(kv, query, key, value, mask), expected, rtol=0, atol=100 * EPS
            )
        torch.testing.assert_close(
            attention(kv, query, key, value, scaling=0.1),
            sdpa(query, key, value, is_causal=True, enable_gqa=True, scale=0.1),
            rtol=0,
            atol=100 * EPS,
        )
    shorter = attention(KVSpec(TWO, TWO, residual=28), query, key, value)
    torch.testing.assert_close(shorter[:, :, :28], expected[:, :, :28], rtol=0, atol=100 * EPS)
    assert (shorter[:, :, 28] - expected[:, :, 28]).abs().max() > 1e-6


def test_a_window_of_no_tokens_is_every_token_quantized():
    """The path that mixes both kinds gives what sdpa gives on quantized keys and values."""
    query, key, value = heads(4, 2, 2)
    cache = decoding.recent(key, value, KVSpec(TWO, TWO), 29, None)
    mixed = decoding.attend(Attention(), query, cache, None).transpose(1, 2)
    expected = sdpa(
        query, fake_quantize(key, TWO), fake_quantize(value, TWO), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(mixed, expected, rtol=0, atol=100 * EPS)
    torch.testing.assert_close(
        attention(KVSpec(TWO, TWO), query, key, value), expected, rtol=0, atol=100 * EPS
    )


def test_cutting_long_queries_changes_nothing(monkeypatch):
    query, key, value = heads(4, 2, 2)
    whole = attention(LAYOUTS["kivi"], query, key, value)
    monkeypatch.setattr(decoding, "_SCORES", 2 * 4 * 29 * 3)
    torch.testing.assert_close(attention(LAYOUTS["kivi"], query, key, value), whole, rtol=0, atol=100 * EPS)


def test_scores_are_capped_where_the_model_caps_them():
    query, key, value = heads(2, 2, 2)
    found = attention(KVSpec(TWO, TWO, residual=32), 4 * query, key, value, softcap=1.5)
    scores = 1.5 * torch.tanh(4 * query @ key.mT / HEAD_DIM**0.5 / 1.5)
    scores.masked_fill_(~torch.ones(29, 29, dtype=torch.bool).tril(), float("-inf"))
    torch.testing.assert_close(found, scores.softmax(-1) @ value, rtol=0, atol=100 * EPS)


def test_rotation_helps_keys_with_an_outlier_channel():
    query, key, value = heads(4, 2, 2)
    key[..., 3] *= 30
    exact = sdpa(query, key, value, is_causal=True, enable_gqa=True)
    plain, rotated = (
        (attention(KVSpec(QuantSpec(4), QuantSpec(8), rotate=r), query, key, value) - exact).square().mean()
        for r in (False, True)
    )
    assert rotated < plain


def test_products_are_of_quantized_operands_and_the_cache_has_its_own_grid():
    query, key, value = heads(2, 2, 2)
    bmm = QuantSpec(4, symmetric=True)
    q, k, v = (fake_quantize(x, bmm) for x in (query, key, value))
    torch.testing.assert_close(attention(None, query, key, value, bmm=bmm), sdpa(q, k, v, is_causal=True))
    k2, v2 = fake_quantize(key, TWO), fake_quantize(value, TWO)
    both = attention(KVSpec(TWO, TWO), query, key, value, bmm=bmm)
    torch.testing.assert_close(both, sdpa(q, k2, v2, is_causal=True))
    h = hadamard(HEAD_DIM)
    rotated = attention(KVSpec(TWO, TWO, rotate=True), query, key, value, bmm=bmm)
    q, k = fake_quantize(query @ h, bmm), fake_quantize(key @ h, TWO)
    torch.testing.assert_close(rotated, sdpa(q, k, v2, is_causal=True))


@pytest.mark.parametrize("rotate", [False, True])
def test_static_grids_are_those_of_the_keys_and_values_that_were_observed(rotate, tokens):
    static = QuantSpec(3, granularity="tensor", dynamic=False)
    kv = KVSpec(static, static, rotate=rotate)
    model = random_model("llama-gqa-tied")
    cache = model(tokens, use_cache=True).past_key_values.layers[0]
    key, value = (cache.keys @ hadamard(HEAD_DIM) if rotate else cache.keys), cache.values
    use_quantized_attention(model)
    layer, seen = layers_of(model)[0], ([], [])
    with observe_kv(layer, kv, seen[0].append, seen[1].append):
        before = logits(model, tokens)
    torch.testing.assert_close(seen[0][0], key, **CLOSE)
    torch.testing.assert_close(seen[1][0], value, **CLOSE)
    logits(model, tokens)
    assert len(seen[0]) == len(seen[1]) == 1
    with pytest.raises(ValueError, match="grids of keys and values must be given"):
        quantize_attention(layer, kv, None)
    quantize_attention(layer, kv, None, choose_qparams(key, static), choose_qparams(value, static))
    together = logits(model, tokens)
    assert (together - before).abs().max() > 1e-3
    torch.testing.assert_close(torch.cat([logits(model, t[None]) for t in tokens]), together, **CLOSE)


def test_a_copy_of_a_quantized_model_is_quantized(tokens):
    model = quantized("llama", LAYOUTS["kivi"])
    assert torch.equal(logits(copy.deepcopy(model), tokens), logits(model, tokens))


def test_half_precision_stays_half_precision(tokens):
    for kv in LAYOUTS.values():
        model = quantized("llama-gqa-tied", kv).bfloat16()
        assert logits(model, tokens).dtype == torch.bfloat16
        assert torch.isfinite(logits(model, tokens)).all()


def test_a_cache_that_forgot_part_of_a_group_is_refused(tokens):
    """Decoding that began before the attention was quantized keeps no more than the sliding window."""
    model = random_model("mistral-window")
    cache = model(tokens, use_cache=True).past_key_values
    use_quantized_attention(model)
    for layer in layers_of(model):
        quantize_attention(layer, LAYOUTS["kivi"], None)
    with pytest.raises(ValueError, match=r"need all of the sequence; pass an empty DynamicCache\(\)"):
        model(tokens[:, :1], past_key_values=cache, use_cache=True)
    assert isinstance(model(tokens, past_key_values=DynamicCache()).past_key_values, DynamicCache)


def test_what_is_not_covered_is_refused(tokens):
    query, key, value = heads(2, 2, 2)
    with pytest.raises(NotImplementedError, match="attention with s_aux cannot keep its last tokens"):
        attention(LAYOUTS["kivi"], query, key, value, s_aux=torch.zeros(2))
    with pytest.raises(NotImplementedError, match="attention with dropout"):
        attention(LAYOUTS["residual"], query, key, value, dropout=0.1)
    model = quantized("llama", LAYOUTS["residual"])
    with pytest.raises(ValueError, match="as in a static cache"):
        model.generate(tokens[:1], max_new_tokens=2, do_sample=False, cache_implementation="static")


@pytest.mark.parametrize(
    ("kv", "bmm", "message"),
    [
        (
            LAYOUTS["token"],
            QuantSpec(4, True, "group", 5),
            "bmm grid's 5 does not divide 12; choose a divisor",
        ),
        (KVSpec(TWO, QuantSpec(2, False, "group", 8)), None, "value grid's 8 does not divide 12"),
        (KVSpec(QuantSpec(2, False, "group", 8), TWO), None, "key grid's 8 does not divide 12"),
        (
            KVSpec(QuantSpec(2, False, "group", 4), TWO, True, 6),
            None,
            "6 is not one of 4; keys are quantized when",
        ),
        (
            KVSpec(QuantSpec(2, granularity="tensor"), TWO),
            None,
            "key grid's granularity is tensor; choose row",
        ),
    ],
)
def test_grids_that_attention_cannot_have_are_refused(llama, kv, bmm, message):
    with pytest.raises(Unsuitable, match=message):
        check_kv(family_of(llama), kv, bmm)


def test_grids_that_attention_can_have_are_not_refused(model):
    for kv in LAYOUTS.values():
        check_kv(family_of(model), kv, QuantSpec(4, True))
    check_kv(
        family_of(model), KVSpec(QuantSpec(2, False, "group", 8), QuantSpec(2, False, "group", 4), True, 16)
    )
    with pytest.raises(Unsuitable, match="kv_rotate needs a Hadamard matrix of head_dim; there is none of 6"):
        check_kv(replace(family_of(model), heads=Heads(1, 1, 6, 6)), LAYOUTS["rotated"])
