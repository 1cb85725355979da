"""The conventions of integer grids: symmetric modes, zero-points, one bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qbench.quant.grid import choose_qparams, fake_quantize
from qbench.quant.spec import QuantSpec

BITS = range(2, 9)
EPS = torch.finfo(torch.float32).eps


def tensors() -> st.SearchStrategy[torch.Tensor]:
    def make(seed: int, exponent: int, shift: float) -> torch.Tensor:
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
        return (x + shift) * 10.0**exponent

    return st.builds(make, st.integers(0, 2**31), st.integers(-6, 6), st.sampled_from([0.0, 3.0, -3.0]))


@pytest.mark.parametrize("bits", BITS)
def test_gptq_s_symmetric_grid_is_shifted_by_half_a_step(bits):
    """Frantar et al.'s code: scale 2 max|x| / (2^b − 1), zero-point 2^(b−1)."""
    spec = QuantSpec(bits, True, symmetric_mode="gptq")
    scale, zero = choose_qparams(torch.tensor([[-3.0, 1.0]]), spec)
    assert scale.item() == pytest.approx(6 / (2**bits - 1), rel=EPS)
    assert zero.item() == 2 ** (bits - 1)
    levels = fake_quantize(torch.linspace(-3, 3, 2000)[None], spec).unique()
    assert len(levels) == 2**bits
    assert levels[0].item() == pytest.approx(-(2 ** (bits - 1)) * scale.item(), rel=EPS)


@pytest.mark.parametrize("bits", BITS)
def test_a_restricted_grid_has_as_many_negative_as_positive_levels(bits):
    x = torch.linspace(-1, 1, 3000)[None]
    levels = fake_quantize(x * 2, QuantSpec(bits, True, symmetric_mode="restricted")).unique()
    assert torch.equal(levels, -levels.flip(0))
    assert len(levels) == 2**bits - 1
    full = choose_qparams(x, QuantSpec(bits, True))
    beyond = fake_quantize(x * 2, QuantSpec(bits, True), full)
    assert beyond.unique().numel() == 2**bits  # on a grid that is too narrow, the lowest code is used


@pytest.mark.parametrize("bits", BITS)
def test_both_ends_of_a_range_with_a_real_zero_point_are_on_the_grid(bits):
    x = torch.tensor([[5.0, 5.2, 6.5]], dtype=torch.float64)
    spec = QuantSpec(bits, real_zero=True, zero_in_range=False)
    assert fake_quantize(x, spec)[0, [0, 2]].tolist() == pytest.approx([5.0, 6.5], rel=1e-14)


def test_a_range_that_need_not_contain_zero_collapses_as_in_llmc():
    """The zero-point, −50, is clamped to 0, so that all values meet the highest code."""
    x = torch.tensor([[5.0, 5.5, 6.0, 6.5]])
    scale, zero = choose_qparams(x, QuantSpec(4, zero_in_range=False))
    assert scale.item() == pytest.approx(1.5 / 15, rel=EPS)
    assert zero.item() == 0
    assert fake_quantize(x, QuantSpec(4, zero_in_range=False)).tolist() == [
        pytest.approx([1.5] * 4, rel=1e-6)
    ]


@pytest.mark.parametrize("real_zero", [False, True])
@pytest.mark.parametrize("zero_in_range", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("value", [0.3, -7.0])
def test_a_constant_group_keeps_its_value(real_zero, zero_in_range, bits, value):
    x = torch.full((1, 16), value, dtype=torch.float64)
    spec = QuantSpec(bits, real_zero=real_zero, zero_in_range=zero_in_range)
    torch.testing.assert_close(fake_quantize(x, spec), x, rtol=1e-14, atol=0)


@pytest.mark.parametrize("granularity", ["tensor", "row", "group", "block"])
@given(tensors())
def test_one_bit_is_the_mean_plus_or_minus_the_mean_deviation(granularity, x):
    """SliM-LLM's binary groups: sign(w − μ) · mean|w − μ| + μ."""
    x = x.double()
    size = 8 if granularity in ("group", "block") else None
    spec = QuantSpec(1, granularity=granularity, group_size=size)
    parts = {
        "tensor": [x], "row": x.split(1), "group": [p for r in x.split(1) for p in r.split(8, -1)],
        "block": x.split(8, -1),
    }[granularity]  # fmt: skip
    got = fake_quantize(x, spec)
    done = {"tensor": [got], "row": got.split(1), "group": [p for r in got.split(1) for p in r.split(8, -1)],
            "block": got.split(8, -1)}[granularity]  # fmt: skip
    for part, quantized in zip(parts, done, strict=True):
        mean = part.mean()
        expected = torch.sign(part - mean) * (part - mean).abs().mean() + mean
        torch.testing.assert_close(quantized, expected, rtol=1e-12, atol=1e-12 * x.abs().max().item())
    assert torch.equal(choose_qparams(x, spec, (0.5, 0.5)).scale, choose_qparams(x, spec).scale)
