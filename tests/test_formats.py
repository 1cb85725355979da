"""Small floating-point formats and nf4: their tables and how numbers round to them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qbench.quant.grid import choose_qparams, fake_quantize
from qbench.quant.minifloat import MINIFLOATS, code_table, largest, round_to_format
from qbench.quant.spec import FORMAT_BITS, QuantSpec
from tests.reference import formats as reference

FLOATS = list(MINIFLOATS)
FORMATS = list(FORMAT_BITS)
DTYPES = [torch.float32, torch.float64]


def spec_of(name: str) -> QuantSpec:
    return QuantSpec(FORMAT_BITS[name], True, format=name)


def finite(name: str) -> torch.Tensor:
    table = code_table(name)
    return table[table.isfinite()].unique()


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FLOATS)
def test_a_table_holds_what_the_bits_of_each_code_say(name):
    for code, number in enumerate(code_table(name).tolist()):
        expected = reference.decode(code, name)
        assert number == expected or (math.isnan(number) and math.isinf(expected))


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_tables_agree_with_torch_on_finite_codes(name):
    theirs = torch.arange(256, dtype=torch.uint8).view(MINIFLOATS[name].cast).double()
    ours = code_table(name)
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert torch.equal(ours[ours.isfinite()], theirs[ours.isfinite()])


def test_the_quantiles_of_nf4_are_the_published_numbers():
    assert torch.equal(code_table("nf4").float(), torch.tensor(reference.NF4))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_a_format_and_their_neighbourhoods_round_as_in_the_reference(name, dtype):
    """At all numbers, halfway between them (ties), a hair to either side of that, and beyond the ends."""
    numbers = finite(name)
    halfway = (numbers[1:] + numbers[:-1]) / 2
    if (
        name == "nf4"
    ):  # halfway between two entries is not a number of either dtype, and which is nearer is chance
        halfway = halfway[:0]
    ends = torch.tensor([1.01, 1.04, 1.2, 3.0, 1e5], dtype=torch.float64) * largest(name)
    x = torch.cat([numbers, halfway, ends, -ends, torch.zeros(1)]).to(dtype)
    x = torch.cat([x, torch.nextafter(x, x + 1), torch.nextafter(x, x - 1)])
    expected = [reference.nearest(v, name) for v in x.tolist()]
    assert torch.equal(round_to_format(x, name), torch.tensor(expected, dtype=dtype))


@pytest.mark.parametrize("name", FORMATS)
@given(st.floats(-6e4, 6e4, width=32))
def test_any_number_rounds_as_in_the_reference(name, x):
    for dtype in DTYPES:
        got = round_to_format(torch.tensor([x, x / 1e4], dtype=dtype), name).tolist()
        x_small = torch.tensor(x / 1e4, dtype=dtype).item()
        expected = [reference.nearest(x, name), reference.nearest(x_small, name)]
        assert got == pytest.approx(expected, rel=0 if name != "nf4" else 1e-7, abs=0)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_rounding_in_float64_agrees_with_torch_on_float32_numbers(name):
    x = draw(0, 20000) * 2.0 ** torch.linspace(-22, 9, 20000)
    assert torch.equal(round_to_format(x.double(), name), x.to(MINIFLOATS[name].cast).double())


def test_float64_is_not_rounded_twice():
    """1 + 1/16 is halfway between two numbers of e4m3; a little more vanishes in float32."""
    x = torch.tensor([1 + 1 / 16 + 1e-12], dtype=torch.float64)
    assert round_to_format(x, "e4m3").item() == 1.125


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_a_number_stays_so_and_infinity_saturates(name):
    for dtype in DTYPES:
        got = round_to_format(torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype), name)
        assert got[0].isnan()
        assert got[1:].tolist() == [largest(name), -largest(name)]


@pytest.mark.parametrize("name", FLOATS)
@given(st.integers(0, 2**31), st.integers(-20, 20))
def test_the_relative_error_is_bounded_by_the_mantissa(name, seed, exponent):
    """Half a unit in the last place: 2^-(mantissa + 1) of a normal number, a fixed step below."""
    f, x = MINIFLOATS[name], draw(seed, 4, 32) * 2.0**exponent
    scale = choose_qparams(x, spec_of(name)).scale.squeeze(-1)
    error = (fake_quantize(x, spec_of(name)) - x).abs()
    bound = torch.maximum(x.abs(), scale * f.smallest_normal) * 2.0 ** -(f.mantissa + 1)
    assert (error <= bound * (1 + 1e-6) + 1e-6 * x.abs()).all()
