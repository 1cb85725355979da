"""Planted outliers: the same function, harder activations."""

import dataclasses
import json

import pytest
import torch

from qbench.algorithms.base import Pipeline
from qbench.algorithms.rtn import RTN
from qbench.algorithms.smoothquant import SmoothQuant
from qbench.engine import quantize
from qbench.models.family import family_of
from qbench.models.load import ModelRef
from qbench.models.outliers import norm_links, outlier_channels, plant_outliers
from qbench.quant.scheme import Scheme

from .conftest import CONFIGS, random_model
from .test_configs import fingerprint

PRE_NORM = sorted(set(CONFIGS) - {"opt-post-norm"})
EPS = torch.finfo(torch.float64).eps


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def peaks(model, tokens, names):
    """The largest magnitude of each channel that enters the named layers, block by block."""
    seen = []
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, args: seen.append(args[0].abs().flatten(0, -2).amax(0))
        )
        for block in model.get_submodule(family_of(model).blocks)
        for name in names
    ]
    logits(model, tokens)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PRE_NORM)
def test_a_power_of_two_leaves_the_function_exactly_as_it_was(name, dtype, tokens):
    """Only exponents move, so every product and every sum is the one it was."""
    model = random_model(name).to(dtype)
    before = logits(model, tokens)
    plant_outliers(model, 64.0)
    assert torch.equal(logits(model, tokens), before)


@pytest.mark.parametrize("name", PRE_NORM)
def test_any_factor_leaves_a_norm_and_its_sinks_the_same_function(name):
    """To two roundings of each weight and one of each product, 48 of them: far below 1e-12."""
    model = random_model(name)
    block = model.get_submodule(family_of(model).blocks)[1]
    x = torch.randn(20, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def outputs():
        with torch.no_grad():
            return [
                block.get_submodule(sink)(block.get_submodule(link.source)(x))
                for link in norm_links(model)
                for sink in link.sinks
            ]

    before = outputs()
    plant_outliers(model, 50.0)
    for old, new in zip(before, outputs(), strict=True):
        assert 48 * 4 * EPS < 1e-12
        torch.testing.assert_close(new, old, rtol=0, atol=1e-12 * old.abs().max().item())


@pytest.mark.parametrize("name", PRE_NORM)
def test_inputs_grow_by_the_factor_in_the_same_channels_of_every_block_and_nowhere_else(name, tokens):
    model = random_model(name)
    links, family = norm_links(model), family_of(model)
    sinks = [sink for link in links for sink in link.sinks]
    assert set(family.query_key) < set(sinks)
    others = [
        linear for linear in family.linears(model.get_submodule(family.blocks)[0]) if linear not in sinks
    ]
    before, elsewhere = peaks(model, tokens, sinks), peaks(model, tokens, others)
    plant_outliers(model, 64.0)
    expected = torch.ones(48, dtype=torch.float64)
    expected[outlier_channels(48)] = 64.0
    for old, new in zip(before, peaks(model, tokens, sinks), strict=True):
        assert torch.equal(new, old * expected)
    for old, new in zip(elsewhere, peaks(model, tokens, others), strict=True):
        assert torch.equal(new, old)


@pytest.mark.parametrize(("hidden_size", "count"), [(48, 2), (128, 2), (256, 4), (4096, 64)])
def test_one_channel_in_sixty_four_is_an_outlier_and_at_least_two(hidden_size, count):
    channels = outlier_channels(hidden_size)
    assert len(set(channels.tolist())) == count
    assert 0 <= channels.min() <= channels.max() < hidden_size
    assert torch.equal(channels, outlier_channels(hidden_size))


def test_the_channels_never_change():
    """Records are found again by a fingerprint that holds the factor and not the channels."""
    assert outlier_channels(256).tolist() == [55, 105, 172, 225]


def test_a_model_without_a_norm_that_feeds_linear_layers_alone_is_refused(tmp_path):
    with pytest.raises(NotImplementedError, match=r"post-norm blocks\); set model.outliers=null"):
        plant_outliers(random_model("opt-post-norm"), 64.0)
    random_model("opt-post-norm").save_pretrained(tmp_path)
    assert ModelRef(str(tmp_path)).skeleton() is not None
    with pytest.raises(NotImplementedError, match="post-norm blocks"):  # before its weights are loaded
        ModelRef(str(tmp_path), outliers=64.0).skeleton()


@pytest.mark.parametrize("factor", [1.0, 0.5, -64.0, 0.0, float("nan"), float("inf")])
def test_a_factor_that_makes_no_outlier_is_refused(factor):
    with pytest.raises(ValueError, match=r"model.outliers is .*, it must be a factor above 1"):
        ModelRef("zoo/nano-llama", outliers=factor)


def test_outliers_are_part_of_the_identity_only_where_there_are_some():
    plain = ModelRef("zoo/nano-llama")
    planted = dataclasses.replace(plain, outliers=64.0)
    assert plain.identity().keys() == {"id", "revision", "dtype", "attn", "content"}
    assert planted.identity() == plain.identity() | {"outliers": 64.0}
    assert json.dumps(planted.identity()) == json.dumps(dataclasses.replace(plain, outliers=64).identity())
    assert dataclasses.replace(plain, outliers=32.0).identity() != planted.identity()
    assert (plain.name, planted.name) == ("nano-llama", "nano-llama+outliers64")


def test_outliers_make_another_job_and_none_the_same():
    plain, planted = fingerprint("model=micro-llama"), fingerprint("model=micro-llama-outliers")
    assert planted == fingerprint("model.outliers=64") != plain
    assert fingerprint("model.outliers=16") not in (plain, planted)
    assert fingerprint("model.outliers=null") == plain


def test_a_loaded_model_has_the_outliers_that_were_asked_for():
    plain, planted = (ModelRef("zoo/nano-llama", outliers=factor).load() for factor in (None, 64.0))
    gains = [model.model.layers[3].input_layernorm.weight for model in (plain, planted)]
    expected = torch.ones(128)
    expected[outlier_channels(128)] = 64.0
    assert torch.equal(gains[1] / gains[0], expected)
    assert not any(p.requires_grad for p in planted.parameters())


class ObservingRTN(RTN):
    """RTN that asks for data, so that the engine reports its block errors."""

    needs_data = True


def error(algorithm, outliers, scheme):
    """The first block's relative output error on nano-llama."""
    tokens = torch.randint(0, 3072, (4, 64), generator=torch.Generator().manual_seed(3))
    model = ModelRef("zoo/nano-llama", outliers=outliers).load()
    return quantize(model, algorithm, Scheme.parse(scheme), tokens).errors[0]


def test_outliers_hurt_rounding_of_activations():
    """Eight-bit codes of which outliers take six bits leave two for the rest."""
    plain, planted = (error(ObservingRTN(), factor, "w8a8") for factor in (None, 64.0))
    assert planted > 10 * plain


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_smoothquant_takes_planted_outliers_away(alpha):
    """Its scale grows by `f^α / f^-(1-α) = f`, so the same numbers are quantized, up to a float32 rounding."""
    smooth = Pipeline((SmoothQuant(alpha), RTN()))
    plain, planted = (error(smooth, factor, "w8a8") for factor in (None, 64.0))
    assert planted == pytest.approx(plain, rel=0.05)
    assert planted < 0.1 * error(ObservingRTN(), 64.0, "w8a8")
