"""GPTQ against Algorithm 1 of its paper, done naively."""

import itertools

import pytest
import torch

from qbench.algorithms.gptq import GPTQ
from qbench.quant.affine import fake_quantize
from qbench.quant.scheme import QuantSpec

from .reference import gptq as reference

N, SIZE = 48, 16


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and correlated inputs with outlier channels, in float64."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(20, N, generator=generator, dtype=torch.float64)
    mix = torch.randn(N, N, generator=generator, dtype=torch.float64)
    x = torch.randn(200, N, generator=generator, dtype=torch.float64) @ mix
    x[:, ::7] *= 5
    return w, x


@pytest.mark.parametrize("block_size", [1, 8, 13, 128])
@pytest.mark.parametrize(
    ("bits", "size", "act_order", "static_groups"),
    [
        c
        for c in itertools.product([2, 3, 4], [SIZE, N], [False, True], [False, True])
        if c[3] or not c[2] or c[1] == N
    ],
)
def test_gptq_equals_the_naive_algorithm(bits, size, act_order, static_groups, block_size):
    w, x = problem()
    spec = QuantSpec(bits, granularity="group", group_size=size)
    algorithm = GPTQ(act_order=act_order, static_groups=static_groups, block_size=block_size)
    ours = algorithm.round(w, x.T @ x / len(x), spec)
    naive = reference.gptq(w, x, bits, size, algorithm.damp, act_order, static_groups)
    # Both work in float64 on a Hessian with condition number below 1e4: grid points must be the same ones,
    # and differ by rounding of the scale alone.
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)


def test_gptq_beats_rounding_to_nearest_on_its_objective():
    w, x = problem()
    spec = QuantSpec(3, granularity="group", group_size=SIZE)
    error = [
        ((q - w) @ x.T).square().sum()
        for q in (GPTQ().round(w, x.T @ x / len(x), spec), fake_quantize(w, spec))
    ]
    assert error[0] < 0.7 * error[1]


def test_channels_that_are_never_active_become_zero():
    w, x = problem()
    x[:, 5] = 0
    q = GPTQ().round(w, x.T @ x / len(x), QuantSpec(4))
    assert (q[:, 5] == 0).all()
    assert torch.isfinite(q).all()


def test_a_hessian_that_is_not_positive_definite_is_refused():
    gram = -torch.eye(N, dtype=torch.float64)
    with pytest.raises(torch.linalg.LinAlgError, match=r"raise algo\.damp"):
        GPTQ().round(torch.randn(4, N, dtype=torch.float64), gram, QuantSpec(4))


def test_moving_groups_under_act_order_are_refused():
    from qbench.quant.scheme import Scheme

    with pytest.raises(ValueError, match="static_groups=true"):
        GPTQ(static_groups=False).check(Scheme.parse("w4a16g16"))
    GPTQ(static_groups=False).check(Scheme.parse("w4a16"))
