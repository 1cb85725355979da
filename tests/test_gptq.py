"""GPTQ against Algorithm 1 of its paper, done naively."""

import itertools

import pytest
import torch

from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.rtn import RTN
from qbench.calib.observers import Gram
from qbench.engine import quantize
from qbench.quant import factor
from qbench.quant.factor import inverse_factor
from qbench.quant.grid import fake_quantize
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec

from .conftest import random_model
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


def some_kept(which: str) -> torch.Tensor:
    """Three columns of one group and one of another, one weight in ten, or both."""
    kept = torch.rand(20, N, generator=torch.Generator().manual_seed(2)) < (0 if which == "columns" else 0.1)
    if which != "weights":
        kept[:, [2, 3, 7, 30]] = True
    return kept


@pytest.mark.parametrize("block_size", [1, 13, 128])
@pytest.mark.parametrize(("act_order", "static_groups"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("which", ["columns", "weights", "both"])
def test_gptq_with_what_is_kept_equals_the_naive_algorithm(which, act_order, static_groups, block_size):
    w, x = problem()
    kept = some_kept(which)
    spec = QuantSpec(3, granularity="group", group_size=SIZE)
    algorithm = GPTQ(act_order=act_order, static_groups=static_groups, block_size=block_size)
    ours = algorithm.round(w, x.T @ x / len(x), spec, kept=kept)
    naive = reference.gptq(w, x, 3, SIZE, algorithm.damp, act_order, static_groups, kept)
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("which", ["columns", "weights", "both"])
def test_what_is_kept_lowers_the_error_and_the_rest_is_on_its_grid(which, static_groups):
    w, x = problem()
    kept, spec = some_kept(which), QuantSpec(3, granularity="group", group_size=SIZE)
    algorithm = GPTQ(act_order=False, static_groups=static_groups)
    q, whole = (algorithm.round(w, x.T @ x / len(x), spec, kept=k) for k in (kept, None))
    assert ((q - w) @ x.T).square().sum() < ((whole - w) @ x.T).square().sum()
    for row, mask in zip(q.reshape(-1, SIZE), kept.reshape(-1, SIZE), strict=True):
        assert len(torch.unique(row[~mask])) <= 2**3


def test_what_is_kept_of_a_channel_that_is_never_active_stays_as_it_is():
    w, x = problem()
    x[:, 5] = 0
    kept = torch.zeros_like(w, dtype=torch.bool)
    kept[3:, 5] = True
    q = GPTQ().round(w, x.T @ x / len(x), QuantSpec(4), kept=kept)
    assert torch.equal(q[3:, 5], w[3:, 5])
    assert (q[:3, 5] == 0).all()


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
    with pytest.raises(ValueError, match="static_groups=true"):
        GPTQ(static_groups=False).check(Scheme.parse("w4a16g16"))
    GPTQ(static_groups=False).check(Scheme.parse("w4a16"))


@pytest.mark.parametrize(
    "scheme",
    [
        {"weight_granularity": "tensor"},
        {"weight_granularity": "block", "group_size": 16},
        {"group_size": 16, "scale_bits": 3, "scale_group": 16},
        {"weight_format": "nvfp4", "weight_symmetric": True},
        {"group_size": 16},
    ],
    ids=str,
)
def test_layers_with_one_input_share_no_scale(scheme, tokens):
    """The layers of 48 and of 24 rows are rounded as one tall weight only where that makes no difference."""

    class Alone(RTN):
        needs_data = True

        def process(self, block):
            for link, (gram,) in block.observe(Gram, links=block.links[:1]).items():
                for layer in link.sinks:
                    weight = block.linear(layer).weight
                    expected[block.index, layer] = GPTQ().round(
                        weight.clone(), gram, block.weight_spec(layer)
                    )

    expected, scheme = {}, Scheme.of(4, **scheme)
    quantize(random_model("llama-gqa-tied"), Alone(), scheme, tokens)
    model = random_model("llama-gqa-tied")
    quantize(model, GPTQ(), scheme, tokens)
    for layer in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        ours = model.model.layers[0].get_submodule(layer).weight
        torch.testing.assert_close(ours, expected[0, layer], rtol=0, atol=1e-12)


def gram_of(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A Gram matrix of twice as many tokens as inputs, a few of which are outliers, and a random order."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(2 * n, n, generator=generator, dtype=torch.float64)
    x[:, ::7] *= 5
    return x.T @ x / len(x), torch.randperm(n, generator=generator)


@pytest.mark.parametrize(
    ("n", "width"),
    [(1, 16), (15, 16), (16, 16), (17, 16), (48, 16), (100, 16), (factor.WIDTH + 1, factor.WIDTH)],
)
def test_the_factor_in_blocks_is_that_of_the_whole_inverse(n, width, monkeypatch):
    monkeypatch.setattr(factor, "WIDTH", width)
    gram, order = gram_of(n)
    before = gram.clone()
    found = inverse_factor(gram, order, damp=0.01)
    assert torch.equal(gram, before)
    assert torch.equal(found, found.triu())
    damped = gram[order][:, order] + 0.01 * gram.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    # Either is exact for a matrix within n eps of the true one, relatively, which the condition number multiplies.
    bound = 2 * n * torch.finfo(torch.float64).eps * torch.linalg.cond(damped)
    assert (found - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("width", [16, 64])
def test_to_the_factor_channels_that_are_never_active_have_a_mean_square_of_one(width, monkeypatch):
    monkeypatch.setattr(factor, "WIDTH", width)
    gram, order = gram_of(40)
    gram[[3, 17, 39]] = 0
    gram[:, [3, 17, 39]] = 0
    filled = gram + torch.diag((gram.diagonal() == 0).double())
    assert torch.equal(inverse_factor(gram, order, 0.01), inverse_factor(filled, order, 0.01))


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("channel", [0, 20, 39])
def test_the_minor_that_is_not_positive_is_named(channel, width, monkeypatch):
    monkeypatch.setattr(factor, "WIDTH", width)
    gram = torch.eye(40)
    gram[channel, channel] = -1
    with pytest.raises(torch.linalg.LinAlgError, match=rf"of 40 inputs .* \(minor {40 - channel}\)"):
        inverse_factor(gram, torch.arange(40), 0.01)
