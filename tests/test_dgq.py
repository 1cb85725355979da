"""DGQ against its searches done naively, and what its grids promise to integer kernels."""

import pytest
import torch

from qbench.algorithms.base import Pipeline
from qbench.algorithms.dgq import DGQ
from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.percentile_smooth import PercentileSmooth
from qbench.algorithms.rtn import RTN
from qbench.engine import quantize
from qbench.quant.grid import choose_qparams, fake_quantize
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec

from .conftest import random_model
from .reference import dgq as reference
from .test_engine import captured
from .test_gptq import SIZE, problem
from .test_laws import Keep


def spec_of(bits: int, symmetric: bool = False) -> QuantSpec:
    return QuantSpec(bits, symmetric, "group", SIZE)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_grids_are_the_best_of_both_searches(bits):
    w, x = problem(bits)
    w = w[:8]
    units, multiples, zeros = reference.scales(w, x, bits, SIZE)
    scale, zero = (p.squeeze(-1) for p in DGQ().grid(w, x.T @ x / len(x), spec_of(bits)))
    assert torch.equal(zero, zeros)
    torch.testing.assert_close(scale, units[:, None] * multiples, rtol=1e-12, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_every_weight_is_an_int8_number_of_its_rows_units(bits, symmetric):
    w, x = problem(bits)
    w[3], w[4, :SIZE] = 0, 0  # a row and a group of zeros
    w[5, :SIZE] *= 40  # one group much wider than the others
    spec = spec_of(bits, symmetric)
    grid = DGQ().grid(w, x.T @ x / len(x), spec)
    scale = grid.scale.squeeze(-1)
    unit = scale.amin(1, keepdim=True)
    # The smallest scale is a multiple of the unit itself: try what it may be a multiple of.
    ratios = torch.stack([scale / (unit / m) for m in range(1, 128)])
    whole = ((ratios - ratios.round()).abs() < 1e-9).all(-1)
    assert whole.any(0).all(), "a row's scales have no common unit"
    codes = torch.stack([fake_quantize(w, spec, grid) / (unit / m) for m in range(1, 128)])
    fits = whole & (codes.abs().amax(-1) <= 127 + 1e-6)
    assert fits.any(0).all()


def test_a_row_of_units_costs_little_beside_groups_of_their_own_scale():
    w, x = problem()
    gram = x.T @ x / len(x)
    errors = [
        ((fake_quantize(w, spec_of(4), grid) - w) @ x.T).square().sum()
        for grid in (DGQ().grid(w, gram, spec_of(4)), choose_qparams(w, spec_of(4)))
    ]
    assert errors[0] < 1.1 * errors[1]


def test_groups_store_an_integer_in_place_of_a_scale(llama, tokens):
    scheme = Scheme.parse("w4a16g16")
    done = quantize(llama, Pipeline((DGQ(), RTN())), scheme, tokens)
    rows, columns = llama.model.layers[0].mlp.down_proj.weight.shape
    groups = rows * columns // 16
    assert done.stored_bits["0.mlp.down_proj"] == rows * columns * 4 + groups * (8 + 4) + rows * 16


def test_gptq_takes_the_grids(llama, tokens):
    plain = quantize(random_model("llama"), Pipeline((DGQ(), RTN())), Scheme.parse("w2a16g16"), tokens)
    better = quantize(llama, Pipeline((DGQ(), GPTQ())), Scheme.parse("w2a16g16"), tokens)
    assert better.errors[0] < plain.errors[0]


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8g16"])
def test_only_narrow_groups_fit(scheme):
    with pytest.raises(ValueError, match="group_size=128"):
        DGQ().check(Scheme.parse(scheme))


@pytest.mark.parametrize("path", ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"])
def test_smoothing_brings_the_largest_channels_down_to_the_next(path, llama, tokens):
    path, share = f"model.layers.0.{path}", 0.1
    before = captured(llama, tokens, path).flatten(0, -2).abs().amax(0)
    quantize(llama, Pipeline((PercentileSmooth(share), Keep())), Scheme.parse("w16a8"), tokens)
    for module in llama.modules():
        module._forward_pre_hooks.clear()
    after = captured(llama, tokens, path).flatten(0, -2).abs().amax(0)
    rank = int(len(before) * share + 1.5)
    level = before.sort(descending=True).values[rank - 1]
    torch.testing.assert_close(after, before.clamp(max=level), rtol=1e-5, atol=0)
    assert (before > level).sum() == rank - 1
