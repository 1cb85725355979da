"""The engine, the stream of activations and the hooks."""

import copy

import pytest
import torch

from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.rtn import RTN
from qbench.calib.block import Block
from qbench.calib.observers import AbsMax, AbsMean, Gram, Range
from qbench.calib.stream import first_inputs
from qbench.deploy.size import size_metrics
from qbench.engine import quantize
from qbench.models.family import family_of
from qbench.quant.grid import choose_qparams, fake_quantize
from qbench.quant.scheme import Scheme

from .conftest import random_model


def blocks_of(model, tokens):
    family = family_of(model)
    stream, kwargs = first_inputs(model, family, tokens, batch_size=4)
    layers = model.get_submodule(family.blocks)
    return [
        Block(i, layer, family, stream, kwargs[i], torch.device("cpu"), n_blocks=1 + len(layers))
        for i, layer in enumerate(layers)
    ]


def captured(model, tokens, path):
    """What enters a module during an ordinary forward pass."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens, use_cache=False)
    handle.remove()
    return seen[0]


def test_blocks_chained_by_hand_are_the_model(model, tokens):
    """Whatever kwargs the model gives its blocks (masks, positions, windows) are kept for each block."""
    family = family_of(model)
    stream, kwargs = first_inputs(model, family, tokens, batch_size=4)
    for layer, kw in zip(model.get_submodule(family.blocks), kwargs, strict=True):
        stream = stream.through(layer, kw, torch.device("cpu"))
    with torch.no_grad():
        hidden = stream.hidden
        head = model.lm_head
        norm = getattr(model.model, "norm", None) or getattr(model.model.decoder, "final_layer_norm", None)
        logits = head(norm(hidden) if norm is not None else hidden)
    expected = model(tokens, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


def test_statistics_are_those_of_an_ordinary_forward_pass(model, tokens):
    block = blocks_of(model, tokens)[0]
    for link, (gram, mean, peak, extremes) in block.observe(Gram, AbsMean, AbsMax, Range).items():
        x = captured(model, tokens, f"{block.family.blocks}.0.{link.sinks[0]}").flatten(0, -2)
        torch.testing.assert_close(gram, x.T @ x / len(x))
        torch.testing.assert_close(mean, x.abs().mean(0))
        torch.testing.assert_close(peak, x.abs().amax(0))
        torch.testing.assert_close(extremes, torch.stack(x.aminmax()))


def test_observing_stops_at_the_last_layer_observed(llama, tokens):
    block = blocks_of(llama, tokens)[0]
    ran = []
    block.layer.mlp.register_forward_hook(lambda *_: ran.append(1))
    block.observe(Gram, links=block.links[:1])
    assert not ran


def test_block_errors_are_zero_without_quantization_and_small_at_8_bits(llama, tokens):
    class Data(RTN):
        needs_data = True

    assert quantize(copy.deepcopy(llama), Data(), Scheme(), tokens).errors == [0.0, 0.0]
    eight = quantize(copy.deepcopy(llama), Data(), Scheme.parse("w8a16g16"), tokens).errors
    three = quantize(copy.deepcopy(llama), Data(), Scheme.parse("w3a16g16"), tokens).errors
    assert all(0 < e < 1e-3 < t < 1 for e, t in zip(eight, three, strict=True))


def test_a_data_free_algorithm_needs_no_tokens(model):
    assert quantize(model, RTN(), Scheme.parse("w4a8g16")).errors == []


def test_an_algorithm_that_needs_data_says_so(llama):
    with pytest.raises(ValueError, match="needs calibration tokens"):
        quantize(llama, GPTQ(), Scheme.parse("w4a16"))


def test_values_that_are_not_finite_stop_the_job_and_name_the_block(llama, tokens):
    llama.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"block 1: mlp\.up_proj"):
        quantize(llama, RTN(), Scheme.parse("w4a16"), tokens)


def test_activations_per_token_do_not_depend_on_the_batch(llama, tokens):
    quantize(llama, RTN(), Scheme.of(wbits=16, abits=4))
    together = llama(tokens).logits
    alone = torch.cat([llama(row[None]).logits for row in tokens])
    torch.testing.assert_close(together, alone)


def test_static_activations_use_the_range_of_the_calibration_data(llama, tokens):
    scheme = Scheme.of(wbits=16, abits=4, act_granularity="tensor")
    x = captured(llama, tokens, "model.layers.0.self_attn.q_proj")
    plain = copy.deepcopy(llama)
    quantize(llama, RTN(), scheme, tokens)
    seen = []
    llama.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    llama(tokens[:1])
    grid = choose_qparams(x, scheme.activation)
    torch.testing.assert_close(seen[0], fake_quantize(x[:1], scheme.activation, grid))
    with pytest.raises(ValueError, match="needs calibration tokens"):
        quantize(plain, RTN(), scheme)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "qwen3", "opt"])
def test_fewer_kv_bits_are_worse_and_many_are_harmless(name, tokens):
    """Were the cache not quantized in the first forward pass, 2 bits would change nothing."""
    model = random_model(name)
    before = model(tokens).logits
    error = {}
    for bits in (8, 4, 2):
        quantized = copy.deepcopy(model)
        quantize(quantized, RTN(), Scheme.of(kvbits=bits))
        error[bits] = (quantized(tokens).logits - before).square().mean().item()
    assert 0 < error[8] < error[4] < error[2]
    torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_quantized_keys_and_values_are_causal_and_reach_generation(name, tokens):
    model = random_model(name)
    quantize(model, RTN(), Scheme.of(kvbits=2))
    whole, part = model(tokens).logits, model(tokens[:, :20]).logits
    torch.testing.assert_close(whole[:, :20], part)
    # Greedy decoding through the cache must choose what a forward pass without one chooses.
    generated = model.generate(tokens[:1, :16], max_new_tokens=8, do_sample=False, use_cache=True)
    for end in range(16, 24):
        assert generated[0, end] == model(generated[:, :end], use_cache=False).logits[0, -1].argmax()


def test_bits_per_weight_counts_everything(llama):
    n_linear = sum(
        layer.get_submodule(n).weight.numel()
        for layer in llama.model.layers
        for n in family_of(llama).linears(layer)
    )
    n_all = sum(p.numel() for p in llama.parameters())
    quantized = quantize(llama, RTN(), Scheme.of(wbits=4, group_size=16))
    metrics = size_metrics(llama, n_all, quantized.stored_bits)
    per_linear = 4 + (16 + 4) / 16
    assert metrics["bits_per_linear_weight"] == pytest.approx(per_linear)
    expected = (per_linear * n_linear + 16 * (n_all - n_linear)) / n_all
    assert metrics["bits_per_weight"] == pytest.approx(expected)
    assert metrics["model_mb"] == pytest.approx(expected * n_all / 8e6)
    assert size_metrics(llama, n_all, {})["bits_per_weight"] == 16


@pytest.mark.parametrize("name", ["llama", "mistral-window", "opt"])
def test_a_pass_in_stages_sees_what_passes_one_by_one_see(name, tokens, monkeypatch):
    """Layers rounded on the way are seen by the layers behind them, and by the outputs."""

    def rounded() -> tuple[list, torch.Tensor, list]:
        block, seen = blocks_of(random_model(name), tokens)[0], []
        for link, (gram,) in block.sequential(Gram):
            seen.append(gram)
            for sink in block.sinks(link):
                sink.weight.mul_(0.5)
        return seen, block.outputs().hidden, ran

    ran: list = []
    monkeypatch.setattr(Block, "observe", lambda self, *a, **k: ran.append(1) or observe(self, *a, **k))
    staged, outputs, _ = rounded()
    assert not ran, "a pass in stages needs no other"
    monkeypatch.setattr("qbench.calib.block._PAUSED_UP_TO", 0)
    single, expected, _ = rounded()
    assert len(ran) == len(single)
    for a, b in zip(staged, single, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(outputs, expected)


def test_gram_matrices_follow_scales_and_need_no_other_pass(llama, tokens, monkeypatch):
    """They are remembered until something else changes, and handed out once."""
    block, passes = blocks_of(llama, tokens)[0], []
    block.layer.register_forward_pre_hook(lambda *_: passes.append(1))
    block.observe(AbsMean, Gram)
    for link in filter(block.scalable, block.links):
        block.migrate(link, torch.rand(block.sinks(link)[0].in_features).to(tokens.device).double() + 0.5)
    passes.clear()
    followed = block.observe(Gram)
    assert not passes
    for link, (gram,) in block.observe(Gram).items():
        torch.testing.assert_close(followed[link][0], gram)
    assert passes
    block.migrate(block.links[0], torch.full((block.sinks(block.links[0])[0].in_features,), 2.0))
    block.linear("self_attn.v_proj").weight.mul_(0.5)
    passes.clear()
    block.observe(Gram)
    assert passes


def test_outputs_are_not_remembered_past_a_change(llama, tokens):
    block = blocks_of(llama, tokens)[0]
    for _ in block.sequential(Gram):
        pass
    before = block.outputs().hidden
    block.linear("mlp.down_proj").weight.mul_(0.5)
    assert not torch.equal(block.outputs().hidden, before)


def test_a_pass_that_is_left_in_the_middle_leaves_nothing_behind(llama, tokens):
    block = blocks_of(llama, tokens)[0]
    passes = block.sequential(Gram)
    next(passes)
    passes.close()
    assert not any(m._forward_pre_hooks for m in block.layer.modules())
    assert torch.equal(block.outputs().hidden, blocks_of(llama, tokens)[0].outputs().hidden)


observe = Block.observe
