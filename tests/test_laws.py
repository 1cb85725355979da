"""Laws that hold for every algorithm. A new algorithm is picked up without touching this file."""

import copy
import importlib
import pkgutil

import pytest
import torch

from qbench import algorithms
from qbench.algorithms.base import Algorithm, Pipeline
from qbench.algorithms.fp import FloatingPoint
from qbench.algorithms.rtn import RTN
from qbench.engine import quantize
from qbench.models.family import family_of
from qbench.quant.affine import grouped
from qbench.quant.scheme import Scheme


def discover() -> list[Algorithm]:
    """Every algorithm in the package, with its default hyperparameters."""
    for module in pkgutil.iter_modules(algorithms.__path__, "qbench.algorithms."):
        importlib.import_module(module.name)
    found = [c for c in Algorithm.__subclasses__() if c.__module__.startswith("qbench.")]
    return [c() for c in found if c not in (Pipeline, FloatingPoint)]


def name(algorithm: Algorithm) -> str:
    return type(algorithm).__name__


ALL = discover()
# RMSNorm computes in float32 whatever the dtype; relative to the largest logit, over two blocks.
TOLERANCE = 1e-5


class Keep(RTN):
    """Stands in for a rounder: does nothing."""

    def process(self, block, scheme):
        pass


def as_pipeline(algorithm: Algorithm) -> Algorithm:
    return algorithm if algorithm.kind == "round" else Pipeline((algorithm, RTN()))


def accepted(algorithm: Algorithm, *schemes: str) -> Scheme:
    """The first of the schemes that the algorithm has something to do for."""
    for text in schemes:
        try:
            algorithm.check(Scheme.parse(text))
        except ValueError:
            continue
        return Scheme.parse(text)
    raise AssertionError(f"{name(algorithm)} accepts none of {schemes}")


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def assert_same_function(model, tokens, before):
    torch.testing.assert_close(
        logits(model, tokens), before, rtol=0, atol=TOLERANCE * before.abs().max().item()
    )


def quantize_or_skip(model, *arguments):
    """Quantize, or skip where the algorithm says that it does not cover this architecture."""
    try:
        return quantize(model, *arguments)
    except NotImplementedError as refusal:
        pytest.skip(f"refused: {refusal}")


def of_kind(*kinds: str) -> list[Algorithm]:
    return [a for a in ALL if a.kind in kinds]


def test_all_algorithms_of_this_release_are_found():
    assert {name(a) for a in ALL} >= {"RTN", "GPTQ", "AWQScale", "AWQClip", "SmoothQuant"}


@pytest.mark.parametrize("algorithm", of_kind("round", "clip"), ids=name)
def test_an_unquantized_scheme_leaves_the_function_unchanged(algorithm, model, tokens):
    before = logits(model, tokens)
    quantize(model, as_pipeline(algorithm), Scheme(), tokens)
    assert torch.equal(logits(model, tokens), before)


@pytest.mark.parametrize("algorithm", of_kind("transform"), ids=name)
def test_a_transform_leaves_the_function_unchanged_whatever_the_scheme(algorithm, model, tokens):
    before = logits(model, tokens)
    quantize_or_skip(model, Pipeline((algorithm, Keep())), accepted(algorithm, "w3a16g16", "w3a8g16"), tokens)
    for module in model.modules():
        module._forward_pre_hooks.clear()  # the engine's activation quantizers: the law is about weights
    assert_same_function(model, tokens, before)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "scheme", [{"wbits": 4}, {"wbits": 3, "group_size": 16}, {"wbits": 2, "group_size": 16}], ids=str
)
@pytest.mark.parametrize("algorithm", of_kind("round"), ids=name)
def test_a_rounder_leaves_every_weight_on_the_grid(algorithm, scheme, symmetric, model, tokens):
    scheme = Scheme.of(**scheme, weight_symmetric=symmetric)
    quantize(model, algorithm, scheme, tokens)
    family = family_of(model)
    for layer in model.get_submodule(family.blocks):
        for linear in family.linears:
            groups = grouped(layer.get_submodule(linear).weight, scheme.weight).flatten(0, -2)
            levels = max(len(torch.unique(g)) for g in groups)
            assert levels <= 2**scheme.weight.bits, f"{linear} has {levels} levels"


@pytest.mark.parametrize("algorithm", of_kind("clip"), ids=name)
def test_clipping_never_widens_a_range(algorithm, model, tokens):
    before = {n: p.clone() for n, p in model.named_parameters()}
    quantize(model, Pipeline((algorithm, Keep())), Scheme.parse("w3a16g16"), tokens)
    changed = 0
    for n, p in model.named_parameters():
        assert p.abs().max() <= before[n].abs().max()
        changed += not torch.equal(p, before[n])
    assert changed


@pytest.mark.parametrize("algorithm", [a for a in ALL if a.needs_data], ids=name)
def test_calibrating_helps_on_the_calibration_data(algorithm, model, tokens):
    scheme = accepted(algorithm, "w3a16g16", "w4a4")
    if algorithm.kind == "transform" and any(link.source is None for link in family_of(model).links):
        pytest.skip("half of the layers cannot be transformed in this variant, and their noise decides")
    baseline = copy.deepcopy(model)
    worse = quantize(baseline, ObservingRTN(), scheme, tokens)
    better = quantize_or_skip(model, as_pipeline(algorithm), scheme, tokens)
    assert better[0] < worse[0]


class ObservingRTN(RTN):
    """RTN that asks for data, so that the engine reports its block errors."""

    needs_data = True


@pytest.mark.parametrize("algorithm", ALL, ids=name)
def test_equal_inputs_give_equal_weights(algorithm, llama, tokens):
    twin = copy.deepcopy(llama)
    for m in (llama, twin):
        quantize(m, as_pipeline(algorithm), Scheme.parse("w4a8"), tokens)
    assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("algorithm", [a for a in ALL if a.needs_data], ids=name)
def test_the_batch_size_does_not_matter(algorithm, llama, tokens):
    """Statistics are means over tokens, so batches only change the order of summation (float64: ~1e-12)."""
    twin = copy.deepcopy(llama)
    scheme = accepted(algorithm, "w4a16g16", "w4a8g16")
    for m, batch_size in ((llama, 6), (twin, 1)):
        quantize(m, as_pipeline(algorithm), scheme, tokens, batch_size=batch_size)
    same = [
        (a - b).abs().max() <= 1e-9 * a.abs().max()
        for a, b in zip(llama.parameters(), twin.parameters(), strict=True)
    ]
    assert all(same)


@pytest.mark.parametrize("algorithm", ALL, ids=name)
def test_hyperparameters_are_the_dataclass_fields(algorithm):
    identity = algorithm.identity()
    assert identity["name"] == name(algorithm)
    assert {"kind", "needs_data"}.isdisjoint(identity)
