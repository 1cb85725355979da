"""QuIP against its algorithms with dense matrices, and the grid that its weights lie on in their own basis."""

import itertools

import pytest
import torch

from qbench.algorithms.base import Pipeline
from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.mse import MSEClip
from qbench.algorithms.quip import QuIP, rescaling
from qbench.engine import quantize
from qbench.errors import Unsuitable
from qbench.quant.basis import Basis
from qbench.quant.grid import grouped
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec

from .reference import quip as reference
from .test_gptq import SIZE, N, problem
from .test_laws import ListenBehind

EPS = torch.finfo(torch.float64).eps
ROWS = 20
SPECS = {
    "tensor": {"granularity": "tensor"},
    "row": {},
    "group": {"granularity": "group", "group_size": SIZE},
}


def bases(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Basis.random(ROWS, generator), Basis.random(N, generator)


def dense(basis):
    return reference.dense(*basis.factors, basis.order)


@pytest.mark.parametrize("n", [1, 7, 20, 48, 112])
def test_a_basis_is_orthogonal_and_its_product_is_fast(n):
    basis = Basis.random(n, torch.Generator().manual_seed(0))
    v, x = dense(basis), torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(v @ v.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=n * EPS)
    torch.testing.assert_close(basis.enter(x), x @ v.T, rtol=0, atol=n * EPS * 10)
    torch.testing.assert_close(basis.leave(basis.enter(x)), x, rtol=0, atol=n * EPS * 10)


@pytest.mark.parametrize(("bits", "name"), itertools.product([2, 3, 4], ["tensor", "row"]))
def test_quip_is_the_papers_algorithms(bits, name):
    w, x = problem()
    gram, (u, v) = x.T @ x / len(x), bases()
    ours = QuIP().round(w, gram, QuantSpec(bits, **SPECS[name]), (u, v))
    naive = reference.quip(w, gram, dense(u), dense(v), bits, 2.4, 0.01, per_row=name == "row")
    # LDLQ feeds errors on through factors of a Hessian with condition number below 1e4; codes must be the same.
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("bits", "name"), itertools.product([2, 3], SPECS))
def test_weights_lie_on_a_grid_in_their_own_basis(bits, name):
    """There, 2^b levels at equal distances, from -rho to rho times the root mean square of what shares a scale."""
    w, x = problem()
    gram, (u, v), spec = x.T @ x / len(x), bases(), QuantSpec(bits, **SPECS[name])
    d = rescaling(w, gram)
    before, after = (
        grouped(u.enter(v.enter(weight * d).mT).mT, spec)
        for weight in (w, QuIP().round(w, gram, spec, (u, v)))
    )
    half = 2.4 * before.square().mean(-1, keepdim=True).sqrt()
    codes = (after / half + 1) / 2 * (2**bits - 1)
    assert (codes - codes.round()).abs().max() <= 1e-9
    assert torch.equal(codes.round().unique(), torch.arange(2**bits, dtype=torch.float64))


def test_weights_and_inputs_become_even():
    """A weight and an input with outliers: the largest entries come near to those of Gaussian ones."""
    w, x = problem()
    w[3, 5], w[:, 7] = 40.0, 10.0
    u, v = Basis.random(ROWS, torch.Generator().manual_seed(0)), bases()[1]
    gram = x.T @ x / len(x)
    d = rescaling(w, gram)
    even = u.enter(v.enter(w * d).mT).mT
    assert even.abs().max() / even.square().mean().sqrt() < 0.5 * w.abs().max() / w.square().mean().sqrt()


def test_quip_beats_gptq_at_two_bits_where_weights_have_outliers():
    w, x = problem()
    w[3, 5], w[:, 7] = 40.0, 10.0
    gram = x.T @ x / len(x)
    error = [
        float((((q - w) @ gram) * (q - w)).sum())
        for q in (QuIP().round(w, gram, QuantSpec(2), bases()), GPTQ().round(w, gram, QuantSpec(2)))
    ]
    assert error[0] < error[1]


def test_every_layer_has_bases_of_its_own_and_they_come_from_the_seed(llama, tokens):
    listener = ListenBehind()
    quantize(llama, Pipeline((QuIP(), listener)), Scheme.parse("w2a16"), tokens)
    first = {
        (block.index, name): QuIP().bases(block, name)[1].factors[0][0, 0].item()
        for block in listener.heard
        for name in block.linears
    }
    assert len(set(first.values())) == len(first)
    block = listener.heard[0]
    again, other = (QuIP(seed=s).bases(block, "mlp.up_proj")[1].factors[0][0, 0].item() for s in (0, 1))
    assert again == first[0, "mlp.up_proj"] != other


@pytest.mark.parametrize(
    ("choice", "scales"),
    [({"weight_granularity": "tensor"}, 1), ({}, 112), ({"group_size": 16}, 112 * 3)],
    ids=str,
)
def test_what_is_stored_are_codes_scales_and_the_rescaling(choice, scales, llama, tokens):
    """Of the bases, nothing: they are made from a seed. The grid has no zero-points."""
    quantized = quantize(llama, QuIP(), Scheme.of(2, **choice), tokens)
    assert quantized.stored_bits["0.mlp.up_proj"] == pytest.approx(2 * 112 * 48 + 16 * scales)
    assert quantized.extra_bits == 16 * 2 * (6 * 48 + 112)


@pytest.mark.parametrize(
    "wrong", [{"weight_format": "e4m3", "wbits": 8}, {"scale_bits": 3}, {"wbits": 1}], ids=str
)
def test_grids_that_are_not_quips_are_refused(wrong):
    with pytest.raises(Unsuitable, match="QuIP has a grid of its own"):
        QuIP().check(Scheme.of(**{"wbits": 4} | wrong))


def test_ranges_of_another_basis_are_refused():
    with pytest.raises(Unsuitable, match="chooses its own grids"):
        Pipeline((MSEClip(), QuIP()))


def test_channels_that_are_never_active_do_no_harm():
    w, x = problem()
    x[:, 5], w[:, 9] = 0.0, 0.0
    q = QuIP().round(w, x.T @ x / len(x), QuantSpec(4), bases())
    assert torch.isfinite(q).all()
    live = torch.arange(N) != 5
    relative = ((q - w) @ x.T).square().sum() / (w @ x.T).square().sum()
    assert relative < 0.1
    assert (q - w)[:, live].abs().max() < w.abs().max()


@pytest.mark.parametrize("wrong", [{"rho": 0.0}, {"damp": 0.0}], ids=str)
def test_hyperparameters_must_be_positive(wrong):
    with pytest.raises(ValueError, match="must be positive"):
        QuIP(**wrong)
