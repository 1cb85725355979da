"""Laws that hold for every algorithm. A new algorithm is picked up without touching this file."""

import copy
import importlib
import pkgutil
from dataclasses import dataclass, field, replace

import pytest
import torch

from qbench import algorithms
from qbench.algorithms.base import Algorithm, Pipeline
from qbench.algorithms.rtn import RTN
from qbench.deploy.layers import layers_of
from qbench.engine import quantize
from qbench.errors import Unsuitable
from qbench.models.family import family_of
from qbench.quant.codes import decoded
from qbench.quant.grid import choose_qparams, grouped
from qbench.quant.mixed import quantize_mixed
from qbench.quant.scheme import Scheme

from .conftest import random_model

# What defaults cannot show on models as small as these, or would show slowly.
QUICK = {
    "OWQ": {"extra_bits": 1.0},  # a tenth of a bit does not pay for one channel of each layer
    "AdaDim": {"compensate": True},  # there may be no layer that gains by the other axis
    "AutoRound": {"steps": 20},
    "LKD": {"steps": 10, "lr": 1e-4},
    "NormTweaking": {"lr": 1e-5},  # of the paper; one step is a sample of 32 tokens
    "OmniQuant": {"epochs": 3},
    "PercentileSmooth": {"share": 0.05},  # of few channels, none is beyond the percentile
    "SpinQuant": {
        "steps": 3,
        "online": False,
    },  # the zeros behind OPT's ReLU are on any grid until they are rotated
    "TesseraQ": {"steps": 2, "lr": 0.1, "scale_lr": 0.01},
}

ROUNDS_SCALES = {"DGQ"}  # a group's scale is the nearest multiple of its row's, which may be larger


def discover() -> list[Algorithm]:
    """Every algorithm in the package, with its default hyperparameters, or those of `QUICK`."""
    for module in pkgutil.iter_modules(algorithms.__path__, "qbench.algorithms."):
        importlib.import_module(module.name)
    found = [c for c in Algorithm.__subclasses__() if c.__module__.startswith("qbench.")]
    left_out = {"Pipeline", "FloatingPoint"}
    return [c(**QUICK.get(c.__name__, {})) for c in found if c.__name__ not in left_out]


def name(algorithm: Algorithm) -> str:
    return type(algorithm).__name__


ALL = discover()
# RMSNorm computes in float32 whatever the dtype; relative to the largest logit, over two blocks.
TOLERANCE = 1e-5


class Keep(RTN):
    """Stands in for a rounder: does nothing."""

    def process(self, block):
        pass


def as_pipeline(algorithm: Algorithm) -> Algorithm:
    if algorithm.kind == "round":
        return algorithm
    return Pipeline((RTN(), algorithm) if algorithm.kind == "tune" else (algorithm, RTN()))


def accepted(algorithm: Algorithm, *schemes: str) -> Scheme:
    """The first of the schemes, then of the same with real zero-points, that the algorithm has something to do for."""
    parsed = [Scheme.parse(text) for text in schemes]
    for scheme in (*parsed, *(replace(s, weight=replace(s.weight, real_zero=True)) for s in parsed)):
        try:
            algorithm.check(scheme)
        except ValueError:
            continue
        return scheme
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
def test_a_transform_leaves_the_function_unchanged_whatever_the_scheme(algorithm, model, tokens, monkeypatch):
    before = logits(model, tokens)
    monkeypatch.setattr(
        "qbench.calib.activations.quantize_input", lambda *_: None
    )  # the law is about weights
    quantize_or_skip(model, Pipeline((algorithm, Keep())), accepted(algorithm, "w3a16g16", "w3a8g16"), tokens)
    assert_same_function(model, tokens, before)


@dataclass(frozen=True)
class Listen(Keep):
    """Hears what grids were chosen, and what is kept."""

    heard: list = field(default_factory=list)

    def process(self, block):
        self.heard.append(block)


@dataclass(frozen=True)
class ListenBehind(Listen):
    """Hears it after the rounding."""

    kind = "tune"


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "scheme", [{"wbits": 4}, {"wbits": 3, "group_size": 16}, {"wbits": 2, "group_size": 16}], ids=str
)
@pytest.mark.parametrize("algorithm", [a for a in of_kind("round", "allocate") if a.on_grid], ids=name)
def test_a_rounder_leaves_every_weight_on_the_grid(algorithm, scheme, symmetric, model, tokens):
    scheme = Scheme.of(**scheme, weight_symmetric=symmetric)
    listener = ListenBehind()
    rounder = () if algorithm.kind == "round" else (RTN(),)
    quantize(model, Pipeline((algorithm, *rounder, listener)), scheme, tokens)
    for block in listener.heard:
        for layer, linear in block.linears.items():
            rounded = ~block.kept.get(layer, torch.zeros(linear.in_features)).bool().expand_as(linear.weight)
            groups, masks = (grouped(x, scheme.weight) for x in (linear.weight, rounded))
            bits = block.group_bits.get(layer, torch.tensor([scheme.weight.bits])).expand(groups.shape[:-1])
            for g, mask, b in zip(*(x.flatten(0, 1) for x in (groups, masks, bits)), strict=True):
                levels = len(torch.unique(g[mask]))
                assert levels <= 2**b, f"{layer} has {levels} levels in {b} bits"
            if layer not in block.report.get("per_input", ()):
                again = quantize_mixed(
                    linear.weight.where(rounded, 0.0),
                    scheme.weight,
                    block.group_bits.get(layer),
                    block.grids[layer],
                )
                assert torch.equal(again[rounded], linear.weight[rounded]), f"{layer} is on another grid"


