"""AutoRound against its Algorithm 1 written out, and what must hold of learned rounding."""

import contextlib
from dataclasses import dataclass

import pytest
import torch

from qbench.algorithms.autoround import AutoRound, Best, Rounding, SignSGD
from qbench.algorithms.awq_clip import AWQClip
from qbench.algorithms.base import Pipeline
from qbench.algorithms.rtn import nearest
from qbench.calib.block import Block
from qbench.engine import quantize
from qbench.errors import Unsuitable
from qbench.quant.grid import grouped
from qbench.quant.scheme import Scheme

from .conftest import random_model
from .reference import autoround as reference
from .test_laws import Listen

SIZE = 16


@dataclass(frozen=True)
class ListenFirst(Listen):
    """Hears what a learned rounder is given."""

    needs_data = needs_float_path = True


def first_block(llama, tokens, scheme: Scheme, *steps) -> Block:
    """The first block of a model as a learned rounder meets it."""
    listener = ListenFirst()
    quantize(llama, Pipeline((*steps, listener)), scheme, tokens)
    return listener.heard[0]


def grouped_scheme(bits: int, **more) -> Scheme:
    return Scheme.of(wbits=bits, group_size=SIZE, **more)


@pytest.mark.parametrize("bits", [2, 4])
def test_it_equals_its_algorithm_written_out(bits, tokens):
    """On OPT, whose norms compute in float64; RMSNorm's float32 would decide over gradients that are nearly zero."""
    block = first_block(random_model("opt"), tokens, grouped_scheme(bits))
    weights = {f"{name}.weight": linear.weight.detach().clone() for name, linear in block.linears.items()}
    target = block.float_outputs.hidden
    naive = reference.learn(
        lambda made: block.run(block.inputs.hidden, made), weights, target, bits, SIZE, 12
    )
    AutoRound(steps=12).process(block)
    for name, linear in block.linears.items():
        # Grid points must be the same ones, and differ by the rounding of float64 alone.
        torch.testing.assert_close(linear.weight, naive[f"{name}.weight"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"weight_symmetric": True},
        {"weight_symmetric": True, "symmetric_mode": "gptq"},
        {"real_zero": True},
    ],
)
@pytest.mark.parametrize("clip", [(), (AWQClip(),)], ids=["minmax", "clipped"])
def test_it_starts_from_round_to_nearest_on_the_chosen_grid(more, clip, llama, tokens):
    block = first_block(llama, tokens, grouped_scheme(3, **more), *clip)
    for name in block.linears:
        started = Rounding.of(block, name, block.weight_spec(name)).weight()
        torch.testing.assert_close(started, nearest(block, name)[0], rtol=1e-9, atol=1e-12)


def test_a_weight_goes_to_one_of_its_two_neighbours_where_ranges_stay(llama, tokens):
    block = first_block(llama, tokens, grouped_scheme(3))
    before = {name: linear.weight.clone() for name, linear in block.linears.items()}
    scales = {name: Rounding.of(block, name, block.weight_spec(name)) for name in block.linears}
    AutoRound(steps=20, clip=False).process(block)
    moved = 0
    for name, linear in block.linears.items():
        spec = block.weight_spec(name)
        scale = (scales[name].high - scales[name].low) / spec.qmax
        steps = grouped(linear.weight - before[name], spec).abs() / scale
        # A zero-point that is rounded moves the ends of the grid by half a step.
        assert (steps <= 1 + 1e-9).all()
        moved += int((steps > 0.5 + 1e-9).sum())
    assert moved, "some weight is not rounded to the nearest"


@pytest.mark.parametrize("bounds", [(-0.5, 0.5), (0.1, 1.0)])
def test_a_step_has_one_length_and_ends_at_the_bounds(bounds):
    x = torch.tensor([bounds[0] + 0.04, 0.3, 0.3, bounds[1] - 0.04], dtype=torch.float64)
    start = x.clone()
    optimizer = SignSGD(([x], 0.05, *bounds))
    x.grad = torch.tensor([2.0, -1e-9, 0.0, -7.0], dtype=torch.float64)
    optimizer.step()
    expected = torch.stack((torch.tensor(bounds[0]), start[1] + 0.05, start[2], torch.tensor(bounds[1])))
    torch.testing.assert_close(x.detach(), expected.to(x))


