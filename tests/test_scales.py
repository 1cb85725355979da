"""Scales that are themselves on a grid (MX, NVFP4, SpQR), and scales that blocks share."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qbench.errors import Unsuitable
from qbench.quant.grid import choose_qparams, fake_quantize, grouped, outer_scale, qparams_of_range
from qbench.quant.minifloat import MINIFLOATS, code_table
from qbench.quant.spec import FORMAT_BITS, QuantSpec
from tests.reference import formats as reference

FLOATS = list(MINIFLOATS)


def spec_of(name: str, **more: object) -> QuantSpec:
    return QuantSpec(FORMAT_BITS[name], True, format=name, **more)


def finite(name: str) -> torch.Tensor:
    table = code_table(name)
    return table[table.isfinite()].unique()


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("seed", range(3))
def test_microscaling_equals_the_naive_algorithm(name, seed):
    x = draw(seed, 3, 64).double() * torch.tensor([1e-6, 1.0, 300.0])[:, None]
    x[0, :32] = 0
    x[1, 0] = 8.0  # a power of two, where log2 must not be off by one
    spec = spec_of(name, granularity="group", group_size=32, scale_format="e8m0")
    expected = [[y for s in (0, 32) for y in reference.mx(row[s : s + 32], name)] for row in x.tolist()]
    assert fake_quantize(x, spec).tolist() == expected


@given(st.integers(-100, 100), st.floats(1.0, 2.0, exclude_max=True, width=32))
def test_e8m0_scales_are_the_power_of_two_of_the_specification(exponent, mantissa):
    spec = spec_of("e2m1", scale_format="e8m0")
    scale = choose_qparams(torch.tensor([[mantissa * 2.0**exponent, 0.0]]), spec).scale
    assert scale.item() == 2.0 ** (exponent - 2)


def test_microscaled_values_above_the_largest_number_saturate():
    x = torch.tensor([[7.9, 1.0]])
    assert fake_quantize(x, spec_of("e2m1", scale_format="e8m0")).tolist() == [[6.0, 1.0]]


@pytest.mark.parametrize("outer_row", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_nvfp4_equals_the_naive_algorithm(outer_row, seed):
    x = draw(seed, 3, 64).double() * torch.tensor([1e-2, 1.0, 30.0])[:, None]
    x[0, :16] *= 1e-9  # the code of this group's scale would be zero
    spec = spec_of("e2m1", granularity="group", group_size=16, scale_format="e4m3", outer_row=outer_row)
    expected = torch.tensor(reference.nvfp4(x.tolist(), 16, outer_row), dtype=torch.float64)
    # Both divide and multiply in float64 in the same order but for one factor: 4 roundings.
    torch.testing.assert_close(fake_quantize(x, spec), expected, rtol=4 * 2.3e-16, atol=0)


def nvfp4(**more: object) -> QuantSpec:
    return spec_of("e2m1", granularity="group", group_size=16, scale_format="e4m3", **more)


def test_a_group_whose_scale_would_have_code_zero_keeps_what_the_least_code_can():
    """The outer scale is 1 here; 0.005 / 6 is nearer to zero than to the least number of e4m3, 2^-9."""
    x = torch.full((1, 32), 0.005)
    x[0, 0] = 448 * 6
    assert (fake_quantize(x, nvfp4())[0, 16:] == 3 * 2.0**-9).all()


def test_the_scales_of_nvfp4_are_e4m3_numbers_in_units_of_one():
    x = draw(0, 8, 64).double()
    codes = choose_qparams(x, nvfp4()).scale / (x.abs().max() / (448 * 6))
    assert (codes.flatten()[:, None] / finite("e4m3") - 1).abs().amin(-1).max() < 4e-16
    assert codes.max() == pytest.approx(448, rel=4e-16)


def test_a_row_s_outer_scale_does_not_depend_on_its_batch():
    x = draw(0, 4, 64) * torch.tensor([1.0, 10.0, 100.0, 1000.0])[:, None]
    spec = nvfp4(outer_row=True)
    assert torch.equal(fake_quantize(x, spec)[:1], fake_quantize(x[:1], spec))
    assert not torch.equal(fake_quantize(x, nvfp4())[:1], fake_quantize(x[:1], nvfp4()))


def test_parts_of_a_tensor_share_its_outer_scale():
    x = draw(0, 4, 64)
    whole = choose_qparams(x, nvfp4()).scale
    parts = [choose_qparams(p, nvfp4(), outer=outer_scale(x, nvfp4())).scale for p in x.split(16, -1)]
    assert torch.equal(torch.cat(parts, -2), whole)
    assert outer_scale(x, QuantSpec(4)) is None


def test_shrinking_nvfp4_ranges_leaves_the_outer_scale():
    x = draw(0, 4, 64).double()
    codes = choose_qparams(x, nvfp4(), (0.9, 0.9)).scale / (x.abs().max() / (448 * 6))
    assert (codes.flatten()[:, None] / finite("e4m3") - 1).abs().amin(-1).max() < 4e-16
    assert choose_qparams(x, nvfp4(), (1.1, 1.1)).scale.isfinite().all()


@pytest.mark.parametrize("scale_format", ["e8m0", "e4m3"])
def test_scales_in_small_formats_need_a_symmetric_grid_and_no_second_quantization(scale_format):
    for fields in ({"symmetric": False}, {"symmetric": True, "scale_bits": 8}):
        with pytest.raises(Unsuitable, match="set symmetric, and scale_bits=16"):
            QuantSpec(4, scale_format=scale_format, **fields)


@pytest.mark.parametrize("scale_format", ["e8m0", "e4m3"])
@pytest.mark.parametrize("name", ["int", "e2m1"])
def test_small_scales_pass_gradients(scale_format, name):
    spec = QuantSpec(4, True, "group", 16, name, scale_format)
    keep = torch.full((2, 2, 1), 0.9, requires_grad=True)
    choose_qparams(draw(0, 2, 32), spec, (keep, keep)).scale.sum().backward()
    assert (keep.grad > 0).all()


def test_microscaled_integers_fill_their_range():
    """MXINT8: two's complement with the largest exponent of 127, i.e. 6."""
    spec = QuantSpec(8, True, "group", 32, scale_format="e8m0")
    assert choose_qparams(torch.full((1, 32), 1.5), spec).scale.item() == 2.0**-6


