"""Ranges narrower than min–max: searched, and by percentile."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.quant import ranges
from qbench.quant.grid import QParams, choose_qparams, fake_quantize, grouped
from qbench.quant.ranges import Histogram, percentile_range, search_range
from qbench.quant.spec import QuantSpec

SPECS = [
    QuantSpec(3),
    QuantSpec(4, True),
    QuantSpec(4, True, symmetric_mode="gptq"),
    QuantSpec(2, granularity="group", group_size=8, real_zero=True),
    QuantSpec(4, granularity="tensor"),
    QuantSpec(4, True, "block", 8),
    QuantSpec(4, True, "group", 16, "e2m1", "e4m3"),
    QuantSpec(4, True, "group", 16, "e2m1", "e8m0"),
    QuantSpec(4, True, "group", 16, "nf4"),
    QuantSpec(8, True, format="e4m3"),
]


def draw(seed: int, *shape: int) -> torch.Tensor:
    """Heavy tails, so that clipping pays."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * x.abs()


def shared_error(
    w: torch.Tensor, spec: QuantSpec, qparams: QParams, p: float = 2.4, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """The error of all that shares a scale, by brute force: `(groups,)`."""
    error = (fake_quantize(w, spec, qparams) - w).abs() ** p * (1 if weight is None else weight)
    if spec.granularity == "block":
        size = spec.group_size
        return torch.stack([b.sum() for rows in error.split(size) for b in rows.split(size, -1)])
    return grouped(error, spec).sum(-1).flatten()


@pytest.mark.parametrize("spec", SPECS, ids=repr)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_a_searched_range_is_never_worse_than_min_max(spec, seed):
    w = draw(seed, 12, 32)
    searched = shared_error(w, spec, search_range(w, spec, n_grid=20))
    minmax = shared_error(w, spec, choose_qparams(w, spec))
    assert (searched <= minmax * (1 + 1e-12)).all()  # summed in another order


@pytest.mark.parametrize("spec", SPECS, ids=repr)
@pytest.mark.parametrize("p", [2.0, 2.4])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_searched_range_is_the_best_of_those_tried(spec, p, weighted):
    w, weight = draw(0, 12, 32), draw(1, 32).abs() if weighted else None
    found = shared_error(w, spec, search_range(w, spec, weight, n_grid=10, p=p), p, weight)
    tried = [
        shared_error(w, spec, choose_qparams(w, spec, (1 - i / 10, 1 - i / 10)), p, weight) for i in range(8)
    ]
    torch.testing.assert_close(found, torch.stack(tried).amin(0), rtol=1e-12, atol=0)


def test_importance_decides_which_columns_saturate():
    w = torch.tensor([[10.0, 1.3, 0.7, 0.4]], dtype=torch.float64)
    spec = QuantSpec(3, True)
    plain = search_range(w, spec).scale
    blind = search_range(w, spec, torch.tensor([0.0, 1.0, 1.0, 1.0])).scale
    assert blind < 0.5 * plain


@pytest.mark.parametrize("spec", [s for s in SPECS if not s.symmetric], ids=repr)
def test_both_ends_together_are_one_of_the_independent_choices(spec):
    w = draw(2, 12, 32)
    w[:, 0] = 20.0  # on one side alone
    together = shared_error(w, spec, search_range(w, spec, n_grid=10))
    apart = shared_error(w, spec, search_range(w, spec, n_grid=10, asymmetric=True))
    assert (apart <= together * (1 + 1e-12)).all()
    assert (apart < together * 0.99).any()


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_searching_in_chunks_changes_nothing(spec, monkeypatch):
    w, weight = draw(3, 20, 32), draw(4, 32).abs()
    whole = search_range(w, spec, weight, n_grid=10)
    monkeypatch.setattr(ranges, "CHUNK", 100)
    chunked = search_range(w, spec, weight, n_grid=10)
    assert torch.equal(whole.scale, chunked.scale)
    assert torch.equal(whole.zero, chunked.zero)


def test_scales_are_quantized_after_the_search():
    spec = QuantSpec(3, True, "group", 8, scale_bits=3, scale_group=4)
    plain, w = replace(spec, scale_bits=16), draw(5, 8, 32)
    keep = search_range(w, plain).scale / choose_qparams(w, plain).scale
    assert (keep < 0.95).any()
    expected = choose_qparams(w, spec, (keep, keep)).scale
    torch.testing.assert_close(search_range(w, spec).scale, expected, rtol=1e-12, atol=0)


def test_one_bit_has_no_range_to_search():
    w = draw(6, 4, 16)
    assert torch.equal(search_range(w, QuantSpec(1)).scale, choose_qparams(w, QuantSpec(1)).scale)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"max_shrink": 1.0}, "max_shrink must be between 0 and 1"),
        ({"n_grid": 1}, "their product at least 1"),
        ({"asymmetric": True}, "has one range, not two ends"),
    ],
)
def test_searches_that_make_no_sense_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        search_range(torch.ones(2, 8), QuantSpec(4, True), **more)


def test_a_percentile_is_a_share_of_the_elements():
    x = torch.arange(1000.0).flip(0).expand(2, 1000)
    lo, hi = percentile_range(x, 99)
    assert hi.tolist() == [[989], [989]]  # 990 elements do not exceed it
    assert lo.tolist() == [[10], [10]]
    lo, hi = percentile_range(x, 100)
    assert (lo[0].item(), hi[0].item()) == (0, 999)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_percentile_does_not_hide_what_is_not_finite(value):
    x = torch.arange(1000.0)
    x[3] = value
    assert all(end.isnan().all() for end in percentile_range(x, 90))


@pytest.mark.parametrize("q", [50, 100.1, -3])
def test_percentiles_are_per_cent_of_the_upper_half(q):
    with pytest.raises(ValueError, match="must be above 50"):
        percentile_range(torch.ones(4), q)
    with pytest.raises(ValueError, match="must be above 50"):
        Histogram().percentile(q)
