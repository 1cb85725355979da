"""Static ranges from histograms that grow."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qbench.quant.grid import qparams_of_range, round_to_grid
from qbench.quant.ranges import Histogram, percentile_range
from qbench.quant.spec import QuantSpec


def draw(seed: int, *shape: int) -> torch.Tensor:
    """Heavy tails, so that clipping pays."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * x.abs()


def histogram(*batches: torch.Tensor, bins: int = 2048) -> Histogram:
    h = Histogram(bins)
    for x in batches:
        h.add(x)
    return h


@given(st.integers(0, 2**31), st.lists(st.integers(-12, 12), min_size=1, max_size=5))
def test_a_histogram_does_not_depend_on_batches_or_their_order(seed, exponents):
    x = [draw(seed + i, 3, 7) * 2.0**e for i, e in enumerate(exponents)]
    x.append(torch.zeros(4, dtype=torch.float64))
    once = histogram(torch.cat([b.flatten() for b in x]), bins=16)
    for batches in (x, x[::-1]):
        several = histogram(*batches, bins=16)
        assert several.width == once.width
        assert torch.equal(several.counts, once.counts)
    assert once.counts.sum() == sum(b.numel() for b in x)


def test_bins_count_what_lies_in_them():
    x = draw(0, 5000)
    h = histogram(x, bins=64)
    edges = torch.arange(-64, 65) * h.width
    expected = [((x >= a) & (x < b)).sum().item() for a, b in pairwise(edges)]
    assert h.counts.tolist() == expected
    assert x.abs().max() < 64 * h.width <= 2 * x.abs().max()


def test_a_power_of_two_lies_within_the_bins():
    for x in (torch.tensor([4.0]), torch.tensor([-4.0])):
        h = histogram(x, bins=64)
        assert h.counts.sum() == 1
        assert 64 * h.width == 8


@pytest.mark.parametrize("q", [60, 99, 99.9, 100])
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_percentiles_of_a_histogram_are_right_to_the_width_of_a_bin(q, shift):
    x = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + shift
    h = histogram(*x.split(1000))
    for ours, exact, outwards in zip(h.percentile(q), percentile_range(x, q), (-1, 1), strict=True):
        assert ours.shape == (1, 1)
        assert 0 <= (ours - exact).item() * outwards <= h.width


@pytest.mark.parametrize(
    "spec",
    [QuantSpec(4, True), QuantSpec(8), QuantSpec(4), QuantSpec(8, True, format="e4m3"), QuantSpec(1)],
    ids=repr,
)
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_a_range_from_a_histogram_is_as_good_as_brute_force(spec, shift):
    x = draw(0, 20000) + shift
    spec = replace(spec, granularity="tensor")

    def error(lo: torch.Tensor, hi: torch.Tensor) -> torch.Tensor:
        return (round_to_grid(x[None], *qparams_of_range(lo, hi, spec), spec) - x).square().mean()

    h = histogram(*x.split(5000))
    lo, hi = x.min().view(1, 1), x.max().view(1, 1)
    keep = [1 - i / 20 for i in range(16)]
    tried = [error(lo * a, hi * b) for a in keep for b in ([a] if spec.symmetric else keep)]
    found = error(*h.mse_range(spec, n_grid=20))
    # The square root of an error changes by at most that of the values, which is less than half a bin.
    assert found.sqrt() <= torch.stack(tried).min().sqrt() + h.width
    assert found <= error(lo, hi) * (1 + 1e-6) + h.width**2


@pytest.mark.parametrize("spec", [QuantSpec(3, True), QuantSpec(3)], ids=repr)
def test_numbers_in_the_middle_of_their_bins_give_the_best_range_exactly(spec):
    k = torch.randint(-16, 16, (200,), generator=torch.Generator().manual_seed(0))
    x = (k[None].double() + 0.5) / 8
    keep = [1 - i / 100 for i in range(80)]
    pairs = [(a, b) for a in keep for b in ([a] if spec.symmetric else keep)]

    def error(lo: torch.Tensor, hi: torch.Tensor) -> float:
        return (round_to_grid(x, *qparams_of_range(lo, hi, spec), spec) - x).square().sum().item()

    lo, hi = x.min().view(1, 1), x.max().view(1, 1)
    least = min(error(lo * a, hi * b) for a, b in pairs)
    assert error(*histogram(x, bins=16).mse_range(spec)) == pytest.approx(least, rel=1e-12)


def test_outliers_are_clipped_when_that_pays():
    x = torch.cat([draw(0, 20000).clamp(-3, 3), torch.tensor([40.0])])
    lo, hi = histogram(x).mse_range(QuantSpec(4, granularity="tensor"))
    assert hi < 20
    assert lo.shape == hi.shape == (1, 1)


def test_a_histogram_of_narrow_numbers_gives_float32_ranges():
    h = histogram(draw(0, 64).bfloat16())
    assert all(end.dtype == torch.float32 for end in (*h.percentile(99), *h.mse_range(QuantSpec(8))))


def test_values_that_are_not_finite_are_not_counted():
    with pytest.raises(FloatingPointError, match=r"use model\.dtype=float32"):
        Histogram().add(torch.tensor([1.0, torch.inf]))
    with pytest.raises(FloatingPointError, match="nan"):
        Histogram().add(torch.tensor([1.0, torch.nan]))


def test_an_empty_histogram_has_no_range():
    with pytest.raises(ValueError, match="call add first"):
        Histogram().percentile(99)


@pytest.mark.parametrize("bins", [0, 1, 7])
def test_bins_come_in_pairs(bins):
    with pytest.raises(ValueError, match="choose an even number"):
        Histogram(bins)
