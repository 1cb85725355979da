"""SpQR against its algorithm done naively."""

import pytest
import torch

from qbench.algorithms.base import Pipeline
from qbench.algorithms.easyquant import EasyQuant
from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.quik import QUIK
from qbench.algorithms.spqr import SpQR, leave_one_out
from qbench.engine import quantize
from qbench.quant.grid import fake_quantize, grouped
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec

from .reference import spqr as reference
from .test_gptq import SIZE, N, problem


def rounded(algorithm: SpQR, w: torch.Tensor, x: torch.Tensor, spec: QuantSpec):
    return algorithm.round(w, *algorithm.factor(x.T @ x / len(x)), spec)[:2]


def spec_of(bits: int = 3, size: int = SIZE, **more) -> QuantSpec:
    return QuantSpec(bits, granularity="group", group_size=size, real_zero=True, **more)


@pytest.mark.parametrize("simplified", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("bits", "size", "scale_bits", "threshold"),
    [(3, SIZE, None, 0.2), (2, N, None, 0.5), (4, SIZE, 3, 0.02)],
)
def test_spqr_equals_the_naive_algorithm(bits, size, scale_bits, threshold, act_order, simplified):
    w, x = problem()
    more = {"scale_bits": scale_bits, "scale_group": 8} if scale_bits else {}
    algorithm = SpQR(threshold, act_order=act_order, simplified=simplified, block_size=13)
    ours, kept = rounded(algorithm, w, x, spec_of(bits, size, **more))
    naive, expected = reference.spqr(w, x, bits, size, 1.0, threshold, act_order, simplified, scale_bits, 8)
    assert 0 < expected.sum() < 0.2 * w.numel()
    assert torch.equal(kept, expected)
    # Both work in float64, on a Hessian with condition number below 100.
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_leaving_one_out_refits_the_range_for_every_weight(bits, symmetric):
    """Brute force: each weight is left out, the others are rounded on their own min-max grid."""
    w, _ = problem()
    w[:, 5] = w[:, 7]  # an extreme that occurs twice has the range of the group without one of them
    spec = QuantSpec(bits, symmetric, "group", SIZE)
    importance = torch.rand(N, dtype=w.dtype, generator=torch.Generator().manual_seed(3))
    g, i = grouped(w, spec), grouped(importance.expand_as(w), spec)
    row = QuantSpec(bits, symmetric)
    everything = ((fake_quantize(g, row) - g).square() * i).sum(-1)
    for j in range(SIZE):
        others = [k for k in range(SIZE) if k != j]
        error = ((fake_quantize(g[..., others], row) - g[..., others]).square() * i[..., others]).sum(-1)
        torch.testing.assert_close(leave_one_out(g, i, spec)[..., j], everything - error, rtol=0, atol=1e-12)


@pytest.mark.parametrize("simplified", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_with_no_threshold_to_meet_it_is_gptq_and_with_none_to_miss_it_keeps_everything(
    act_order, simplified
):
    w, x = problem()
    spec, gram = spec_of(), x.T @ x / len(x)
    q, kept = rounded(SpQR(1e30, simplified, damp=0.01, act_order=act_order), w, x, spec)
    assert not kept.any()
    gptq = GPTQ(damp=0.01, act_order=act_order).round(w, gram, spec)
    torch.testing.assert_close(q, gptq, rtol=1e-12, atol=1e-12)
    q, kept = rounded(SpQR(1e-30, simplified, act_order=act_order), w, x, spec)
    torch.testing.assert_close(q, w, rtol=0, atol=1e-12)
    assert kept.float().mean() > 0.8  # the ends of a range are on its grid


def test_a_lower_threshold_keeps_more_and_errs_less():
    w, x = problem()
    counts, errors = [], []
    for threshold in (1.0, 0.2, 0.04):
        q, kept = rounded(SpQR(threshold), w, x, spec_of(2))
        counts.append(int(kept.sum()))
        errors.append(float(((q - w) @ x.T).square().sum()))
    assert counts == sorted(counts)
    assert counts[0] < counts[2]
    assert errors == sorted(errors, reverse=True)


def test_what_lies_far_out_is_kept_and_leaves_its_group_as_fine_a_grid_as_before():
    w, x = problem()
    w = 0.4 * w.clamp(-1, 1)
    far = torch.zeros_like(w, dtype=torch.bool)
    far[[0, 5, 10, 15], [3, 12, 21, 40]] = True
    outlying = torch.where(far, 30.0, w)
    errors = {}
    for simplified in (False, True):
        q, kept = rounded(SpQR(simplified=simplified, damp=100.0), outlying, x, spec_of(3))
        if not simplified:
            assert kept[far].all()
        errors[simplified] = (q - outlying).masked_fill(far, 0).square().sum()
    inliers = w.masked_fill(far, 0)
    assert errors[False] < 1.1 * (fake_quantize(inliers, spec_of(3)) - inliers).square().sum()
    assert errors[False] < 0.1 * errors[True]


def test_kept_weights_are_counted(llama, tokens):
    """Each takes its value and its column, 32 bits, and each row where its own begin, 32 bits."""
    scheme = Scheme.of(4, group_size=16, real_zero=True, scale_bits=3)
    result = quantize(llama, SpQR(), scheme, tokens)
    for index, report in enumerate(result.reports):
        assert sum(report["kept_weights"].values()) > 0
        for name, count in report["kept_weights"].items():
            rows, columns = llama.model.layers[index].get_submodule(name).weight.shape
            dense = scheme.weight.bits_per_element(rows, columns) * rows * columns
            expected = dense + 32 * count + 32 * rows
            assert result.stored_bits[f"{index}.{name}"] == pytest.approx(expected, rel=1e-12)


def test_ranges_that_are_not_of_one_group_are_refused():
    for scheme in (
        Scheme.of(4, weight_granularity="tensor"),
        Scheme.of(4, weight_format="nvfp4", weight_symmetric=True),
        Scheme.of(1, group_size=16),
    ):
        with pytest.raises(ValueError, match="set wbits >= 2 and a group_size"):
            SpQR().check(scheme)
    SpQR().check(Scheme.of(4, group_size=16, real_zero=True, scale_bits=3))
    SpQR().check(Scheme.of(4))


@pytest.mark.parametrize("before", [EasyQuant(), QUIK()], ids=lambda a: type(a).__name__)
def test_it_takes_no_orders(before):
    with pytest.raises(ValueError, match="SpQR chooses its own"):
        Pipeline((before, SpQR()))


@pytest.mark.parametrize("wrong", [{"relative_threshold": 0.0}, {"damp": -1.0}, {"block_size": 0}], ids=str)
def test_hyperparameters_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must be positive"):
        SpQR(**wrong)
