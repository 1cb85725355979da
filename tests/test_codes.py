"""Codes are all that a weight on its grid is, to the bit."""

import pytest
import torch

from qbench.quant.codes import codes_of, decoded, outer_of
from qbench.quant.grid import QParams, choose_qparams, fake_quantize, outer_scale
from qbench.quant.minifloat import code_table, round_to_format
from qbench.quant.scheme import Scheme
from qbench.quant.spec import FORMAT_BITS, QuantSpec

SPECS = [
    *(QuantSpec(bits, symmetric, "group", 16) for bits in range(2, 9) for symmetric in (False, True)),
    *(QuantSpec(4, True, symmetric_mode=mode) for mode in ("restricted", "gptq")),
    QuantSpec(1, granularity="group", group_size=16),
    QuantSpec(3, granularity="tensor"),
    QuantSpec(8, True, "block", 16),
    QuantSpec(4, real_zero=True),
    QuantSpec(4, granularity="group", group_size=16, scale_bits=3),
    *(QuantSpec(bits, True, "group", 32, name) for name, bits in FORMAT_BITS.items()),
    *(
        Scheme.of(bits, weight_format=name).weight
        for name, bits in (("mxfp4", 4), ("mxfp8", 8), ("nvfp4", 4))
    ),
]


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(48, 64, generator=torch.Generator().manual_seed(3)) * 0.05).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_give_the_weight_back_to_the_bit(spec, dtype):
    w = weight(dtype)
    grid = choose_qparams(w, spec)
    rounded = fake_quantize(w, spec, grid)
    codes = codes_of(rounded, grid, spec)
    assert codes.dtype == torch.int32
    assert codes.shape == w.shape
    assert torch.equal(decoded(codes, grid, spec, dtype), rounded)
    lowest, highest = (spec.qmin, spec.qmax) if spec.format == "int" else (0, 2**spec.bits - 1)
    assert codes.min() >= lowest
    assert codes.max() <= highest


@pytest.mark.parametrize("name", FORMAT_BITS)
def test_every_number_of_a_format_has_its_own_code(name):
    table = code_table(name)
    negative_zero = [] if name == "nf4" else [2 ** (FORMAT_BITS[name] - 1)]
    known = [code for code in range(len(table)) if not table[code].isnan() and code not in negative_zero]
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    found = codes_of(
        table[known][None], QParams(one, 0 * one), QuantSpec(FORMAT_BITS[name], True, format=name)
    )
    assert found[0].tolist() == known


@pytest.mark.parametrize(
    "spec", [QuantSpec(4, granularity="group", group_size=16), QuantSpec(8, True, format="e4m3")], ids=str
)
def test_a_weight_off_the_grid_is_refused(spec):
    w = weight()
    grid = choose_qparams(w, spec)
    rounded = fake_quantize(w, spec, grid)
    rounded[3, 5] += grid.scale.max() * 0.3
    with pytest.raises(ValueError, match="1 of 3072 weights are not on the grid"):
        codes_of(rounded, grid, spec)


@pytest.mark.parametrize("share", [1.0, 0.9, 0.5, 0.03])
def test_the_second_scale_is_found_whatever_share_of_the_range_is_kept(share):
    spec, w = Scheme.of(4, weight_format="nvfp4").weight, weight()
    whole = outer_scale(w, spec)
    scale = choose_qparams(w, spec, (share, share), whole).scale
    outer = outer_of(scale)
    assert torch.equal(round_to_format(scale / outer, "e4m3") * outer, scale)
    with pytest.raises(ValueError, match="not numbers of e4m3"):
        outer_of(scale * torch.linspace(1, 2, scale.shape[0])[:, None, None])


def test_codes_far_from_zero_are_found_in_bfloat16():
    """There numbers of 128 steps and more are up to a step from where their code is, on either side."""
    spec, one = QuantSpec(8), torch.ones(1, 1, 1)
    grid = QParams(one / 191.45, 0 * one)  # 192 steps are rounded to 1, which is nearer to 191
    rounded = decoded(torch.arange(256)[None], grid, spec, torch.bfloat16)
    assert torch.equal(decoded(codes_of(rounded, grid, spec), grid, spec, torch.bfloat16), rounded)
