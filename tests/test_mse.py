"""Ranges by the error of the weights, as a step; `tests/test_ranges.py` is about the search itself."""

import pytest
import torch

from qbench.algorithms.base import Pipeline
from qbench.algorithms.mse import MSEClip
from qbench.algorithms.rtn import RTN
from qbench.engine import quantize
from qbench.quant.scheme import Scheme

from .conftest import random_model
from .test_engine import captured

PATH = "model.layers.0.mlp.down_proj"


def errors(model, before, p=2.4, weight=1.0):
    """Σ weight · |ŵ − w|^p of every group of 16, in one layer."""
    now = model.get_submodule(PATH).weight
    return ((now - before).abs() ** p * weight).unflatten(1, (-1, 16)).sum(-1)


def rounded(algorithm, scheme, tokens=None):
    model = random_model("llama")
    w = model.get_submodule(PATH).weight.clone()
    x = captured(model, tokens, PATH).flatten(0, -2) if tokens is not None else None
    quantize(model, algorithm, scheme, tokens)
    return model, w, x


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("apart", [False, True])
def test_no_group_is_further_from_its_weights_than_on_the_whole_range(bits, apart):
    scheme = Scheme.of(wbits=bits, group_size=16)
    step = MSEClip(n_grid=10 if apart else 100, apart=apart)
    found, w, _ = rounded(Pipeline((step, RTN())), scheme)
    whole, w, _ = rounded(RTN(), scheme)
    assert (errors(found, w) <= errors(whole, w) * (1 + 1e-12)).all()
    assert (errors(found, w) < errors(whole, w)).any()


def test_weighted_by_their_inputs_squares_errors_move_to_channels_that_matter_less(tokens):
    scheme = Scheme.of(wbits=3, group_size=16)
    plain, w, x = rounded(Pipeline((MSEClip(p=2.0), RTN())), scheme, tokens)
    weighted, w, x = rounded(Pipeline((MSEClip(p=2.0, weighted=True), RTN())), scheme, tokens)
    power = x.square().mean(0)
    assert (errors(weighted, w, 2.0, power) <= errors(plain, w, 2.0, power) * (1 + 1e-12)).all()
    assert (errors(plain, w, 2.0) <= errors(weighted, w, 2.0) * (1 + 1e-12)).all()
    assert not torch.equal(errors(plain, w), errors(weighted, w))


def test_only_weighting_needs_data():
    assert not MSEClip().needs_data
    assert MSEClip(weighted=True).needs_data


def test_two_ends_of_a_symmetric_grid_are_refused():
    with pytest.raises(ValueError, match="apart=false"):
        MSEClip(apart=True).check(Scheme.of(wbits=4, weight_symmetric=True))
