"""TesseraQ against its formulas written out, and what must hold of progressive rounding."""

import pytest
import torch

from qbench.algorithms.awq_clip import AWQClip
from qbench.algorithms.rtn import nearest
from qbench.algorithms.tesseraq import Rounding, TesseraQ, rectified
from qbench.errors import Unsuitable
from qbench.quant.grid import grouped
from qbench.quant.scheme import Scheme

from .conftest import random_model
from .reference import tesseraq as reference
from .test_autoround import SIZE, first_block, grouped_scheme

KINDS = [
    {},
    {"weight_symmetric": True},
    {"weight_symmetric": True, "symmetric_mode": "gptq"},
    {"real_zero": True},
]
QUICK = TesseraQ(steps=2, lr=0.1, scale_lr=0.01)


@pytest.mark.parametrize("bits", [2, 3])
def test_it_equals_its_formulas_written_out(bits, tokens):
    """On OPT, whose norms compute in float64; RMSNorm's float32 would decide over gradients that are nearly zero."""
    block = first_block(random_model("opt"), tokens, grouped_scheme(bits))
    weights = {f"{name}.weight": linear.weight.detach().clone() for name, linear in block.linears.items()}
    algorithm = TesseraQ(
        soft=(0.8, 0.6, 0.4, 0.2, 0.1, 0.0), steps=3, batch_size=6, lr=0.1, scale_lr=0.01, decay=0.1
    )
    naive = reference.learn(
        lambda made: block.run(block.inputs.hidden, made), weights, block.float_outputs.hidden, bits, SIZE,
        algorithm.soft, algorithm.steps, algorithm.lr, algorithm.scale_lr, algorithm.decay,
    )  # fmt: skip
    algorithm.process(block)
    for name, linear in block.linears.items():
        # Grid points must be the same ones, and scales differ by the rounding of float64 alone.
        torch.testing.assert_close(linear.weight, naive[f"{name}.weight"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("more", KINDS)
@pytest.mark.parametrize("clip", [(), (AWQClip(),)], ids=["minmax", "clipped"])
def test_it_starts_from_the_weight_and_would_round_to_nearest(more, clip, llama, tokens):
    block = first_block(llama, tokens, grouped_scheme(3, **more), *clip)
    for name in block.linears:
        r = Rounding.of(block, name, block.weight_spec(name))
        torch.testing.assert_close(r.weight(r.up()), nearest(block, name)[0], rtol=1e-9, atol=1e-12)
        soft, scale, zero = r.weight(rectified(r.logit)), *r.grid
        low, high = scale * (r.spec.qmin - zero), scale * (r.spec.qmax - zero)
        within = grouped(r.original, r.spec).clamp(low, high).reshape(soft.shape)
        torch.testing.assert_close(soft, within, rtol=1e-9, atol=1e-12)


def test_the_sigmoid_is_one_half_in_the_middle_and_reaches_its_ends():
    x = torch.tensor([-torch.inf, -2.5, 0.0, 2.5, torch.inf], dtype=torch.float64)
    torch.testing.assert_close(rectified(x), torch.tensor([0, 0, 0.5, 1, 1], dtype=torch.float64))


@pytest.mark.parametrize("soft", [0.75, 0.2, 0.0])
def test_all_but_the_undecided_share_is_hardened_the_way_it_leans(soft, llama, tokens):
    block = first_block(llama, tokens, grouped_scheme(3))
    r = Rounding.of(block, "mlp.up_proj", block.weight_spec("mlp.up_proj"))
    before = r.logit.clone()
    r.harden(soft)
    decided = r.logit.isinf()
    assert (~decided).sum() == round(soft * before.numel())
    assert torch.equal(r.logit[~decided], before[~decided])
    assert torch.equal(r.logit[decided] > 0, before[decided] > 0)
    if soft:
        assert before[decided].abs().min() >= before[~decided].abs().max()


def test_what_is_decided_stays_so(llama, tokens):
    block = first_block(llama, tokens, grouped_scheme(3))
    r = Rounding.of(block, "mlp.up_proj", block.weight_spec("mlp.up_proj"))
    r.harden(0.5)
    first = r.logit.isposinf(), r.logit.isneginf()
    r.logit.masked_fill_(r.logit.isfinite(), 0.0)
    r.harden(0.1)
    assert (r.logit.isposinf() >= first[0]).all()
    assert (r.logit.isneginf() >= first[1]).all()


@pytest.mark.parametrize("more", KINDS)
@pytest.mark.parametrize("scale_lr", [0.0, 0.01])
def test_weights_are_codes_next_to_them_on_the_grid_that_it_leaves(more, scale_lr, llama, tokens):
    block = first_block(llama, tokens, grouped_scheme(3, **more), AWQClip())
    started = {name: Rounding.of(block, name, block.weight_spec(name)) for name in block.linears}
    TesseraQ(steps=2, lr=0.1, scale_lr=scale_lr).process(block)
    up = 0
    for name, r in started.items():
        scale, zero = block.grids[name]
        codes = grouped(block.linear(name).weight, r.spec) / scale + zero
        assert (codes - codes.round()).abs().max() < 1e-9 or more == {"real_zero": True}
        raised = codes - r.below.clamp(r.spec.qmin, r.spec.qmax)
        torch.testing.assert_close(raised, raised.round().clamp(0, 1), rtol=0, atol=1e-9)
        assert torch.equal(scale, r.grid.scale) == (scale_lr == 0)
        up += int((raised.round() != r.up() * (r.below >= r.spec.qmin) * (r.below < r.spec.qmax)).sum())
    assert up, "some weight is not rounded to the nearest"


def test_the_block_s_output_is_nearer_than_round_to_nearest(llama, tokens):
    block = first_block(llama, tokens, grouped_scheme(2))
    QUICK.process(block)
    before, after = block.report["tesseraq_loss"]
    assert after < 0.5 * before


@pytest.mark.parametrize("shape", ["channels", "weights"])
def test_what_is_kept_stays_as_it_is(shape, llama, tokens):
    block = first_block(llama, tokens, grouped_scheme(2))
    weight = block.linear("mlp.gate_proj").weight
    kept = torch.rand(weight.shape if shape == "weights" else weight.shape[1:]) < 0.2
    block.kept["mlp.gate_proj"], before = kept, weight.clone()
    QUICK.process(block)
    mask = kept.expand_as(weight)
    assert torch.equal(weight[mask], before[mask])
    assert (weight != before)[~mask].any()


def test_a_loss_that_grows_is_an_error_that_names_the_block(llama, tokens):
    block = first_block(llama, tokens, grouped_scheme(4))
    with pytest.raises(FloatingPointError, match=r"block 0: tesseraq diverged.*learning rate"):
        TesseraQ(soft=(0.9,), steps=3, lr=5.0, scale_lr=1.0).process(block)


@pytest.mark.parametrize("soft", [(), (0.2, 0.5), (1.5, 0.1), (0.5, -0.1)])
def test_shares_that_do_not_fall_are_an_error(soft):
    with pytest.raises(ValueError, match="must fall, between 1 and 0"):
        TesseraQ(soft=soft)


def test_scales_that_are_quantized_are_refused_unless_they_are_left_alone():
    scheme = Scheme.of(wbits=3, group_size=16, scale_bits=3)
    with pytest.raises(Unsuitable, match="scale_lr=0"):
        TesseraQ().check(scheme)
    TesseraQ(scale_lr=0.0).check(scheme)


def test_formats_are_refused():
    with pytest.raises(Unsuitable, match="weight_format=int"):
        TesseraQ().check(Scheme.of(wbits=4, weight_format="nf4"))
