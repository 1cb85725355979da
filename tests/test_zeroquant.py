"""Layer-by-layer knowledge distillation."""

import pytest
import torch

from qbench.algorithms.base import Pipeline
from qbench.algorithms.mse import MSEClip
from qbench.algorithms.rtn import RTN
from qbench.algorithms.zeroquant import LKD
from qbench.engine import quantize
from qbench.quant.grid import fake_quantize
from qbench.quant.scheme import Scheme

from .conftest import random_model
from .test_laws import ListenBehind


@pytest.mark.parametrize("text", ["w3a16g16", "w4a8g16", "w3a16"])
def test_distillation_lowers_the_loss_it_is_trained_on(text, llama, tokens):
    done = quantize(llama, LKD(steps=30, lr=1e-4), Scheme.parse(text), tokens)
    for report in done.reports:
        before, after = report["lkd_loss"]
        assert after < 0.95 * before


def test_a_block_does_not_see_the_errors_of_those_before_it(tokens):
    """Trained on the hidden states of the floating-point model: block 1 is the same, whatever block 0 became."""
    weights = []
    for overrides in ({}, {"0.*": "w2a16g16"}):
        model = random_model("llama")
        quantize(model, LKD(steps=3), Scheme.of(wbits=4, group_size=16, overrides=overrides), tokens)
        weights.append([p.clone() for p in model.model.layers[1].parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_grids_that_were_chosen_stay(llama, tokens):
    scheme = Scheme.parse("w3a16g16")
    listener = ListenBehind()
    quantize(llama, Pipeline((MSEClip(), LKD(steps=5, lr=1e-4), listener)), scheme, tokens)
    for block in listener.heard:
        for name, linear in block.linears.items():
            on_grid = fake_quantize(linear.weight, scheme.weight, block.grids[name])
            torch.testing.assert_close(on_grid, linear.weight, rtol=1e-12, atol=1e-12)


def test_without_a_step_worth_the_name_it_is_round_to_nearest(tokens):
    one, other = random_model("llama"), random_model("llama")
    quantize(one, LKD(steps=1, lr=1e-12), Scheme.parse("w4a16g16"), tokens)
    quantize(other, RTN(), Scheme.parse("w4a16g16"), tokens)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_seeds_choose_the_batches(tokens):
    weights = []
    for seed in (0, 0, 1):
        model = random_model("llama")
        quantize(model, LKD(steps=3, batch_size=2, lr=1e-4, seed=seed), Scheme.parse("w3a16g16"), tokens)
        weights.append(model.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
