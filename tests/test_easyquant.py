"""EasyQuant against its descent done row by row, and against brute force."""

import pytest
import torch

from qbench.algorithms.base import Pipeline
from qbench.algorithms.easyquant import EasyQuant
from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.quik import QUIK
from qbench.algorithms.rtn import RTN
from qbench.engine import quantize
from qbench.quant.grid import QParams, choose_qparams, fake_quantize, grouped, round_to_grid
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec

from .reference import easyquant as reference
from .test_laws import Listen

SPECS = {
    "row": QuantSpec(4, symmetric=True),
    "group": QuantSpec(3, symmetric=True, granularity="group", group_size=16),
    "tensor": QuantSpec(4, symmetric=True, granularity="tensor"),
    "block": QuantSpec(4, symmetric=True, granularity="block", group_size=16),
    "asymmetric": QuantSpec(3, granularity="group", group_size=16),
    "real zero": QuantSpec(3, granularity="group", group_size=16, real_zero=True),
    "e2m1": QuantSpec(4, symmetric=True, format="e2m1"),
}


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights with heavy tails, and which of them lie far out."""
    generator = torch.Generator().manual_seed(0)
    w = 0.02 * torch.randn(32, 64, generator=generator, dtype=torch.float64)
    w *= 1 + 4 * (torch.rand(32, 64, generator=generator) < 0.02)
    return w, reference.outliers(w, 3.0)


def squared_error(w: torch.Tensor, kept: torch.Tensor, spec: QuantSpec, grid: QParams) -> torch.Tensor:
    """Of what is not kept, by group."""
    g = grouped(w, spec)
    return ((round_to_grid(g, *grid, spec) - g) * grouped(~kept, spec)).square().sum(-1, keepdim=True)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_scales_are_those_of_the_descent_done_row_by_row(bits):
    w, kept = weights()
    ours = EasyQuant().descend(w, kept, QuantSpec(bits, symmetric=True)).scale.flatten()
    naive = [reference.best_scale(row[~mask], bits, 1e-2, 100) for row, mask in zip(w, kept, strict=True)]
    # A hundred steps of Adam in float64; a code that flips moves a scale by far more.
    torch.testing.assert_close(ours, torch.tensor(naive, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_descent_comes_near_the_best_scale_there_is(bits):
    w, kept = weights()
    spec = QuantSpec(bits, symmetric=True)
    ours = squared_error(w, kept, spec, EasyQuant().descend(w, kept, spec)).sum()
    first = choose_qparams(w.masked_fill(kept, 0), spec)
    tried = [
        squared_error(w, kept, spec, QParams(first.scale * f, first.zero))
        for f in torch.linspace(0.2, 1, 400)
    ]
    assert ours < 1.1 * torch.stack(tried).amin(0).sum()
    if bits < 8:
        assert ours < 0.95 * tried[-1].sum(), "min-max was as good: this shows nothing"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_no_group_errs_more_than_on_its_widest_range_and_kept_weights_have_no_say(spec):
    w, kept = weights()
    grid = EasyQuant().descend(w, kept, spec)
    first = choose_qparams(w.masked_fill(kept, 0), spec)
    assert (grid.scale <= first.scale).all()
    assert torch.equal(grid.zero, first.zero)
    whole = [squared_error(w, kept, spec, g) for g in (grid, first)]
    if spec.granularity == "block":
        whole = [error.unflatten(0, (-1, 16)).sum(1) for error in whole]
    assert (whole[0] <= whole[1] * (1 + 1e-12)).all()
    assert whole[0].sum() < whole[1].sum()
    other = EasyQuant().descend(torch.where(kept, -7.0, w), kept, spec)
    assert torch.equal(other.scale, grid.scale)


@pytest.mark.parametrize("rounder", [RTN(), GPTQ()], ids=lambda a: type(a).__name__)
def test_outliers_are_kept_and_the_rest_is_on_the_grid_that_was_found(rounder, llama, tokens):
    listener = Listen()
    before = {n: p.clone() for n, p in llama.named_parameters()}
    quantize(llama, Pipeline((EasyQuant(2.5), listener)), Scheme.of(4, weight_symmetric=True), tokens)
    quantize(llama, Pipeline((EasyQuant(2.5), rounder)), Scheme.of(4, weight_symmetric=True), tokens)
    for block in listener.heard:
        for name, linear in block.linears.items():
            w, kept = before[f"model.layers.{block.index}.{name}.weight"], block.kept[name]
            assert torch.equal(kept, reference.outliers(w, 2.5))
            if isinstance(rounder, RTN):
                assert torch.equal(linear.weight[kept], w[kept])
            on_grid = fake_quantize(linear.weight, QuantSpec(4, symmetric=True), block.grids[name])
            torch.testing.assert_close(linear.weight[~kept], on_grid[~kept], rtol=0, atol=1e-12)


def test_kept_weights_are_counted(llama):
    """Each takes its value and its column, 32 bits, and each row where its own begin, 32 bits."""
    scheme = Scheme.of(4, weight_symmetric=True)
    result = quantize(llama, Pipeline((EasyQuant(2.5), RTN())), scheme)
    for index, report in enumerate(result.reports):
        for name, count in report["kept_weights"].items():
            rows, columns = llama.model.layers[index].get_submodule(name).weight.shape
            assert 0.002 < count / (rows * columns) < 0.03  # 0.012 of a normal distribution
            dense = (4 * columns + 16) * rows
            expected = dense + 32 * count + 32 * rows
            assert result.stored_bits[f"{index}.{name}"] == pytest.approx(expected, rel=1e-12)


def test_what_has_no_scale_to_learn_is_refused():
    for scheme in (
        Scheme.of(4, group_size=16, scale_bits=3),
        Scheme.of(4, weight_format="mxfp4", weight_symmetric=True),
        Scheme.of(1, group_size=16),
    ):
        with pytest.raises(ValueError, match="EasyQuant learns scales that are real numbers"):
            EasyQuant().check(scheme)


def test_channels_and_weights_are_not_kept_of_one_layer(llama, tokens):
    with pytest.raises(ValueError, match="of which channels are kept; choose one"):
        quantize(llama, Pipeline((QUIK(), EasyQuant(), RTN())), Scheme.of(4), tokens)


@pytest.mark.parametrize("wrong", [{"n_sigma": 0.0}, {"lr": -1.0}, {"steps": -1}], ids=str)
def test_hyperparameters_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must be positive, and the last not negative"):
        EasyQuant(**wrong)
