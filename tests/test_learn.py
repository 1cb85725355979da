"""The training loop that learned methods share."""

import copy

import pytest
import torch

from qbench.algorithms.learn import adam, fit, squared_error, steps_of
from qbench.calib.stream import Stream
from qbench.quant.scheme import Scheme

from .conftest import random_model
from .test_let import blocks_of

NORM = "input_layernorm.weight"


@pytest.fixture
def block(tokens):
    """Of a model whose activations have few bits; what is trained is the gain of its first norm."""
    return blocks_of(random_model("llama"), tokens, Scheme.of(4, 4))[0]


def train(block, lr=1e-2, steps=12, batch_size=2, seed=0, loss=squared_error, targets=None, gain=None):
    gain = block.layer.get_parameter(NORM).clone() if gain is None else gain
    targets = targets or Stream(block.outputs().hidden)
    result = fit(
        block, "test", lambda: {NORM: gain}, adam(([gain], lr)), inputs=block.inputs, targets=targets,
        steps=steps, batch_size=batch_size, seed=seed, loss=loss,
    )  # fmt: skip
    return gain.detach(), result


def test_training_reports_a_smaller_loss_and_leaves_the_block_alone(block):
    before = copy.deepcopy(block.layer)
    gain, (first, last) = train(block)
    assert last < first
    assert block.report == {"test_loss": [first, last]}
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), block.layer.parameters(), strict=True))
    assert not any(m._forward_pre_hooks for m in block.layer.modules())
    assert not torch.equal(gain, block.layer.get_parameter(NORM))


def test_equal_seeds_give_equal_results_and_others_do_not(block):
    assert torch.equal(train(block)[0], train(block)[0])
    assert not torch.equal(train(block)[0], train(block, seed=1)[0])


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_every_sample_is_met_once_before_any_is_met_again(block, batch_size):
    seen = []

    def loss(y, target):
        if y.requires_grad:
            seen.extend(target[:, 0, 0].tolist())
        return squared_error(y, target)

    n = len(block.inputs.hidden)
    numbered = Stream(block.outputs().hidden.index_fill(2, torch.tensor([0]), 0.0))
    numbered.hidden[:, :, 0] = torch.arange(n).to(numbered.hidden)[:, None]
    train(block, lr=1e-6, steps=steps_of(2, block.inputs, batch_size), batch_size=batch_size, loss=loss,
          targets=numbered)  # fmt: skip
    assert sorted(seen[:n]) == sorted(seen[n:]) == list(range(n))


def test_the_unit_of_the_loss_does_not_matter(block):
    """Adam's epsilon is 1e-8: without units of its own, a small loss would hardly be trained on."""
    small = train(block, loss=lambda y, target: squared_error(y, target) * 2.0**-40)[0]
    torch.testing.assert_close(small, train(block)[0], rtol=1e-9, atol=0)


def test_a_loss_that_grows_is_refused_and_the_block_is_named(block):
    with pytest.raises(FloatingPointError, match=r"block 0: test diverged, its loss grew from .* lower its"):
        train(block, lr=100.0)


def test_a_loss_that_is_not_finite_is_refused_and_the_block_is_named(block):
    targets = Stream(block.outputs().hidden)
    targets.hidden[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"block 0: test met a loss of nan before its first step"):
        train(block, targets=targets)


def test_nothing_is_trained_where_there_is_nothing_to_make_up_for(tokens):
    block = blocks_of(random_model("llama"), tokens, Scheme())[0]
    gain, losses = train(block)
    assert losses == (0.0, 0.0)
    assert torch.equal(gain, block.layer.get_parameter(NORM))
