"""Norm tweaking moves norms, by as much as its learning rates say, and nothing else."""

import pytest
import torch

from qbench.algorithms.base import Pipeline
from qbench.algorithms.normtweaking import NormTweaking, distribution_distance
from qbench.algorithms.rtn import RTN
from qbench.engine import quantize
from qbench.quant.scheme import Scheme

from .conftest import random_model

SCHEME = Scheme.parse("w3a16g16")


def parameters_after(name, tokens, *steps):
    model = random_model(name)
    result = quantize(model, Pipeline((RTN(), *steps)), SCHEME, tokens)
    return dict(model.named_parameters()), result.reports


@pytest.mark.parametrize("name", ["llama", "opt", "qwen3"])
def test_nothing_but_norms_of_blocks_is_changed(name, tokens):
    rounded, _ = parameters_after(name, tokens)
    tweaked, _ = parameters_after(name, tokens, NormTweaking())
    changed = {n for n, p in rounded.items() if not torch.equal(p, tweaked[n])}
    norms = {n for n in rounded if "norm" in n and "layers." in n}
    assert changed == norms
    assert any(n.endswith("bias") for n in norms) == (name == "opt")


def test_deeper_blocks_have_larger_learning_rates(tokens):
    """The first step of Adam is as long as its learning rate, up to epsilon over the gradient."""
    before = dict(random_model("llama").named_parameters())
    after, _ = parameters_after("llama", tokens, NormTweaking(lr=1e-4, scale=3.0, batch_size=len(tokens)))
    for block, expected in enumerate([1e-4, 1e-4 * (1 + 3.0 * 1 / 2)]):
        name = f"model.layers.{block}.post_attention_layernorm.weight"
        moved = (after[name] - before[name]).abs()
        assert moved.median() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("loss", ["distribution", "mse"])
def test_the_loss_falls_in_every_block(loss, tokens):
    _, reports = parameters_after("llama", tokens, NormTweaking(loss=loss))
    assert all(report["normtweaking_loss"][1] < report["normtweaking_loss"][0] for report in reports)


def test_the_distance_is_that_of_each_channels_mean_and_variance():
    y, target = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = 0.0
    for channel in range(7):
        a, b = y[..., channel].flatten().tolist(), target[..., channel].flatten().tolist()
        mean_a, mean_b = sum(a) / 15, sum(b) / 15
        var_a, var_b = (sum((v - m) ** 2 for v in x) / 14 for x, m in ((a, mean_a), (b, mean_b)))
        total += abs(mean_a - mean_b) + abs(var_a - var_b)
    assert float(distribution_distance(y, target)) == pytest.approx(total / 7, rel=1e-12)


def test_equal_seeds_give_equal_norms_and_others_do_not(tokens):
    name = "model.layers.1.input_layernorm.weight"
    one, same, other = (parameters_after("llama", tokens, NormTweaking(seed=s))[0][name] for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_divergence_names_the_block(tokens):
    with pytest.raises(FloatingPointError, match=r"block 0: normtweaking .* lower its learning rate"):
        parameters_after("llama", tokens, NormTweaking(lr=1e3))


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="choose 'distribution' or 'mse'"):
        NormTweaking(loss="kl")
