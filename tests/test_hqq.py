"""HQQ against its formulae, group by group."""

import pytest
import torch

from qbench.algorithms.base import Pipeline
from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.hqq import HQQ
from qbench.engine import quantize
from qbench.quant.grid import choose_qparams, fake_quantize
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec

from .reference import hqq as reference
from .test_gptq import SIZE, N, problem


def spec_of(bits: int, size: int = SIZE) -> QuantSpec:
    return QuantSpec(bits, granularity="group", group_size=size, real_zero=True)


def heavy(seed: int = 0) -> torch.Tensor:
    """A weight with outliers."""
    w, _ = problem(seed)
    return w.sign() * w.abs() ** 2


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [SIZE, N])
def test_zero_points_are_those_of_the_formulae(bits, size):
    w = heavy(bits)
    naive, errors = reference.zeros(w, bits, size, 0.7, 10.0, 1.01, 20)
    assert len(errors) > 2, "nothing was optimized"
    ours = HQQ().grid(w, spec_of(bits, size)).zero.squeeze(-1)
    # Twenty steps of sums of `size` numbers; a rounding that falls the other way would be far beyond.
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)


def test_the_penalty_grows():
    """LLMC's code leaves it at its first value."""
    w = heavy()
    grown, fixed = (HQQ(kappa=kappa, beta=1.0).grid(w, spec_of(2)).zero for kappa in (1.5, 1.0))
    naive, _ = reference.zeros(w, 2, SIZE, 0.7, 1.0, 1.5, 20)
    torch.testing.assert_close(grown.squeeze(-1), naive, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(grown, fixed)


@pytest.mark.parametrize("granularity", ["row", "group", "block", "tensor"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_no_layer_is_further_from_its_weights_than_on_the_min_max_grid(bits, granularity):
    w = heavy()
    size = SIZE if granularity in ("group", "block") else None
    spec = QuantSpec(bits, granularity=granularity, group_size=size, real_zero=True)
    grid = HQQ().grid(w, spec)
    whole = choose_qparams(w, spec)
    assert torch.equal(grid.scale, whole.scale)
    assert grid.zero.shape == whole.zero.shape
    error, least = ((fake_quantize(w, spec, g) - w).abs().mean() for g in (grid, whole))
    assert error <= least
    if bits < 8:
        assert error < least


def test_what_is_kept_does_not_move_a_zero_point():
    w = heavy()
    kept = torch.zeros(N, dtype=torch.bool)
    kept[[3, 20]] = True
    w[:, kept] = 0
    plain = HQQ().grid(w, spec_of(3), kept.expand_as(w))
    w[:, kept] = 50.0
    assert torch.equal(HQQ().grid(w, spec_of(3), kept.expand_as(w)).zero, plain.zero)
    alone = HQQ().grid(w[:, ~kept], QuantSpec(3, real_zero=True))
    whole = HQQ().grid(w, QuantSpec(3, real_zero=True), kept.expand_as(w))
    torch.testing.assert_close(whole.zero, alone.zero, rtol=1e-9, atol=1e-9)


def test_a_narrower_range_can_be_chosen_before():
    w = heavy()
    narrow = choose_qparams(w, spec_of(2), (0.7, 0.7))
    grid = HQQ().grid(w, spec_of(2), start=narrow)
    assert torch.equal(grid.scale, narrow.scale)
    errors = [
        (fake_quantize(w, spec_of(2), g) - w).abs().mean() for g in (grid, narrow, HQQ().grid(w, spec_of(2)))
    ]
    assert errors[0] < min(errors[1:])


def test_integer_zero_points_are_refused():
    with pytest.raises(ValueError, match="real_zero=true"):
        HQQ().check(Scheme.parse("w3a16g16"))
    HQQ().check(Scheme.of(wbits=3, group_size=16, real_zero=True))


def test_other_rounders_take_the_grid(llama, tokens):
    scheme = Scheme.of(wbits=2, group_size=16, real_zero=True)
    grid = HQQ().grid(llama.model.layers[0].mlp.up_proj.weight, scheme.weight)
    quantize(llama, Pipeline((HQQ(), GPTQ())), scheme, tokens)
    w = llama.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(fake_quantize(w, scheme.weight, grid), w, rtol=1e-12, atol=1e-12)
