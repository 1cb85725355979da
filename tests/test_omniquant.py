"""OmniQuant as a step: what it chooses, what it leaves alone, and what it refuses."""

from dataclasses import dataclass, field

import pytest
import torch

from qbench.algorithms import omniquant
from qbench.algorithms.awq_clip import AWQClip
from qbench.algorithms.base import Pipeline
from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.let import ProductScale, initial_edits
from qbench.algorithms.omniquant import OmniQuant
from qbench.algorithms.rtn import RTN
from qbench.algorithms.smoothquant import SmoothQuant
from qbench.engine import quantize
from qbench.errors import Unsuitable
from qbench.quant.grid import fake_quantize
from qbench.quant.scheme import Scheme

from .conftest import random_model


@dataclass(frozen=True)
class Listen(RTN):
    """Rounds nothing, and hears with which weights and grids it is left."""

    needs_data = True
    heard: list = field(default_factory=list)

    def process(self, block):
        weights = {name: linear.weight.clone() for name, linear in block.linears.items()}
        self.heard.append((weights, dict(block.grids), dict(block.report)))


def after(model, tokens, scheme, *steps):
    """Weights, grids and report of the first block after the steps."""
    listener = Listen()
    quantize(model, Pipeline((*steps, listener)), scheme, tokens)
    return listener.heard[0]


class ObservingRTN(RTN):
    """RTN that asks for data, so that the engine reports its block errors."""

    needs_data = True


@pytest.mark.parametrize("scheme", ["w2a16g16", "w3a16g16", "w3a16"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_error_of_every_block_is_less_than_that_of_rounding(name, scheme, tokens):
    scheme = Scheme.parse(scheme)
    worse = quantize(random_model(name), ObservingRTN(), scheme, tokens)
    better = quantize(random_model(name), Pipeline((OmniQuant(), RTN())), scheme, tokens)
    assert all(b < w for b, w in zip(better.errors, worse.errors, strict=True))


@pytest.mark.parametrize("bmm", [False, True])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_transformations_are_learned_beyond_those_of_smoothquant(name, bmm, tokens):
    scheme = Scheme.of(4, 4, weight_symmetric=True, quant_bmm=bmm)
    worse = quantize(random_model(name), Pipeline((SmoothQuant(), RTN())), scheme, tokens)
    better = quantize(random_model(name), Pipeline((OmniQuant(), RTN())), scheme, tokens)
    assert better.errors[0] < worse.errors[0]


def test_weights_are_left_alone_where_no_activations_are_quantized(llama, tokens):
    before = {n: p.clone() for n, p in llama.model.layers[0].named_parameters()}
    weights, grids, _ = after(llama, tokens, Scheme.parse("w3a16g16"), OmniQuant(epochs=4))
    assert grids.keys() == weights.keys()
    assert all(torch.equal(w, before[f"{name}.weight"]) for name, w in weights.items())


def test_transformations_alone_choose_no_grid(llama, tokens):
    before = {n: p.clone() for n, p in llama.model.layers[0].named_parameters()}
    weights, grids, _ = after(llama, tokens, Scheme.parse("w4a4"), OmniQuant(lwc=False, epochs=2))
    assert not grids
    changed = {name for name, w in weights.items() if not torch.equal(w, before[f"{name}.weight"])}
    assert changed == weights.keys() - {"mlp.down_proj"}


@pytest.mark.parametrize("bmm", [False, True])
def test_queries_and_keys_are_transformed_where_their_product_is_quantized(bmm, llama, tokens, monkeypatch):
    made = []
    monkeypatch.setattr(
        omniquant, "initial_edits", lambda *args: made.append(initial_edits(*args)) or made[-1]
    )
    after(llama, tokens, Scheme.of(4, 4, quant_bmm=bmm), OmniQuant())
    products = [edit.log_scale for edit in made[0] if isinstance(edit, ProductScale)]
    assert [bool(log_scale.abs().min() > 0) for log_scale in products] == [True] * bmm


def test_learning_goes_on_from_the_grids_of_a_search(llama, tokens):
    scheme = Scheme.parse("w2a16g16")
    *_, plain = after(random_model("llama"), tokens, scheme, OmniQuant())
    *_, searched = after(llama, tokens, scheme, AWQClip(), OmniQuant())
    assert searched["omniquant_loss"][0] < plain["omniquant_loss"][0]


def test_gptq_rounds_to_the_learned_grids(llama, tokens):
    scheme = Scheme.parse("w3a16g16")
    weights, grids, _ = after(random_model("llama"), tokens, scheme, OmniQuant(epochs=4))
    quantize(llama, Pipeline((OmniQuant(epochs=4), GPTQ())), scheme, tokens)
    rounded = llama.model.layers[0].self_attn.q_proj.weight
    grid = grids["self_attn.q_proj"]
    torch.testing.assert_close(fake_quantize(rounded, scheme.weight, grid), rounded, rtol=1e-12, atol=1e-15)
    assert not torch.equal(rounded, fake_quantize(weights["self_attn.q_proj"], scheme.weight, grid))


def test_two_targets_are_as_good_as_their_mean():
    """aug_loss: the squared distances to both differ from twice that to the mean by a constant."""
    a, b, y, z = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def difference(x):
        both = (x - a).square().mean() + (x - b).square().mean()
        return both - 2 * (x - (a + b) / 2).square().mean()

    torch.testing.assert_close(difference(y), difference(z), rtol=1e-12, atol=1e-12)


def test_two_bits_have_two_targets(tokens):
    def losses(bits, aug_loss):
        """Of the second block: in the first both paths have one input, and both targets are one."""
        model, step = random_model("llama"), OmniQuant(epochs=4, aug_loss=aug_loss)
        result = quantize(model, Pipeline((step, RTN())), Scheme.of(bits, group_size=16), tokens)
        return result.reports[1]["omniquant_loss"]

    assert losses(2, None) == losses(2, True) != losses(2, False)
    assert losses(3, None) == losses(3, False) != losses(3, True)


def test_equal_seeds_give_equal_weights_and_others_do_not(tokens):
    def weight(seed):
        model = random_model("llama")
        quantize(model, Pipeline((OmniQuant(epochs=4, seed=seed), RTN())), Scheme.of(4, 4), tokens)
        return model.model.layers[1].mlp.up_proj.weight

    assert torch.equal(weight(0), weight(0))
    assert not torch.equal(weight(0), weight(1))


def test_divergence_names_the_block(llama, tokens):
    with pytest.raises(FloatingPointError, match=r"block 0: omniquant .* lower its learning rate"):
        quantize(llama, Pipeline((OmniQuant(lwc_lr=1e3), RTN())), Scheme.parse("w4a16g16"), tokens)


@pytest.mark.parametrize("scheme", [Scheme.of(16, 16, 4), Scheme.of(1)], ids=str)
def test_a_scheme_that_leaves_nothing_to_learn_is_refused(scheme):
    with pytest.raises(Unsuitable, match="nothing to learn"):
        OmniQuant().check(scheme)


def test_one_part_must_be_learned():
    with pytest.raises(ValueError, match="set one of them"):
        OmniQuant(lwc=False, let=False)
    OmniQuant(lwc=False).check(Scheme.of(16, 8))
    with pytest.raises(Unsuitable):
        OmniQuant(lwc=False).check(Scheme.of(4))
