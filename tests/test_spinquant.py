"""SpinQuant: steps that stay on the manifold, and rotations that are applied as they were learned."""

import copy
import itertools

import pytest
import torch

from qbench.algorithms import spinquant
from qbench.algorithms.base import Pipeline
from qbench.algorithms.rtn import RTN
from qbench.algorithms.spinquant import SpinQuant, cayley_step, next_token_loss
from qbench.engine import quantize
from qbench.errors import Unsuitable
from qbench.models.attention import attention_spec
from qbench.models.learned_rotation import rotated
from qbench.models.rotate import fold_norms, is_rotated_online
from qbench.quant.hadamard import random_hadamard, random_orthogonal
from qbench.quant.scheme import Scheme

from .conftest import random_model
from .reference import spinquant as reference
from .test_laws import assert_same_function, logits

N = 24
EPS = torch.finfo(torch.float64).eps


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return random_orthogonal(N, generator), torch.randn(N, N, dtype=torch.float64, generator=generator)


def sure(model, factor=20.0):
    """The same model with larger logits, and text that it predicts well: its own choices."""
    model.lm_head.weight.mul_(factor)
    tokens = torch.arange(8)[:, None]
    for _ in range(23):
        tokens = torch.cat([tokens, logits(model, tokens)[:, -1:].argmax(-1)], 1)
    return model, tokens


@pytest.mark.parametrize("lr", [0.01, 1.5, 1e6])
def test_a_step_is_that_of_the_papers(lr):
    r, gradient = matrices()
    torch.testing.assert_close(
        cayley_step(r, gradient, lr), reference.cayley(r, gradient, lr), rtol=0, atol=N * EPS
    )


def test_steps_stay_orthogonal_and_go_down():
    """To the rotation nearest to a matrix A, which maximizes ⟨A, R⟩."""
    r, a = matrices()
    a *= (
        torch.linalg.det(a).sign() * torch.linalg.det(r).sign()
    )  # steps cannot turn a rotation into a reflection
    a[0] *= torch.linalg.det(a).sign() * torch.linalg.det(r).sign()
    heights = []
    for _ in range(500):
        heights.append(float((a * r).sum()))
        r = cayley_step(r, -a, 0.05)
    assert all(later >= earlier - N * EPS * abs(earlier) for earlier, later in itertools.pairwise(heights))
    assert (r @ r.T - torch.eye(N)).abs().max() <= 500 * EPS
    u, s, vt = torch.linalg.svd(a)
    assert heights[-1] == pytest.approx(float(s.sum()), rel=1e-4)
    assert (r - u @ vt).abs().max() <= 0.1


def test_without_quantization_no_rotation_is_better_than_another(model, tokens):
    """The gradient has no part along the manifold: the model's function does not depend on the rotations."""
    try:
        fold_norms(model)
    except NotImplementedError:
        pytest.skip("no residual stream to rotate")
    generator = torch.Generator().manual_seed(0)
    rotations = [random_hadamard(n, generator).requires_grad_() for n in (48, 12, 12)]
    residual, *values = rotations
    before = next_token_loss(model, tokens)
    with rotated(model, Scheme(), residual, values, quantize_weights=True):
        loss = next_token_loss(model, tokens)
        gradients = torch.autograd.grad(loss, rotations)
    # The residual stream goes through RMSNorm, and logits into the loss, in float32.
    assert abs(loss.item() - before.item()) <= 1e-6 * before.item()
    for r, gradient in zip(rotations, gradients, strict=True):
        along = gradient @ r.mT - r @ gradient.mT
        assert along.abs().max() <= 1e-4 * gradient.abs().max()


@pytest.mark.parametrize("scheme", ["w16a4", "w16a4kv4", "w16a16kv4"])
@pytest.mark.parametrize("name", ["llama-gqa-tied", "qwen3", "opt"])
def test_the_reported_loss_is_that_of_the_model_as_it_is_left(name, scheme, tokens):
    """The rotations are in the weights, values and online hooks, just as they were while they were learned."""
    model, scheme = random_model(name), Scheme.parse(scheme)
    quantized = quantize(model, Pipeline((SpinQuant(steps=2), RTN())), scheme, tokens)
    with torch.no_grad():
        loss = float(next_token_loss(model, tokens))
    # Float32 in norms and loss; of some 1e5 quantized numbers, one may stand so near to a border that it is rounded
    # the other way, which moves one of 186 predictions a little.
    assert loss == pytest.approx(quantized.report["spinquant"]["loss"][1], abs=1e-4)


@pytest.mark.parametrize("quantize_weights", [False, True])
def test_learning_lowers_the_loss_of_the_quantized_model(quantize_weights):
    model, tokens = sure(random_model("llama"))
    algorithm = SpinQuant(steps=10, quantize_weights=quantize_weights)
    before, after = algorithm.prepare(model, Scheme.parse("w3a3"), tokens)["spinquant"]["loss"]
    assert after < 0.9 * before


def test_a_loss_that_grows_is_an_error(monkeypatch):
    monkeypatch.setattr(spinquant, "cayley_step", lambda r, g, lr: cayley_step(r, -g, lr))
    model, tokens = sure(random_model("llama"))
    with pytest.raises(FloatingPointError, match=r"loss grew in 8 steps.*lower its lr"):
        SpinQuant(steps=8).prepare(model, Scheme.parse("w16a3"), tokens)


def test_a_loss_that_is_not_finite_is_an_error(llama, tokens):
    llama.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="in step 1; lower its lr"):
        SpinQuant(steps=1).prepare(llama, Scheme.parse("w16a4"), tokens)


def test_nothing_of_the_learning_is_left_in_the_model(model, tokens):
    before, fresh = logits(model, tokens), copy.deepcopy(model)
    try:
        SpinQuant(steps=1, lr=1e-9).prepare(model, Scheme.parse("w4a4kv4"), tokens)
    except NotImplementedError:
        pytest.skip("no residual stream to rotate")
    assert_same_function(model, tokens, before)
    assert not any(p.requires_grad for p in model.parameters())
    for (path, module), old in zip(model.named_modules(), fresh.modules(), strict=True):
        assert path.endswith("norm") or type(module) is type(old)
        assert "forward" not in vars(module)
        assert attention_spec(module) is None
        assert len(module._forward_pre_hooks) == is_rotated_online(module)


def test_there_must_be_something_to_learn_from():
    for scheme in ("w16a8", "w4a16kv4"):
        SpinQuant().check(Scheme.parse(scheme))
    SpinQuant(quantize_weights=True).check(Scheme.parse("w4a16"))
    for scheme in ("w4a16", "w16a16"):
        with pytest.raises(Unsuitable, match="nothing is quantized while it learns"):
            SpinQuant().check(Scheme.parse(scheme))


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"steps": 0}, {"batch_size": 0}], ids=str)
def test_hyperparameters_must_be_positive(wrong):
    with pytest.raises(ValueError, match="must be positive"):
        SpinQuant(**wrong)
