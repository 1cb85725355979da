"""Outlier Suppression+ against its search done naively, and its shift."""

import pytest
import torch

from qbench.algorithms.base import Pipeline
from qbench.algorithms.osplus import Layers, OutlierSuppressionPlus
from qbench.calib.sample import TokenSample
from qbench.engine import quantize
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec

from .conftest import random_model
from .reference import osplus as reference
from .test_engine import captured
from .test_gptq import problem
from .test_laws import Keep, assert_same_function, logits

NORMED = ("model.decoder.layers.0.self_attn.q_proj", "model.decoder.layers.0.fc1")


def ends_of(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x.amin(0), x.amax(0)))


@pytest.mark.parametrize("bits", [(4, 4), (8, 8), (3, 6)])
@pytest.mark.parametrize("least", [0.1, 1.0])
def test_the_threshold_is_the_best_of_the_grid(bits, least):
    w, x = problem(bits[0])
    layers = [Layers(w, QuantSpec(bits[0], symmetric=True), QuantSpec(bits[1], symmetric=True))]
    ours = OutlierSuppressionPlus(least=least).search(layers, x, ends_of(x))
    naive = reference.best_scale(w, x, *bits, 100, least)
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=0)
    assert (ours > 1).any()


def test_large_activations_are_met_with_more_thresholds():
    w, x = problem()
    x *= 10  # the largest activation is beyond 100 steps of 0.5
    assert x.abs().max() > 60
    layers = [Layers(w, QuantSpec(4, symmetric=True), QuantSpec(4, symmetric=True))]
    ours = OutlierSuppressionPlus().search(layers, x, ends_of(x))
    torch.testing.assert_close(ours, reference.best_scale(w, x, 4, 4, 100, 0.1), rtol=1e-9, atol=0)


def test_layers_with_grids_of_their_own_are_weighed_together():
    """One candidate: the error of all is the sum of errors, and unquantized layers have none."""
    w, x = problem()
    spec, ends = QuantSpec(4, symmetric=True), ends_of(x)
    plain = Layers(w, None, None)
    step = OutlierSuppressionPlus()
    torch.testing.assert_close(plain.output(x, torch.full((48,), 2.0).double(), ends), x @ w.T)
    alone = step.search([Layers(w, spec, spec)], x, ends)
    assert torch.equal(step.search([Layers(w, spec, spec), plain], x, ends), alone)


def test_a_static_range_is_that_of_all_the_data():
    _, x = problem()
    spec = QuantSpec(4, symmetric=True, granularity="tensor", dynamic=False)
    wider = ends_of(x) * 3
    one = torch.ones(48, dtype=torch.float64)
    out = Layers(torch.eye(48).double(), None, spec).output(x, one, wider)
    step = wider.abs().max() / 7
    torch.testing.assert_close(out, (x / step).round() * step)


@pytest.mark.parametrize("path", NORMED)
def test_channels_are_centred_and_the_function_is_the_same(path, tokens):
    model = random_model("opt")
    before = logits(model, tokens)
    skewed = captured(model, tokens, path).flatten(0, -2)
    quantize(model, Pipeline((OutlierSuppressionPlus(), Keep())), Scheme.parse("w16a4"), tokens)
    for module in model.modules():
        module._forward_pre_hooks.clear()
    assert_same_function(model, tokens, before)
    x = captured(model, tokens, path).flatten(0, -2)
    low, high = ends_of(x)
    # The norm computes in float32 inside: centres are exact to its rounding.
    assert ((low + high).abs() <= 1e-5 * (high - low).amax()).all()
    assert ((ends_of(skewed).sum(0)).abs() > 0.1 * (high - low).amax()).any()


def test_without_biases_nothing_is_shifted(llama, tokens):
    before = captured(llama, tokens, "model.layers.0.self_attn.q_proj").flatten(0, -2)
    quantize(llama, Pipeline((OutlierSuppressionPlus(), Keep())), Scheme.parse("w4a4"), tokens)
    for module in llama.modules():
        module._forward_pre_hooks.clear()
    after = captured(llama, tokens, "model.layers.0.self_attn.q_proj").flatten(0, -2)
    s = before / after
    torch.testing.assert_close(s, s[:1].expand_as(s), rtol=1e-5, atol=0)
    assert (s > 1 + 1e-6).any()
    assert (s > 1 - 1e-5).all()


@pytest.mark.parametrize("batches", [[20], [1] * 20, [7, 5, 8], [3, 17]])
@pytest.mark.parametrize("every", [1, 3, 30])
def test_a_sample_of_tokens_is_the_same_in_whatever_batches_it_comes(every, batches):
    x = torch.arange(40.0).view(20, 2)
    sample = TokenSample(every)
    for part in x.split(batches):
        sample.update(part.view(1, -1, 2))
    assert torch.equal(sample.value, x[::every])


def test_activations_must_be_quantized():
    with pytest.raises(ValueError, match="abits=8"):
        OutlierSuppressionPlus().check(Scheme.parse("w4a16"))
