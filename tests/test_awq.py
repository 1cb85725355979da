"""AWQ against brute force over the inputs themselves."""

import pytest
import torch

from qbench.algorithms.awq import AWQClip, AWQScale
from qbench.quant.scheme import QuantSpec

from .reference import awq as reference
from .test_gptq import SIZE, N, problem


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [SIZE, N])
def test_the_scale_is_the_best_of_the_grid(bits, size):
    w, x = problem(bits)
    spec = QuantSpec(bits, granularity="group", group_size=size)
    ours = AWQScale().search(w, x.T @ x / len(x), x.abs().mean(0), spec)
    torch.testing.assert_close(ours, reference.best_scale(w, x, bits, size, 20), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [SIZE, N])
def test_the_clip_is_the_best_of_the_grid(bits, size):
    w, x = problem(bits)
    spec = QuantSpec(bits, granularity="group", group_size=size)
    ours = AWQClip().clip(w, x.T @ x / len(x), spec)
    torch.testing.assert_close(ours, reference.best_clip(w, x, bits, size, 20, 0.5), rtol=1e-12, atol=0)


def test_clipping_is_as_symmetric_as_the_grid():
    w, x = problem()
    w += 1.0  # reaches further above zero than below
    symmetric = AWQClip().clip(w, x.T @ x, QuantSpec(2, symmetric=True))
    asymmetric = AWQClip().clip(w, x.T @ x, QuantSpec(2))
    # A symmetric range is clipped at the far end first: the near end must be untouched wherever it lies inside.
    assert (symmetric.amax(1) < w.amax(1)).any()
    inside = w.amin(1) > -symmetric.amax(1)
    assert torch.equal(symmetric.amin(1)[inside], w.amin(1)[inside])
    assert (asymmetric.amin(1) > w.amin(1))[inside].any(), "an asymmetric one is clipped at both ends"
