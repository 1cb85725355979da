"""The mathematics of grids."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qbench.quant.affine import choose_qparams, fake_quantize, grouped, round_to_grid
from qbench.quant.scheme import QuantSpec, Scheme

BITS = range(2, 9)
EPS = torch.finfo(torch.float32).eps


def specs() -> st.SearchStrategy[QuantSpec]:
    return st.builds(
        lambda bits, symmetric, size: QuantSpec(bits, symmetric, "group" if size else "row", size),
        st.integers(2, 8), st.booleans(), st.sampled_from([None, 4, 8, 16]),
    )  # fmt: skip


def tensors() -> st.SearchStrategy[torch.Tensor]:
    def make(seed: int, exponent: int, shift: float) -> torch.Tensor:
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
        return (x + shift) * 10.0**exponent

    return st.builds(make, st.integers(0, 2**31), st.integers(-6, 6), st.sampled_from([0.0, 3.0, -3.0]))


@given(specs(), tensors())
def test_rounding_error_is_at_most_half_a_step(spec, x):
    """And half a step more at the ends of an asymmetric range, whose zero-point is itself rounded."""
    scale = choose_qparams(x, spec).scale
    error = (grouped(fake_quantize(x, spec), spec) - grouped(x, spec)).abs()
    assert (error <= scale * (0.5 if spec.symmetric else 1.0) * (1 + 1e-4)).all()


@given(specs(), tensors())
def test_quantizing_twice_changes_nothing(spec, x):
    qparams = choose_qparams(x, spec)
    once = fake_quantize(x, spec, qparams)
    torch.testing.assert_close(fake_quantize(once, spec, qparams), once, rtol=4 * EPS, atol=0)


@given(specs(), tensors())
def test_zero_is_on_every_grid(spec, x):
    x[0, :3] = 0.0
    assert (fake_quantize(x, spec)[0, :3] == 0).all()


@given(specs(), tensors())
def test_a_grid_has_at_most_two_to_the_bits_levels(spec, x):
    groups = grouped(fake_quantize(x, spec), spec).flatten(0, -2)
    assert max(len(torch.unique(g)) for g in groups) <= 2**spec.bits


@pytest.mark.parametrize("bits", BITS)
def test_both_ends_of_a_symmetric_range_are_on_the_grid(bits):
    x = torch.tensor([[-2.0, -0.3, 0.1, 2.0]])
    quantized = fake_quantize(x, QuantSpec(bits, symmetric=True))
    assert quantized[0, 0] == -2.0
    assert quantized[0, 3] == 2.0


def test_values_far_from_zero_keep_their_differences():
    """A range that does not contain zero would clamp the zero-point, and collapse these to one value."""
    x = torch.tensor([[5.0, 5.5, 6.0, 6.5]])
    assert (fake_quantize(x, QuantSpec(4)) - x).abs().max() <= 6.5 / 15 / 2 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(dtype):
    x = torch.randn(4, 16).to(dtype)
    assert fake_quantize(x, QuantSpec(4)).dtype == dtype


def test_a_group_of_zeros_stays_zero():
    x = torch.zeros(2, 8)
    for symmetric in (True, False):
        assert (fake_quantize(x, QuantSpec(4, symmetric)) == 0).all()


def test_rounding_passes_gradients_straight_through():
    x = torch.tensor([[0.2, 0.7, 1.4, 3.0]], requires_grad=True)
    round_to_grid(x, torch.tensor(1.0), torch.tensor(0.0), QuantSpec(4)).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_groups_must_divide_the_axis():
    with pytest.raises(ValueError, match="not a multiple of group_size"):
        grouped(torch.zeros(2, 10), QuantSpec(4, granularity="group", group_size=4))


@pytest.mark.parametrize(
    "text", ["w4a16", "w4a16g128", "w8a8", "w3a16g64", "w16a16", "w16a16kv4", "w4a8kv4g32"]
)
def test_a_scheme_prints_as_it_was_read(text):
    assert str(Scheme.parse(text)) == text


def test_schemes_that_differ_print_differently():
    base = {"wbits": 4, "abits": 8, "group_size": 64}
    options = [
        {},
        {"weight_symmetric": True},
        {"act_symmetric": False},
        {"act_granularity": "tensor"},
        {"kvbits": 4},
    ]
    assert len({str(Scheme.of(**base | option)) for option in options}) == len(options)


@pytest.mark.parametrize("text", ["w4", "4a16", "w4a16g", "w4a16g128x"])
def test_an_unreadable_scheme_is_refused(text):
    with pytest.raises(ValueError, match="cannot read scheme"):
        Scheme.parse(text)


@pytest.mark.parametrize("bits", [0, 1, 9, 15])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match=f"{bits} were asked for"):
        Scheme.of(wbits=bits)


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (QuantSpec(4, granularity="group", group_size=128), 4 + (16 + 4) / 128),
        (QuantSpec(4, symmetric=True, granularity="group", group_size=128), 4 + 16 / 128),
        (QuantSpec(8, symmetric=True), 8 + 16 / 256),
    ],
)
def test_scales_and_zero_points_are_paid_for(spec, bits):
    assert spec.bits_per_element(64, 256) == pytest.approx(bits, rel=1e-12)