def naive_requantized(scale: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    out = scale.clone()
    for column in range(scale.shape[1]):
        for start in range(0, len(scale), run):
            part = scale[start : start + run, column]
            step = (part.max() - part.min()) / (2**bits - 1)
            out[start : start + run, column] = part.min() + ((part - part.min()) / step).round() * step
    return out


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("run", [4, 5, 10])
def test_quantized_scales_equal_the_naive_algorithm(bits, run):
    spec = QuantSpec(4, granularity="group", group_size=8, real_zero=True)
    x = draw(0, 10, 32).double()
    scale = choose_qparams(x, replace(spec, scale_bits=bits, scale_group=run)).scale
    expected = naive_requantized(choose_qparams(x, spec).scale, bits, run)
    torch.testing.assert_close(scale, expected, rtol=1e-14, atol=0)


def test_quantized_zero_points_have_few_levels_too():
    spec = QuantSpec(4, granularity="group", group_size=8, real_zero=True, scale_bits=2, scale_group=16)
    scale, zero = choose_qparams(draw(0, 16, 32), spec)
    for column in range(4):
        assert len(scale[:, column].unique()) <= 4
        assert len(zero[:, column].unique()) <= 4


def test_groups_of_zeros_do_not_widen_the_range_of_quantized_scales():
    spec = QuantSpec(4, granularity="group", group_size=8, scale_bits=3, scale_group=4)
    x = draw(0, 8, 16)
    x[1], x[4:] = 0, 0
    dense = choose_qparams(x[[0, 2, 3]], spec).scale
    scale = choose_qparams(x, spec).scale
    assert torch.equal(scale[[0, 2, 3]], dense)
    assert (scale > 0).all()
    assert (fake_quantize(x, spec)[x == 0] == 0).all()


def test_the_scale_of_a_tensor_has_no_run_to_be_quantized_in():
    with pytest.raises(Unsuitable, match="set scale_bits=16"):
        choose_qparams(torch.ones(2, 8), QuantSpec(4, granularity="tensor", scale_bits=8))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(8, 4), (10, 4), (3, 4), (7, 2)])
def test_the_grid_of_a_block_is_that_of_all_its_elements(symmetric, rows, size):
    x = draw(0, rows, 16).double()
    spec = QuantSpec(4, symmetric, "block", size)
    scale, zero = choose_qparams(x, spec)
    assert scale.shape == zero.shape == (rows, 16 // size, 1)
    row = QuantSpec(4, symmetric)
    for i in range(rows):
        for j in range(16):
            lo, hi = (torch.tensor([[v]]).double() for v in reference.block_extremes(x.tolist(), size, i, j))
            expected = qparams_of_range(lo, hi, row)
            assert scale[i, j // size] == expected.scale
            assert zero[i, j // size] == expected.zero


def test_blocks_need_rows():
    with pytest.raises(ValueError, match="blocks have rows and columns"):
        grouped(torch.zeros(8), QuantSpec(4, granularity="block", group_size=4))
