"""AWQ against brute force over the inputs themselves."""

import pytest
import torch

from qbench.algorithms.awq import AWQScale, relative_magnitude
from qbench.algorithms.awq_clip import AWQClip
from qbench.algorithms.base import Pipeline
from qbench.engine import quantize
from qbench.quant.grid import choose_qparams, fake_quantize
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec

from .conftest import random_model
from .reference import awq as reference
from .test_engine import captured
from .test_gptq import SIZE, N, problem
from .test_laws import Keep, assert_same_function, logits


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [SIZE, N])
def test_the_scale_is_the_best_of_the_grid(bits, size):
    w, x = problem(bits)
    spec = QuantSpec(bits, granularity="group", group_size=size)
    ours = AWQScale().search([(w, spec)], x.T @ x / len(x), x.abs().mean(0))
    torch.testing.assert_close(ours, reference.best_scale(w, x, bits, size, 20), rtol=1e-12, atol=0)


@pytest.mark.parametrize("ends", ["together", "apart", "magnitude"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [SIZE, N])
def test_the_clip_is_the_best_of_the_grid(bits, size, ends):
    w, x = problem(bits)
    spec = QuantSpec(bits, granularity="group", group_size=size)
    ours = fake_quantize(w, spec, AWQClip(ends=ends).clip(w, x.T @ x / len(x), spec))
    naive = reference.best_clip(w, x, bits, size, 20, 0.5, ends)
    torch.testing.assert_close(ours, naive, rtol=1e-12, atol=0)


def test_clipping_is_as_symmetric_as_the_grid():
    w, x = problem()
    w += 1.0  # reaches further above zero than below
    symmetric = AWQClip().clip(w, x.T @ x, QuantSpec(2, symmetric=True))
    asymmetric = AWQClip().clip(w, x.T @ x, QuantSpec(2))
    whole = choose_qparams(w, QuantSpec(2))
    assert (symmetric.zero == 0).all()
    assert (symmetric.scale < w.abs().amax(1)[:, None, None]).any()
    assert torch.equal(asymmetric.zero, whole.zero), "both ends of an asymmetric range shrink by one factor"


def test_a_symmetric_grid_is_clipped_alike_by_magnitude_and_together():
    w, x = problem()
    spec = QuantSpec(3, symmetric=True, granularity="group", group_size=SIZE)
    one, other = (AWQClip(ends=ends).clip(w, x.T @ x, spec) for ends in ("together", "magnitude"))
    torch.testing.assert_close(one.scale, other.scale, rtol=1e-12, atol=0)


def test_two_ends_of_a_symmetric_grid_are_refused():
    with pytest.raises(ValueError, match="ends=together"):
        AWQClip(ends="apart").check(Scheme.of(wbits=4, weight_symmetric=True))


def test_what_is_kept_has_no_part_in_clipping():
    w, x = problem()
    spec = QuantSpec(3)
    outlier = w.clone()
    outlier[:, 4] = 0
    narrow = AWQClip().clip(outlier, x.T @ x, spec)
    w[:, 4] = 100.0
    assert (narrow.scale < 0.2 * AWQClip().clip(w, x.T @ x, spec).scale).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_duo_scaling_divides_by_the_relative_magnitude_of_the_weights(bits):
    w, x = problem(bits)
    w[:, ::5] *= 4
    spec = QuantSpec(bits, granularity="group", group_size=SIZE)
    relative = relative_magnitude([(w, spec)])
    ours = AWQScale(duo=True).search([(w, spec)], x.T @ x / len(x), x.abs().mean(0), relative)
    naive = reference.best_scale(w, x, bits, SIZE, 20, duo=True)
    torch.testing.assert_close(ours, naive, rtol=1e-12, atol=0)
    assert not torch.allclose(ours, reference.best_scale(w, x, bits, SIZE, 20), rtol=0.1)


def test_heads_that_read_one_value_head_share_its_scales(tokens):
    model = random_model("llama-gqa-tied")  # four heads of 12 channels, two value heads
    before, values = logits(model, tokens), model.model.layers[0].self_attn.v_proj
    out = model.model.layers[0].self_attn.o_proj
    w, v = out.weight.clone(), values.weight.clone()
    x = captured(model, tokens, "model.layers.0.self_attn.o_proj").flatten(0, -2)
    quantize(model, Pipeline((AWQScale(gqa=True), Keep())), Scheme.parse("w3a16g16"), tokens)
    assert_same_function(model, tokens, before)
    taken = (out.weight / w).mean(0)
    tied = x.abs().mean(0).view(2, 2, 12).mean(1, keepdim=True).expand(2, 2, 12).flatten()
    torch.testing.assert_close(
        taken, reference.best_scale(w, x, 3, 16, 20, magnitude=tied), rtol=1e-9, atol=0
    )
    assert (taken.view(2, 2, 12)[:, 0] == taken.view(2, 2, 12)[:, 1]).all()
    assert not torch.equal(values.weight, v)


def test_without_gqa_shared_value_heads_are_left_alone(tokens):
    model = random_model("llama-gqa-tied")
    out = model.model.layers[0].self_attn.o_proj.weight
    before = out.clone()
    quantize(model, Pipeline((AWQScale(), Keep())), Scheme.parse("w3a16g16"), tokens)
    assert torch.equal(out, before)
