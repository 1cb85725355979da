"""Fake quantization of what enters linear layers."""

import copy

import pytest
import torch
from torch import nn

from qbench.models.hooks import quantize_input, quantized_inputs
from qbench.quant.grid import choose_qparams, fake_quantize
from qbench.quant.spec import QuantSpec

SPECS = {
    "token": QuantSpec(4, symmetric=True),
    "asymmetric": QuantSpec(4),
    "groups": QuantSpec(4, symmetric=True, granularity="group", group_size=8),
    "e2m1": QuantSpec(4, symmetric=True, format="e2m1"),
}


@pytest.fixture
def linear() -> nn.Linear:
    """The identity, so that what enters is what leaves."""
    layer = nn.Linear(16, 16, bias=False).double().requires_grad_(False)
    layer.weight.copy_(torch.eye(16))
    return layer


@pytest.fixture
def x() -> torch.Tensor:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[..., 3] *= 100
    return x


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_what_enters_is_on_the_grid_until_the_hook_is_removed(spec, linear, x):
    handle = quantize_input(linear, spec)
    torch.testing.assert_close(linear(x), fake_quantize(x, spec), rtol=0, atol=0)
    handle.remove()
    assert torch.equal(linear(x), x)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_kept_channels_pass_unchanged_and_have_no_part_in_the_range(spec, linear, x):
    kept = torch.zeros(16, dtype=torch.bool)
    kept[3] = True
    quantize_input(linear, spec, kept=kept)
    found = linear(x)
    assert torch.equal(found[..., 3], x[..., 3])
    if spec.granularity == "row":
        torch.testing.assert_close(found[..., ~kept], fake_quantize(x[..., ~kept], spec), rtol=0, atol=0)
    larger = x.clone()
    larger[..., 3] *= 50
    assert torch.equal(linear(larger)[..., ~kept], found[..., ~kept])


def test_kept_channels_leave_out_of_a_static_grid_what_is_not_on_it(linear, x):
    spec = QuantSpec(4, symmetric=True, granularity="tensor", dynamic=False)
    kept = torch.zeros(16, dtype=torch.bool)
    kept[3] = True
    grid = choose_qparams(x[..., ~kept], spec)
    quantize_input(linear, spec, grid, kept)
    expected = torch.where(kept, x, fake_quantize(x, spec, grid))
    assert torch.equal(linear(x), expected)


def test_inputs_are_quantized_while_the_context_lasts(linear, x):
    """Also where it ends in an error; hooks that were there before stay, and run before."""
    other, spec = copy.deepcopy(linear), SPECS["token"]
    linear.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    kept = torch.ones(16, dtype=torch.bool)

    def fail() -> None:
        with quantized_inputs({linear: (spec, None), other: (spec, kept)}):
            assert torch.equal(linear(x), fake_quantize(2 * x, spec))
            assert torch.equal(other(x), x)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(linear(x), 2 * x)
    assert not other._forward_pre_hooks


def test_a_mask_that_does_not_fit_is_refused(linear):
    with pytest.raises(
        ValueError, match=r"torch.bool of shape \(4,\); it must be a boolean mask of the layer's 16"
    ):
        quantize_input(linear, SPECS["token"], kept=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"torch.float32 of shape \(16,\)"):
        quantize_input(linear, SPECS["token"], kept=torch.zeros(16))
    with pytest.raises(ValueError, match="zero_in_range unset"):
        quantize_input(linear, QuantSpec(4, zero_in_range=False), kept=torch.zeros(16, dtype=torch.bool))