@pytest.mark.parametrize(("share", "expected"), [(None, 0.5), (0.5, 10 / 36)])
def test_the_default_learning_rate_just_reaches_the_bounds(share, expected, llama, tokens, monkeypatch):
    """Steps of one direction add up to Σ (1 − t / n) lr = lr (n + 1) / 2, or to the bound of one half."""
    step, trained, steps = SignSGD.step, [], 9

    def one_direction(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, -1.0)
        step(self)
        trained[:] = self.param_groups[0]["params"]

    monkeypatch.setattr(SignSGD, "step", one_direction)
    block = first_block(llama, tokens, grouped_scheme(4))
    with contextlib.suppress(FloatingPointError):  # nobody learns by going one way
        AutoRound(steps, share and share / steps, clip=False, keep_best=False).process(block)
    assert trained
    for offset in trained:
        torch.testing.assert_close(offset, torch.full_like(offset, expected))


def test_the_best_step_is_kept():
    x = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    best = Best([x])
    for value in (3.0, 1.0, 2.0):
        with torch.no_grad():
            x.fill_(value)
        best.loss(x, torch.zeros_like(x))
    with torch.no_grad():
        best.loss(torch.zeros(1), torch.zeros(1))  # what is measured does not count
        best.restore()
    assert float(x.detach()) == 1.0


def test_keeping_the_best_never_ends_worse_than_it_began(llama, tokens):
    """Where every step sees all samples: the first one is round to nearest."""
    block = first_block(llama, tokens, grouped_scheme(4))
    AutoRound(steps=3, lr=5.0).process(block)
    before, after = block.report["autoround_loss"]
    assert after <= before * (1 + 1e-12)


def test_the_block_s_output_is_nearer_than_round_to_nearest(llama, tokens):
    block = first_block(llama, tokens, grouped_scheme(2))
    AutoRound(steps=30).process(block)
    before, after = block.report["autoround_loss"]
    assert after < 0.5 * before


@pytest.mark.parametrize("shape", ["channels", "weights"])
def test_what_is_kept_stays_as_it_is(shape, llama, tokens):
    block = first_block(llama, tokens, grouped_scheme(2))
    name = "mlp.gate_proj"
    weight = block.linear(name).weight
    kept = torch.rand(weight.shape if shape == "weights" else weight.shape[1:]) < 0.2
    block.kept[name], before = kept, weight.clone()
    AutoRound(steps=5).process(block)
    mask = kept.expand_as(weight)
    assert torch.equal(weight[mask], before[mask])
    assert (weight != before)[~mask].any()


def test_a_loss_that_grows_is_an_error_that_names_the_block(llama, tokens):
    block = first_block(llama, tokens, grouped_scheme(4))
    with pytest.raises(FloatingPointError, match=r"block 0: autoround diverged.*learning rate"):
        AutoRound(steps=3, lr=5.0, keep_best=False).process(block)


def test_the_seed_decides_the_order_of_the_samples(llama, tokens):
    found = []
    for seed in (0, 0, 1):
        block = first_block(llama, tokens, grouped_scheme(2))
        before = {name: linear.weight.clone() for name, linear in block.linears.items()}
        AutoRound(steps=10, batch_size=2, seed=seed).process(block)
        found.append(block.linear("mlp.down_proj").weight.clone())
        with torch.no_grad():
            for name, linear in block.linears.items():
                linear.weight.copy_(before[name])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("options", [{"weight_format": "e4m3", "wbits": 8}, {"wbits": 1}])
def test_a_grid_without_even_steps_is_refused(options):
    with pytest.raises(Unsuitable, match="wbits of 2 or more"):
        AutoRound().check(Scheme.of(**options))
