"""GPTQ's and AWQ's layouts hold the weight that was evaluated: its codes, and its scales in float16."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from qbench.algorithms.base import Pipeline
from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.owq import OWQ
from qbench.algorithms.quip import QuIP
from qbench.algorithms.rtn import RTN
from qbench.algorithms.sba import SBA
from qbench.algorithms.slimllm import SQC
from qbench.deploy.formats import gptq as module
from qbench.deploy.formats.awq import AWQLayout
from qbench.deploy.formats.format import Source
from qbench.deploy.formats.gptq import GPTQLayout
from qbench.deploy.formats.gptqmodel import parts_of
from qbench.deploy.layers import QuantizedLayer, layers_of
from qbench.deploy.writer import Writer
from qbench.engine import quantize
from qbench.errors import Unsuitable
from qbench.models.family import family_of
from qbench.models.layout import hub_names
from qbench.models.load import ModelRef
from qbench.quant.codes import decoded
from qbench.quant.grid import choose_qparams, fake_quantize
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec
from tests.reference import packing

LAYOUTS = {kind.name: kind for kind in (GPTQLayout, AWQLayout)}
LIBRARY = find_spec("gptqmodel") is not None and find_spec("optimum") is not None
needs_library = pytest.mark.skipif(
    not LIBRARY, reason="gptqmodel packs these layouts: pip install 'qbench[gptqmodel]'"
)
CASES = [
    (name, QuantSpec(bits, symmetric, "group" if size else "row", size))
    for name, kind in LAYOUTS.items()
    for bits in kind.widths
    for symmetric in (False, True)
    for size in (None, 32)
]
EPS = torch.finfo(torch.float16).eps / 2


def named(case: object) -> str:
    return str(Scheme(case)) if isinstance(case, QuantSpec) else str(case)


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    return AutoModelForCausalLM.from_config(config).half().float().eval().requires_grad_(False)


def layer(spec: QuantSpec) -> QuantizedLayer:
    """A layer on its grid, one row of which has no negative weight, so that its zero-point is 0."""
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(3)) * 0.05
    w[0].abs_()
    grid = choose_qparams(w, spec)
    return QuantizedLayer("model.layers.0.mlp.up_proj", fake_quantize(w, spec, grid), spec, grid)


def layout(name: str, scheme: Scheme, dtype: torch.dtype = torch.float16, algorithm=None):
    return LAYOUTS[name](Source(tiny(), algorithm or RTN(), scheme, dtype))


@pytest.mark.parametrize(("name", "spec"), CASES, ids=named)
def test_a_weight_is_stored_but_for_rounding_to_float16(name, spec):
    made, given = layout(name, Scheme(spec)), layer(spec)
    wrong = (made.stored(given).double() - given.weight.double()).abs()
    # The scale and its product with a step are each rounded once, by half a unit in the last place; below float16's
    # normal numbers that unit is fixed, and the scale's is multiplied by the step.
    normal = (1 + EPS) ** 2 - 1
    assert (wrong <= normal * given.weight.double().abs() + (1 + 2**spec.bits) * 2.0**-25).all()


@pytest.mark.parametrize(("name", "spec"), CASES, ids=named)
def test_codes_and_zero_points_are_the_evaluated_ones_from_zero_up(name, spec):
    given = layer(spec)
    parts = parts_of(given)
    assert parts.codes.min() >= 0
    assert parts.codes.max() <= 2**spec.bits - 1
    one = replace(spec, symmetric=False)
    exact = (given.grid.scale, parts.zero[..., None].float())
    assert torch.equal(decoded(parts.codes, exact, one, torch.float32), given.weight)
    assert (parts.zero == 2 ** (spec.bits - 1)).all() if spec.symmetric else parts.zero[0].eq(0).all()


REFUSED = [
    ({"wbits": 4, "abits": 8}, "says nothing of inputs"),
    ({"wbits": 4, "kvbits": 8}, "says nothing of keys and values"),
    ({"wbits": 5}, "not of 5"),
    ({"wbits": 4, "weight_format": "nf4"}, "not nf4"),
    ({"wbits": 4, "weight_format": "mxfp4"}, "not e2m1"),
    ({"wbits": 4, "real_zero": True}, "not real numbers"),
    ({"wbits": 4, "weight_granularity": "tensor"}, "not for a tensor"),
    ({"wbits": 4, "overrides": {"down_proj": "w4a16g32"}}, "one width and one group size"),
    ({"wbits": 16, "abits": 8}, "says nothing of inputs"),
    ({}, "leaves in floating point"),
]


@pytest.mark.parametrize(("keys", "why"), REFUSED, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_layout_cannot_hold_is_refused_with_what_can(name, keys, why):
    with pytest.raises(Unsuitable, match=why) as caught:
        layout(name, Scheme.of(**keys)).check()
    assert "export" in str(caught.value) or "set " in str(caught.value)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    "algorithm", [Pipeline((OWQ(), RTN())), Pipeline((SBA(), SQC())), QuIP()], ids=lambda a: a.mixes
)
def test_a_weight_that_is_more_than_codes_of_one_grid_is_refused(name, algorithm):
    with pytest.raises(Unsuitable, match="codes of one grid for a layer, not"):
        layout(name, Scheme.of(4, group_size=32), algorithm=algorithm).check()


@needs_library
@pytest.mark.parametrize("name", LAYOUTS)
def test_groups_that_the_library_has_not_are_refused(name):
    with pytest.raises(Unsuitable, match="with groups of 8"):
        layout(name, Scheme.of(4, group_size=8)).check()


def test_awq_has_codes_of_four_bits_beside_sixteen():
    with pytest.raises(Unsuitable, match="codes of 4 bits, not of 3"):
        layout("awq", Scheme.of(3)).check()
    with pytest.raises(Unsuitable, match="set dtype=float16"):
        layout("awq", Scheme.of(4), torch.float32).check()


@pytest.mark.parametrize("name", LAYOUTS)
def test_layers_that_do_not_fill_whole_words_are_refused(name):
    model = tiny()
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 126, bias=False)
    with pytest.raises(Unsuitable, match=r"126 outputs, and .* packs 8 codes of 4 bits"):
        LAYOUTS[name](Source(model, RTN(), Scheme.of(4), torch.float16)).check()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_missing_library_is_named_before_anything_is_loaded(name, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(
        Unsuitable, match=r"gptqmodel and optimum cannot be found; pip install 'qbench\[gptqmodel\]'"
    ):
        layout(name, Scheme.of(4)).check()


def test_a_scale_beyond_float16_is_refused():
    given = layer(QuantSpec(4, True))
    large = QuantizedLayer(
        given.name,
        given.weight * 2.0**24,
        given.spec,
        type(given.grid)(given.grid.scale * 2.0**24, given.grid.zero),
    )
    with pytest.raises(ValueError, match="float16 ends at 65504"):
        parts_of(large)


def written(made: GPTQLayout, folder: Path, scheme: Scheme, algorithm) -> list[QuantizedLayer]:
    """The layers of a model that was quantized and written."""

    model, layers = made.source.skeleton, []
    blocks, family = family_of(model).blocks, family_of(model)
    tokens = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(1))
    made.check()
    with Writer(folder) as writer:

        def deliver(finished):
            found = list(layers_of(finished, blocks, family.linears(finished.layer), scheme))
            layers.extend(found)
            made.block(writer, f"{blocks}.{finished.index}", finished.layer, found, finished.fixed)

        quantize(model, algorithm, scheme, tokens, deliver=deliver)
        made.finish(writer, model, ModelRef("zoo/micro-llama").tokenizer())
        writer.close_tensors()
        writer.publish()
    return layers


@needs_library
@pytest.mark.parametrize(("name", "spec"), CASES, ids=named)
def test_what_is_packed_is_what_the_algorithm_chose(name, spec, tmp_path):
    scheme = Scheme(spec)
    made = layout(name, scheme)
    layers = written(made, tmp_path / "out", scheme, GPTQ(act_order=True, static_groups=True))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    names = hub_names(made.source.skeleton, made.built, [one.name for one in layers])
    taken = 0
    for one in layers:
        prefix = f"{names[one.name]}."
        tensors = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
        codes, zero = (
            packing.gptq(tensors, spec.bits, spec.symmetric) if name == "gptq" else packing.awq(tensors)
        )
        parts = parts_of(one)
        assert torch.equal(codes, parts.codes.long())
        assert torch.equal(zero, parts.zero.long())
        assert torch.equal(tensors["scales"].T, parts.scale)
        assert made.stored_bits(one) == sum(t.numel() * t.element_size() * 8 for t in tensors.values())
        taken += 1
        if name == "gptq":
            size = spec.group_size or codes.shape[1]
            assert torch.equal(tensors["g_idx"], torch.arange(codes.shape[1], dtype=torch.int32) // size)
    assert taken == 14


@needs_library
@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors_reads_awq_as_it_is_meant(symmetric, tmp_path):
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    scheme = Scheme.of(4, group_size=32, weight_symmetric=symmetric)
    made = layout("awq", scheme)
    layers = written(made, tmp_path / "out", scheme, RTN())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    reader = AutoAWQConverter.from_autoawq_config(said)
    for one in layers:
        found = [stored[f"{one.name}.{key}"] for key in ("qweight", "scales", "qzeros")]
        codes, scale, zero = reader._convert_gemm_module(*found)
        steps = codes - zero.repeat_interleave(32, 1)
        assert torch.equal(scale.repeat_interleave(32, 1) * steps, made.stored(one))


LOADED = [
    *((name, Scheme(spec)) for name, spec in CASES if spec.group_size),
    *((name, Scheme.of(4, overrides={what: "w16a16"})) for name in LAYOUTS for what in ("0.*", "down_proj")),
]


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize("own", [False, True], ids=["transformers", "gptqmodel"])
@pytest.mark.parametrize(("name", "scheme"), LOADED, ids=str)
def test_a_loaded_model_is_the_one_that_was_written(name, scheme, own, tmp_path):
    made = layout(name, scheme, torch.bfloat16)
    layers = written(made, tmp_path / "out", scheme, RTN())
    model, ids = made.source.skeleton, torch.randint(0, 96, (2, 48))
    for one in layers:
        if one.spec is not None:
            one.weight.data = made.stored(one)
    expected = model.to(torch.bfloat16)(ids, use_cache=False).logits.float()
    if own:
        from gptqmodel import BACKEND, GPTQModel

        loaded = GPTQModel.load(
            str(tmp_path / "out"), backend=BACKEND.TORCH, device="cpu", dtype=torch.bfloat16
        )
        with torch.compiler.set_stance("force_eager"):
            found = loaded.model(ids, use_cache=False).logits.float()
    else:
        found = made.reader(tmp_path / "out", None)[0](ids)
    # The same products, in another order of sums: each sum of n numbers in bfloat16 is off by a unit in the last place.
    assert (found - expected).abs().mean() <= torch.finfo(torch.bfloat16).eps * expected.abs().mean() * 4
