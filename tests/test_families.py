"""Every family, by its smallest random model: what is quantized, and that no edit changes what it computes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qbench.algorithms.awq import AWQScale
from qbench.algorithms.awq_clip import AWQClip
from qbench.algorithms.base import Pipeline
from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.quarot import QuaRot
from qbench.algorithms.rtn import RTN
from qbench.algorithms.smoothquant import SmoothQuant
from qbench.calib.block import Block
from qbench.engine import quantize
from qbench.errors import Unsuitable
from qbench.models.discover import discover
from qbench.models.families import DESCRIBED
from qbench.models.family import family_of
from qbench.models.fit import check_fit
from qbench.quant.grid import grouped
from qbench.quant.scheme import Scheme

from .families import SIZES, family_model
from .test_laws import ALL, Keep, accepted, as_pipeline, assert_same_function, logits
from .test_laws import name as name_of

GOLDEN = json.loads((Path(__file__).parent / "families.json").read_text())
# Steps as few and as short as the models are small.
GENTLE = {"OmniQuant": {"epochs": 1, "lwc_lr": 1e-4, "let_lr": 1e-5}}
ALGORITHMS = [replace(a, **GENTLE.get(name_of(a), {})) for a in ALL]

every = pytest.mark.parametrize("name", SIZES)


@pytest.fixture
def tokens():
    return torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(1))


def blocks_of(model):
    return model.get_submodule(family_of(model).blocks)


def has_gain(block, source):
    return source is not None and getattr(block.get_submodule(source), "weight", None) is not None


def test_every_described_family_is_tested():
    assert {name.partition(":")[0] for name in SIZES} == set(DESCRIBED)
    assert set(GOLDEN) == set(SIZES)


def layers_of(model):
    """By block: what is quantized, what is skipped and why, and what a norm or a layer cannot take a scale for."""
    family = family_of(model)
    return [
        {
            "quantized": list(family.linears(block)),
            "skipped": family.skipped(block),
            "unlinked": [list(k.sinks) for k in family.scalings(block) if not has_gain(block, k.source)],
        }
        for block in blocks_of(model)
    ]


@every
def test_quantized_and_skipped_layers_are_those_of_the_golden_file(name):
    """`python -m tests.test_families` writes the file anew; look at what it changes."""
    assert layers_of(family_model(name)) == GOLDEN[name]


@every
def test_a_scale_moved_at_any_link_leaves_the_function_unchanged(name, tokens):
    model, generator = family_model(name), torch.Generator().manual_seed(0)
    before, moved = logits(model, tokens), 0
    for index, layer in enumerate(blocks_of(model)):
        block = Block(index, layer, family_of(model), None, {}, torch.device("cpu"))
        for link in filter(block.scalable, block.scalings):
            n = block.linear(link.sinks[0]).in_features
            block.migrate(link, 0.5 + 1.5 * torch.rand(n, generator=generator, dtype=torch.float64))
            moved += 1
    assert moved
    assert_same_function(model, tokens, before)


@every
@pytest.mark.parametrize("outlier", [0.0, 3000.0])
def test_discovery_finds_what_is_described(name, outlier):
    """Next to one channel that is large in the whole residual stream, too."""
    if outlier and name == "olmo:clipped":
        pytest.skip("next to it all else is too small to be clipped, which no trial can show")
    model = family_model(name)
    model.get_submodule(family_of(model).embeddings[0]).weight[:, 5] += outlier
    known, found = family_of(model), discover(model)
    assert (found.blocks, found.head, found.embeddings[0]) == (known.blocks, known.head, known.embeddings[0])
    assert found.returns_tuple == known.returns_tuple
    if known.value is not None:
        assert (found.value, found.attention_out) == (known.value, known.attention_out)
        assert found.attention == known.attention
    for block in blocks_of(model):
        assert found.linears(block) == known.linears(block)
        described = {
            replace(k, source=k.source if has_gain(block, k.source) else None) for k in known.scalings(block)
        }
        assert {plain(k) for k in found.scalings(block)} == {plain(k) for k in described}


def plain(link):
    """A link without what may be told in several ways: where experts are observed, the order of what follows a norm."""
    return link.source, link.part if link.source else "all", link.sinks, frozenset(link.also)


@every
@pytest.mark.parametrize("kvbits", [16, 4])
def test_the_main_methods_run_from_end_to_end(name, kvbits, tokens):
    """Or refuse, saying why."""
    methods = {
        "rtn": (Pipeline((RTN(),)), (4, 16)),
        "gptq": (Pipeline((GPTQ(),)), (4, 16)),
        "awq": (Pipeline((AWQScale(), AWQClip(), RTN())), (4, 16)),
        "smoothquant": (Pipeline((SmoothQuant(), RTN())), (8, 8)),
        "quarot": (Pipeline((QuaRot(), RTN())), (4, 4)),
    }
    before = logits(family_model(name), tokens)
    for method, (algorithm, (wbits, abits)) in methods.items():
        model = family_model(name)
        scheme = Scheme.of(wbits, abits, kvbits, 8 if abits == 16 else None)
        try:
            check_fit(model, scheme)
            result = quantize(model, algorithm, scheme, tokens)
        except (Unsuitable, NotImplementedError) as refusal:
            if not refuses(name, method, kvbits, str(refusal)):
                raise
            continue
        after = logits(model, tokens)
        assert torch.isfinite(after).all()
        assert not torch.equal(after, before)
        if kvbits < 16:
            other = family_model(name)
            quantize(other, algorithm, replace(scheme, kv=None), tokens)
            assert not torch.equal(logits(other, tokens), after), "the cache is not quantized"
        assert len(result.stored_bits) == sum(len(part["quantized"]) for part in GOLDEN[name])


def refuses(name, method, kvbits, message):
    """Whether a refusal is one that the architecture gives a reason for."""
    family = family_of(family_model(name))
    if kvbits < 16 and family.attention == "none":
        return "no attention" in message
    if method == "quarot":
        return family.final_norm is None and "cannot be rotated" in message
    block = blocks_of(family_model(name))[0]
    return method == "smoothquant" and not family.norm_links(block) and "no norm" in message


@pytest.mark.slow
@every
@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.kind == "transform"], ids=name_of)
def test_a_transform_leaves_the_function_of_every_family_unchanged(name, algorithm, tokens, monkeypatch):
    model = family_model(name)
    before = logits(model, tokens)
    monkeypatch.setattr(
        "qbench.calib.activations.quantize_input", lambda *_: None
    )  # the law is about weights
    try:
        quantize(model, Pipeline((algorithm, Keep())), accepted(algorithm, "w3a16g8", "w3a8g8"), tokens)
    except NotImplementedError as refusal:
        pytest.skip(f"refused: {refusal}")
    assert_same_function(model, tokens, before)


@pytest.mark.slow
@every
@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.kind != "transform"], ids=name_of)
def test_every_other_algorithm_ends_on_the_grid_in_every_family(name, algorithm, tokens):
    model, scheme = family_model(name), accepted(algorithm, "w3a8g8", "w3a16g8", "w3a16")
    before = logits(model, tokens)
    try:
        result = quantize(model, as_pipeline(algorithm), scheme, tokens)
    except NotImplementedError as refusal:
        pytest.skip(f"refused: {refusal}")
    assert torch.isfinite(logits(model, tokens)).all()
    assert not torch.equal(logits(model, tokens), before)
    if algorithm.kind != "round" or not algorithm.on_grid or not algorithm.uses_kept:
        return
    family = family_of(model)
    for index, block in enumerate(blocks_of(model)):
        if "kept" in str(result.reports[index]):
            continue
        for layer in family.linears(block):
            weight = block.get_submodule(layer).weight
            for g in grouped(weight, scheme.weight).flatten(0, 1):
                assert len(torch.unique(g)) <= 2**scheme.weight.bits, (index, layer)


if __name__ == "__main__":
    made = {name: layers_of(family_model(name)) for name in SIZES}
    (Path(__file__).parent / "families.json").write_text(json.dumps(made, indent=1) + "\n")
