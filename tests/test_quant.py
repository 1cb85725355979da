"""The mathematics of grids."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qbench.quant.grid import (
    QParams,
    choose_qparams,
    extremes,
    fake_quantize,
    grouped,
    qparams_of_range,
    round_to_grid,
)
from qbench.quant.scheme import Scheme
from qbench.quant.spec import FORMAT_BITS, QuantSpec

BITS = range(2, 9)
EPS = torch.finfo(torch.float32).eps


def specs() -> st.SearchStrategy[QuantSpec]:
    """Every integer grid of two bits and more whose range contains zero."""

    def make(
        bits: int, symmetric: bool, mode: str, real_zero: bool, granularity: str, size: int, second: int
    ) -> QuantSpec:
        return QuantSpec(
            bits, symmetric, granularity, size if granularity in ("group", "block") else None,
            symmetric_mode=mode if symmetric else "full", real_zero=real_zero and not symmetric,
            scale_bits=second if granularity != "tensor" else 16, scale_group=2,
        )  # fmt: skip

    return st.builds(
        make, st.integers(2, 8), st.booleans(), st.sampled_from(["full", "restricted", "gptq"]), st.booleans(),
        st.sampled_from(["tensor", "row", "group", "block"]), st.sampled_from([4, 8, 16]),
        st.sampled_from([16, 16, 8, 3]),
    )  # fmt: skip


def formats() -> st.SearchStrategy[QuantSpec]:
    """Every grid of a small format."""

    def make(name: str, scale_format: str, granularity: str, outer_row: bool) -> QuantSpec:
        size = 8 if granularity in ("group", "block") else None
        return QuantSpec(FORMAT_BITS[name], True, granularity, size, name, scale_format, outer_row)

    return st.builds(
        make, st.sampled_from(list(FORMAT_BITS)), st.sampled_from(["float16", "e8m0", "e4m3"]),
        st.sampled_from(["tensor", "row", "group", "block"]), st.booleans(),
    )  # fmt: skip


def tensors() -> st.SearchStrategy[torch.Tensor]:
    def make(seed: int, exponent: int, shift: float) -> torch.Tensor:
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
        return (x + shift) * 10.0**exponent

    return st.builds(make, st.integers(0, 2**31), st.integers(-6, 6), st.sampled_from([0.0, 3.0, -3.0]))


@given(specs(), tensors())
def test_rounding_error_is_at_most_half_a_step(spec, x):
    """And half a step more at the ends of an asymmetric range, whose zero-point is itself rounded."""
    spec = replace(spec, scale_bits=16)
    scale = choose_qparams(x, spec).scale
    error = (grouped(fake_quantize(x, spec), spec) - grouped(x, spec)).abs()
    assert (error <= scale * (0.5 if spec.symmetric or spec.real_zero else 1.0) * (1 + 1e-4)).all()


@given(specs() | formats() | st.just(QuantSpec(1)), tensors())
def test_quantizing_twice_changes_nothing(spec, x):
    qparams = choose_qparams(x, spec)
    once = fake_quantize(x, spec, qparams)
    # With a real zero-point a level is a difference, whose rounding error is relative to the range.
    slack = 0 if spec.symmetric or not (spec.real_zero or spec.bits == 1) else 4 * EPS * 2**spec.bits
    torch.testing.assert_close(
        fake_quantize(once, spec, qparams), once, rtol=4 * EPS, atol=slack * qparams.scale.max().item()
    )


@given(specs() | formats(), tensors())
def test_zero_is_on_every_grid_but_those_with_real_zero_points(spec, x):
    x[0, :3] = 0.0
    zeros = fake_quantize(x, spec)[0, :3]
    assert spec.real_zero or (zeros == 0).all()


@given(specs() | formats() | st.just(QuantSpec(1)), tensors())
def test_a_grid_has_at_most_two_to_the_bits_levels(spec, x):
    groups = grouped(fake_quantize(x, spec), spec).flatten(0, -2)
    assert max(len(torch.unique(g)) for g in groups) <= 2**spec.bits


@given(specs() | formats() | st.just(QuantSpec(1)), tensors(), st.integers(-10, 10))
def test_a_grid_scales_with_its_tensor(spec, x, exponent):
    """Powers of two are exact in floating point, so nothing may change but the exponent."""
    factor = 2.0**exponent
    assert torch.equal(fake_quantize(x * factor, spec), fake_quantize(x, spec) * factor)


@given(specs() | formats() | st.just(QuantSpec(1)), st.sampled_from([torch.inf, -torch.inf, torch.nan]))
def test_what_is_not_finite_is_not_hidden(spec, value):
    x = torch.linspace(-1, 1, 64).view(4, 16)
    x[1, 3] = value
    g = grouped(x, spec)
    spoilt = ~g.isfinite().all(-1)
    assert grouped(fake_quantize(x, spec), spec)[spoilt].isnan().all()


@given(specs() | formats() | st.just(QuantSpec(1)), st.sampled_from([0.0, 1e-40, -1e-44]))
def test_groups_of_zeros_and_of_subnormal_numbers_become_zero_or_stay(spec, value):
    x = torch.full((4, 16), value)
    quantized = fake_quantize(x, spec)
    assert ((quantized - x).abs() <= abs(value)).all()
    assert (choose_qparams(x, spec).scale > 0).all()


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


@given(specs() | formats(), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_the_dtype_and_the_shape_are_kept(spec, dtype):
    x = torch.linspace(-1, 2, 96).view(2, 3, 16).to(dtype)
    quantized = fake_quantize(x, spec)
    assert quantized.dtype == dtype
    assert quantized.shape == x.shape
    assert choose_qparams(x, spec).scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@given(specs() | formats())
def test_rounding_passes_gradients_straight_through(spec):
    x = torch.tensor([[0.2, 0.7, 0.9, 0.4]], requires_grad=True)
    y = round_to_grid(x, torch.tensor(1.0), torch.tensor(0.0), spec)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(
    "spec", [QuantSpec(4), QuantSpec(4, True), QuantSpec(4, True, format="e2m1")], ids=str
)
def test_what_saturates_has_no_gradient_but_moves_the_scale(spec):
    x = torch.tensor([[100.0, -100.0, 1.2]], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    y = round_to_grid(x, scale, torch.tensor(0.0), spec)
    y.sum().backward()
    assert x.grad.tolist() == [[0, 0, 1]]
    # d/ds of s · q(x / s): the code itself where it saturates, the code less x / s where it does not.
    top, bottom = y[0, 0].item(), y[0, 1].item()
    assert scale.grad.item() == pytest.approx(top + bottom + y[0, 2].item() - 1.2, abs=1e-6)


@pytest.mark.parametrize("real_zero", [False, True])
def test_zero_points_learn_from_what_saturates(real_zero):
    zero = torch.tensor(3.0, requires_grad=True)
    spec = QuantSpec(4, real_zero=real_zero)
    round_to_grid(torch.tensor([[1.0, 100.0]]), torch.tensor(2.0), zero, spec).sum().backward()
    assert (
        zero.grad.item() == -2.0
    )  # inside the range, moving both the code and the zero-point changes nothing


@given(specs() | formats(), tensors())
def test_kept_fractions_have_gradients(spec, x):
    keep = [torch.full_like(choose_qparams(x, spec).scale, 0.9, requires_grad=True) for _ in range(2)]
    scale, zero = choose_qparams(x, spec, (keep[0], keep[1]))
    fake_quantize(x, spec, QParams(scale, zero)).square().sum().backward()
    assert all(k.grad is not None and k.grad.isfinite().all() for k in keep)
    assert any((k.grad != 0).any() for k in keep)


def test_learned_fractions_have_the_gradients_of_the_formula():
    """One group, symmetric: s = k max|x| / 7, so dx̂/dk = (max|x| / 7) · (q − x / s) inside the range."""
    x, keep = torch.tensor([[7.0, 2.3]], dtype=torch.float64), torch.tensor(1.0).double().requires_grad_()
    spec = QuantSpec(4, True)
    fake_quantize(x, spec, choose_qparams(x, spec, (keep, keep))).sum().backward()
    assert keep.grad.item() == pytest.approx((7 - 7) + (2 - 2.3), abs=1e-12)


@given(specs() | formats(), tensors())
def test_a_grid_of_a_range_is_that_of_the_tensor_with_this_range(spec, x):
    ours = qparams_of_range(*extremes(grouped(x, spec), spec), spec)
    for a, b in zip(ours, choose_qparams(x, spec), strict=True):
        assert torch.equal(a, b)


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


@pytest.mark.parametrize("bits", [0, 9, 15])
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
