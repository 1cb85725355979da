"""Statistics of calibration data, above all static ranges, however the data is cut into batches."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from qbench.calib.observers import Gram, observer_for
from qbench.calib.stream import first_inputs
from qbench.models.family import family_of
from qbench.quant.grid import choose_qparams, fake_quantize
from qbench.quant.spec import QuantSpec, RangeChoice

from .conftest import random_model

RANGES = get_args(RangeChoice)
STATIC = QuantSpec(8, symmetric=True, granularity="tensor", dynamic=False)


def data(n_samples: int = 6, seq_len: int = 32) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n_samples, seq_len, 16, generator=g, dtype=torch.float64)
    x[0, 3, 5], x[4, 1, 2] = 40.0, -25.0
    return x


def observed(spec: QuantSpec, *batches: Tensor, seq_len: int = 32, kept: Tensor | None = None) -> Tensor:
    observer = observer_for(spec, seq_len, kept)()
    for batch in batches:
        observer.update(batch)
    return observer.value


@pytest.mark.parametrize("range_", RANGES)
def test_a_range_does_not_depend_on_how_samples_are_batched(range_):
    spec, x = replace(STATIC, range=range_), data()
    whole = observed(spec, x)
    assert whole.shape == (2,)
    assert whole.dtype == torch.float64
    assert whole[0] < 0 < whole[1]
    for batches in (x.split(1), x.split(4), [x.flatten(0, 1)]):
        torch.testing.assert_close(observed(spec, *batches), whole)
    assert observed(spec, x.half()).dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_layers_that_flatten_their_input_have_the_samples_of_others(name, tokens):
    """OPT's feed-forward layers see (batch * seq_len, features)."""
    model, spec = random_model(name), replace(STATIC, range="average")
    family = family_of(model)
    found = {}
    for batch_size in (1, 4):
        observers = {link: observer_for(spec, tokens.shape[1])() for link in family.links}
        stream, kwargs = first_inputs(model, family, tokens, batch_size)
        layer = model.get_submodule(family.blocks)[0]
        for link, observer in observers.items():
            layer.get_submodule(link.sinks[0]).register_forward_pre_hook(
                lambda _, args, observer=observer: observer.update(args[0])
            )
        stream.through(layer, kwargs[0], torch.device("cpu"))
        found[batch_size] = [observer.value for observer in observers.values()]
        for module in layer.modules():
            module._forward_pre_hooks.clear()
    torch.testing.assert_close(found[1], found[4])


def test_the_average_is_over_samples_and_not_over_tokens():
    x = data()
    lo = torch.stack([sample.min() for sample in x]).mean()
    hi = torch.stack([sample.max() for sample in x]).mean()
    torch.testing.assert_close(observed(replace(STATIC, range="average"), *x.split(4)), torch.stack((lo, hi)))
    with pytest.raises(ValueError, match="33 rows are not whole samples of 32 tokens"):
        observed(replace(STATIC, range="average"), torch.zeros(33, 16))


def test_a_percentile_leaves_out_that_share_and_no_more():
    x = torch.linspace(-1, 3, 100_001, dtype=torch.float64)[:, None]
    lo, hi = observed(replace(STATIC, range="percentile"), x)
    bin_ = 4.0 / 2048
    assert abs(lo - (-1 + 4e-4)) <= bin_
    assert abs(hi - (3 - 4e-4)) <= bin_
    spikes = torch.cat([x, torch.full((5, 1), 1000.0, dtype=torch.float64)])
    assert observed(replace(STATIC, range="percentile"), spikes)[1] < 3 + 1024 / 2048 + 1e-9


@pytest.mark.parametrize("bits", [3, 4])
def test_a_range_that_is_searched_has_less_error_than_min_max(bits):
    x, error = data(), {}
    for range_ in ("minmax", "mse"):
        spec = replace(STATIC, bits=bits, range=range_)
        grid = choose_qparams(observed(spec, x), spec)
        error[range_] = (fake_quantize(x, spec, grid) - x).square().mean()
    assert error["mse"] < error["minmax"]


@pytest.mark.parametrize("range_", RANGES)
def test_channels_that_are_kept_have_no_part_in_the_range(range_):
    spec, x = replace(STATIC, range=range_), data()
    kept = torch.zeros(16, dtype=torch.bool)
    kept[[2, 5]] = True
    assert torch.equal(observed(spec, x, kept=kept), observed(spec, x[..., ~kept]))
    assert not torch.equal(observed(spec, x, kept=kept), observed(spec, x))


@pytest.mark.parametrize("n", [1, 63, 65, 513, 600])  # from one panel to nine, the last ones narrow
def test_a_gram_matrix_that_is_read_goes_on_as_if_it_were_not(n):
    x = torch.randn(90, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    read, unread = Gram(), Gram()
    for batch in x.split(40):
        read.update(batch)
        unread.update(batch)
        assert torch.equal(read.value, read.value.T)
    assert torch.equal(read.value, unread.value)
    magnitude = x.abs().T @ x.abs() / len(x)
    error = (read.value - x.T @ x / len(x)).abs()
    # Two sums of 90 products, of which one is rescaled twice.
    assert (error <= 2 * (90 + 4) * torch.finfo(torch.float64).eps * magnitude).all()
