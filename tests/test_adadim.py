"""AdaDim: the axis that hurts less, and grids along it."""

from dataclasses import replace

import pytest
import torch

from qbench.algorithms.adadim import AdaDim
from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.rtn import RTN
from qbench.engine import quantize
from qbench.quant.grid import fake_quantize
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec

from .conftest import random_model
from .test_gptq import SIZE, problem


def problems():
    """An input channel with outliers, and rows that differ from one another."""
    w, x = problem()
    w = torch.cat((w, w[:12].flip(1)))  # 32 rows, two groups of 16
    with_outliers, even = x.clone(), torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
    with_outliers[:, 5] *= 100
    w[:, 5] *= 0.1
    rows = w.abs()  # a row lies on one side of zero, a column on both
    rows[::2] *= -1
    return [(w, with_outliers, True), (rows, even, False)]


def errors(w, x, spec):
    """Of the output, with groups along the input channels and along the output channels."""
    return [
        (x @ (q - w).T).square().sum().item()
        for q in (fake_quantize(w, spec), fake_quantize(w.T.contiguous(), spec).T)
    ]


@pytest.mark.parametrize("size", [SIZE, None])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("case", [0, 1])
def test_the_axis_with_the_smaller_output_error_is_taken(case, bits, size):
    w, x, expected = problems()[case]
    spec = QuantSpec(bits, granularity="group" if size else "row", group_size=size)
    along, across = errors(w, x, spec)
    rounded, grid = AdaDim().round(w, x.T @ x / len(x), spec)
    per_input = grid is None
    assert per_input == (across < along) == expected
    assert torch.equal(
        rounded, fake_quantize(w.T.contiguous(), spec).T if per_input else fake_quantize(w, spec)
    )


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("bits", [2, 3])
def test_weights_lie_on_grids_along_the_axis_that_was_taken(bits, compensate):
    for w, x, expected in problems():
        spec = QuantSpec(bits, granularity="group", group_size=SIZE)
        rounded, grid = AdaDim(compensate=compensate).round(w, x.T @ x / len(x), spec)
        per_input = grid is None
        assert per_input == expected
        groups = (rounded.T if per_input else rounded).unflatten(1, (-1, SIZE)).flatten(0, 1)
        # Values are scale · (q − zero): equal codes of one group differ by rounding at most.
        assert max(len(torch.unique((g * 1e9).round())) for g in groups) <= 2**bits


def test_gptq_on_grids_along_the_output_channels_makes_up_for_errors():
    w, x, _ = problems()[0]
    spec, gram = QuantSpec(2, granularity="group", group_size=SIZE), x.T @ x / len(x)
    nearest, compensated = (
        (x @ (AdaDim(compensate=c).round(w, gram, spec)[0] - w).T).square().sum() for c in (False, True)
    )
    assert compensated < 0.7 * nearest


def test_gptq_along_the_input_channels_is_gptq():
    w, x, _ = problems()[1]
    spec, gram = QuantSpec(3, granularity="group", group_size=SIZE), x.T @ x / len(x)
    assert torch.equal(AdaDim(compensate=True).round(w, gram, spec)[0], GPTQ().round(w, gram, spec))


def test_a_layer_whose_outputs_do_not_divide_into_groups_keeps_its_axis():
    w, x, per_input = problems()[0]
    assert per_input
    spec = QuantSpec(3, granularity="group", group_size=SIZE)
    rounded, grid = AdaDim().round(w[:20], x.T @ x / len(x), spec)
    assert grid is not None
    assert torch.equal(rounded, fake_quantize(w[:20], spec))


def test_layers_that_took_the_other_axis_are_reported_and_stored_so(tokens):
    scheme = Scheme.parse("w3a16")
    done = quantize(random_model("llama"), AdaDim(), scheme, tokens)
    plain = quantize(random_model("llama"), RTN(), scheme, tokens)
    turned = {f"{i}.{name}" for i, report in enumerate(done.reports) for name in report["per_input"]}
    assert turned
    for name, bits in done.stored_bits.items():
        # One scale for each of 48 inputs in place of 112 outputs, or the other way round.
        wide = name.endswith(("gate_proj", "up_proj", "down_proj"))
        assert (bits != plain.stored_bits[name]) == (name in turned and wide)


def test_blocks_of_weights_have_no_axis():
    scheme = Scheme(weight=replace(QuantSpec(4), granularity="tensor"))
    with pytest.raises(ValueError, match="weight_granularity=auto"):
        AdaDim().check(scheme)