@pytest.mark.parametrize(
    "scheme", [{"wbits": 8, "weight_granularity": "tensor"}, {"wbits": 4, "weight_format": "nvfp4"}], ids=str
)
@pytest.mark.parametrize("algorithm", of_kind("round", "clip"), ids=name)
def test_an_algorithm_leaves_codes_of_one_grid_or_says_what_it_mixes_in(algorithm, scheme, llama, tokens):
    scheme, pipeline, family = Scheme.of(**scheme), as_pipeline(algorithm), family_of(llama)
    if pipeline.mixes:
        return

    def deliver(finished):
        for layer in layers_of(finished, family.blocks, family.linears(finished.layer), scheme):
            assert torch.equal(
                decoded(layer.codes(), layer.grid, layer.spec, layer.weight.dtype), layer.weight
            )

    try:
        pipeline.check(scheme)
        quantize(llama, pipeline, scheme, tokens, deliver=deliver)
    except (Unsuitable, FloatingPointError) as refusal:  # or it diverges on so small a model
        pytest.skip(f"refused: {refusal}")


@pytest.mark.parametrize("algorithm", of_kind("select"), ids=name)
def test_a_selection_marks_few_channels_and_changes_no_weight(algorithm, model, tokens):
    before = copy.deepcopy(model.state_dict())
    listener = Listen()
    scheme = accepted(algorithm, "w3a16g16", "w3a8g16")
    quantize(model, Pipeline((algorithm, listener)), scheme, tokens)
    marked = 0
    for block in listener.heard:
        for layer, kept in block.kept.items():
            assert kept.dtype == torch.bool
            assert kept.shape == (block.linear(layer).in_features,)
            assert kept.float().mean() < 0.25
            marked += int(kept.sum())
    assert marked
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("algorithm", of_kind("clip"), ids=name)
def test_clipping_never_widens_a_range(algorithm, model, tokens):
    scheme = accepted(algorithm, "w3a16g16", "w3a16")
    listener = Listen()
    quantize(model, Pipeline((algorithm, listener)), scheme, tokens)
    chosen = 0
    for block in listener.heard:
        for layer, grid in block.grids.items():
            whole = choose_qparams(block.linear(layer).weight, scheme.weight)
            if name(algorithm) not in ROUNDS_SCALES:
                assert (grid.scale <= whole.scale * (1 + 1e-6)).all()
            chosen += int(((grid.scale != whole.scale) | (grid.zero != whole.zero)).sum())
    assert chosen


@pytest.mark.parametrize("algorithm", [a for a in ALL if a.needs_data], ids=name)
def test_calibrating_helps_on_the_calibration_data(algorithm, model, tokens):
    scheme = accepted(algorithm, "w3a16g16", "w4a4")
    sourceless = any(link.source is None for link in family_of(model).links)
    if sourceless and algorithm.kind in ("transform", "select"):
        pytest.skip(
            "half of the layers have inputs without outliers in this variant, and their noise decides"
        )
    baseline = copy.deepcopy(model)
    worse = quantize(baseline, ObservingRTN(), scheme, tokens)
    better = quantize_or_skip(model, as_pipeline(algorithm), scheme, tokens)
    assert better.errors[0] < worse.errors[0] or (
        algorithm.kind == "allocate" and better.errors[0] == worse.errors[0]  # where all groups are alike
    )


class ObservingRTN(RTN):
    """RTN that asks for data, so that the engine reports its block errors."""

    needs_data = True


@pytest.mark.parametrize("algorithm", ALL, ids=name)
def test_equal_inputs_give_equal_weights(algorithm, llama, tokens):
    twin = copy.deepcopy(llama)
    for m in (llama, twin):
        quantize(m, as_pipeline(algorithm), accepted(algorithm, "w4a8", "w4a8g16"), tokens)
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


@pytest.mark.parametrize("algorithm", [a for a in ALL if a.kind != "transform"], ids=name)
def test_a_block_in_floating_point_is_left_alone(algorithm, tokens):
    """In float32, where a loss that should be nothing is not quite zero."""
    scheme = replace(accepted(algorithm, "w4a8", "w4a8g16"), overrides=(("0.*", Scheme()),))
    model = random_model("llama").float()
    before = copy.deepcopy(model.model.layers[0].state_dict())
    quantize(model, as_pipeline(algorithm), scheme, tokens)
    after = model.model.layers[0].state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(p, after[key]) for key, p in before.items())


@pytest.mark.parametrize("algorithm", ALL, ids=name)
def test_hyperparameters_are_the_dataclass_fields(algorithm):
    identity = algorithm.identity()
    assert identity["name"] == name(algorithm)
    assert {"kind", "needs_data"}.isdisjoint(identity)
