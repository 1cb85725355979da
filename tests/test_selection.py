"""Selections of channels: what they keep, what it costs and what it is good for. LLM.int8(), QUIK and OWQ."""

import pytest
import torch

from qbench.algorithms.base import Pipeline
from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.llmint8 import LLMInt8
from qbench.algorithms.owq import OWQ
from qbench.algorithms.quik import QUIK
from qbench.algorithms.rtn import RTN
from qbench.calib.observers import Gram
from qbench.deploy.size import size_metrics
from qbench.engine import quantize
from qbench.models.family import family_of
from qbench.models.load import ModelRef
from qbench.quant.grid import fake_quantize
from qbench.quant.scheme import Scheme

from .conftest import random_model
from .reference import owq as reference
from .test_laws import Keep, Listen, ObservingRTN, assert_same_function, logits, name

ANY = [LLMInt8(), QUIK(), OWQ(1.0)]


def kept_by(algorithm, model, tokens, scheme="w3a16g16"):
    """What is kept of the first block; nothing of the model is changed."""
    listener = Listen()
    quantize(model, Pipeline((algorithm, listener)), Scheme.parse(scheme), tokens)
    return {layer: columns(mask) for layer, mask in listener.heard[0].kept.items()}


def columns(mask):
    return torch.arange(len(mask))[mask].tolist()


def entering(model, tokens, *layers):
    """What enters layers of the first block, `(tokens, in)` each."""
    seen = {}
    block = model.get_submodule(family_of(model).blocks)[0]
    handles = [
        block.get_submodule(layer).register_forward_pre_hook(
            lambda _, args, layer=layer: seen.__setitem__(layer, args[0].flatten(0, -2))
        )
        for layer in layers
    ]
    logits(model, tokens)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("threshold", [3.0, 6.0])
def test_llm_int8_keeps_the_channels_that_once_reach_the_threshold(threshold, model, tokens):
    kept = kept_by(LLMInt8(threshold), model, tokens)
    for layer, x in entering(model, tokens, *kept).items():
        assert kept[layer] == [
            j for j in range(x.shape[1]) if any(abs(v) >= threshold for v in x[:, j].tolist())
        ]


def test_llm_int8_is_rtn_where_nothing_reaches_the_threshold_and_the_model_where_everything_does(tokens):
    scheme = Scheme.parse("w4a4")
    none, rtn, everything = (random_model("llama") for _ in range(3))
    quantize(none, Pipeline((LLMInt8(1e9), RTN())), scheme, tokens)
    quantize(rtn, RTN(), scheme, tokens)
    assert torch.equal(logits(none, tokens), logits(rtn, tokens))
    before = logits(everything, tokens)
    quantize(everything, Pipeline((LLMInt8(1e-9), RTN())), scheme, tokens)
    assert_same_function(everything, tokens, before)


@pytest.mark.parametrize(
    ("algorithm", "counts"), [(QUIK(), (3, 7)), (QUIK(0.25), (12, 28)), (QUIK(n_outliers=5), (5, 5))]
)
def test_quik_keeps_the_channels_with_the_largest_magnitudes(algorithm, counts, model, tokens):
    kept = kept_by(algorithm, model, tokens)
    for layer, x in entering(model, tokens, *kept).items():
        count = counts[x.shape[1] == 112]
        peaks = [max(abs(v) for v in x[:, j].tolist()) for j in range(x.shape[1])]
        assert kept[layer] == sorted(sorted(range(len(peaks)), key=lambda j: -peaks[j])[:count])


@pytest.mark.parametrize(("scheme", "bits", "size"), [("w3a16g16", 3, 16), ("w2a16", 2, None)])
def test_owq_keeps_the_most_sensitive_columns(scheme, bits, size, model, tokens):
    kept = kept_by(OWQ(share=0.1), model, tokens, scheme)
    weights = {
        layer: model.get_submodule(family_of(model).blocks)[0].get_submodule(layer).weight for layer in kept
    }
    for layer, x in entering(model, tokens, *kept).items():
        count = round(0.1 * x.shape[1])
        assert kept[layer] == reference.weak_columns(weights[layer], x, bits, size or x.shape[1], count)


@pytest.mark.parametrize("extra_bits", [0.5, 1.0, 2.0])
def test_owq_spends_its_budget_to_the_nearest_column(extra_bits, model, tokens):
    scheme = Scheme.parse("w3a16")
    n_parameters = sum(p.numel() for p in model.parameters())
    blocks = model.get_submodule(family_of(model).blocks)
    layers = [block.get_submodule(layer) for block in blocks for layer in family_of(model).linears(block)]
    plain = quantize(model, Keep(), scheme, tokens)
    kept = quantize(model, Pipeline((OWQ(extra_bits), Keep())), scheme, tokens)
    before, after = (
        size_metrics(model, n_parameters, r.stored_bits)["bits_per_linear_weight"] for r in (plain, kept)
    )
    half_columns = sum((16 + (16 - 3) * layer.weight.shape[0]) / 2 for layer in layers)
    tolerance = half_columns / sum(layer.weight.numel() for layer in layers)
    assert tolerance < 0.4
    assert abs(after - before - extra_bits) <= tolerance


@pytest.mark.parametrize("algorithm", ANY, ids=name)
def test_a_channel_costs_its_column_in_half_precision_and_its_index(algorithm, llama, tokens):
    scheme = Scheme.parse("w3a8g16")
    result = quantize(llama, Pipeline((algorithm, RTN())), scheme, tokens)
    n_parameters, total, n_weights = sum(p.numel() for p in llama.parameters()), 0.0, 0
    for index, report in enumerate(result.reports):
        for layer in family_of(llama).linears(llama.model.layers[0]):
            rows, n = llama.model.layers[index].get_submodule(layer).weight.shape
            kept = report["kept_channels"][layer]
            scales = (
                rows * (n / 16) * (16 + 3)
            )  # a scale and a zero-point for each group, kept columns or not
            bits = 3 * rows * (n - kept) + scales + 16 * rows * kept + 16 * kept
            assert result.stored_bits[f"{index}.{layer}"] == pytest.approx(bits, rel=1e-12)
            total, n_weights = total + bits, n_weights + rows * n
    assert sum(sum(report["kept_channels"].values()) for report in result.reports) > 0
    metrics = size_metrics(llama, n_parameters, result.stored_bits)
    assert metrics["bits_per_linear_weight"] == pytest.approx(total / n_weights, rel=1e-12)
    assert metrics["bits_per_linear_weight"] > 3 + (16 + 3) / 16


@pytest.mark.parametrize("algorithm", ANY, ids=name)
def test_kept_channels_enter_as_they_are_and_the_others_on_a_grid_of_their_own(algorithm, llama, tokens):
    scheme = Scheme.parse("w4a4")
    listener, before, after = Listen(), [], []
    quantize(llama, Pipeline((algorithm, listener)), scheme, tokens)
    layer = llama.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda _, args: before.append(args[0]), prepend=True)
    layer.register_forward_hook(lambda _, args, out: after.append(args[0]))
    logits(llama, tokens)
    kept = listener.heard[0].kept["self_attn.q_proj"]
    assert 0 < kept.sum() < len(kept)
    assert torch.equal(after[0][..., kept], before[0][..., kept])
    expected = fake_quantize(before[0][..., ~kept], scheme.activation)
    assert torch.equal(after[0][..., ~kept], expected)


@pytest.mark.parametrize("algorithm", ANY, ids=name)
def test_under_gptq_each_layer_s_kept_columns_make_up_for_the_errors_of_its_others(algorithm, llama, tokens):
    """Layers with one input are rounded as if alone, also where each keeps other channels."""

    class Expect(Keep):
        def process(self, block):
            for link, (gram,) in block.observe(Gram, links=block.links[:1]).items():
                for layer in link.sinks:
                    kept = block.kept[layer]
                    w = block.linear(layer).weight.clone()
                    mask = kept.expand_as(w)
                    rounded = GPTQ().round(w, gram, block.weight_spec(layer), kept=mask)
                    found.append((layer, kept, w, rounded))

    scheme, found = Scheme.parse("w3a16g16"), []
    quantize(random_model("llama"), Pipeline((algorithm, Expect())), scheme, tokens)
    quantize(llama, Pipeline((algorithm, GPTQ())), scheme, tokens)
    for layer, kept, before, expected in found[:3]:
        ours = llama.model.layers[0].get_submodule(layer).weight
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
        assert not torch.equal(ours[:, kept], before[:, kept])


def test_owq_keeps_other_columns_of_layers_with_the_same_input(llama, tokens):
    """What the law above is about, and why a column's own rounding error counts."""
    kept = kept_by(OWQ(share=0.2), llama, tokens)
    assert kept["self_attn.q_proj"] != kept["self_attn.v_proj"]


@pytest.mark.parametrize("algorithm", ANY, ids=name)
def test_selections_add_up(algorithm, llama, tokens):
    alone, first = (kept_by(a, llama, tokens) for a in (algorithm, QUIK(0.1)))
    listener = Listen()
    quantize(llama, Pipeline((QUIK(0.1), algorithm, listener)), Scheme.parse("w3a16g16"), tokens)
    for layer, mask in listener.heard[0].kept.items():
        assert columns(mask) == sorted({*alone[layer], *first[layer]})


def error(algorithm, outliers, scheme):
    """The first block's relative output error on nano-llama."""
    tokens = torch.randint(0, 3072, (4, 64), generator=torch.Generator().manual_seed(3))
    model = ModelRef("zoo/nano-llama", outliers=outliers).load()
    return quantize(model, algorithm, Scheme.parse(scheme), tokens).errors[0]


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4"])
@pytest.mark.parametrize("algorithm", [LLMInt8(), QUIK()], ids=name)
def test_outliers_that_are_kept_do_no_harm(algorithm, scheme):
    plain, planted = (error(ObservingRTN(), outliers, scheme) for outliers in (None, 64.0))
    assert planted > 10 * plain
    assert error(Pipeline((algorithm, RTN())), 64.0, scheme) < 2 * plain


def test_quik_leaves_the_bits_of_a_layer_to_the_scheme(llama, tokens):
    scheme = Scheme.of(4, 4, weight_symmetric=True, act_symmetric=False, overrides={"down_proj": "w8a8"})
    result = quantize(llama, Pipeline((QUIK(), GPTQ(act_order=False))), scheme, tokens)
    rows, n, kept = 48, 112, 7
    codes, beside = 8 * rows * (n - kept) + 16 * rows, 16 * kept * (rows + 1)
    assert result.stored_bits["0.mlp.down_proj"] == pytest.approx(codes + beside, rel=1e-12)


def test_what_makes_no_sense_is_refused(llama, tokens):
    with pytest.raises(ValueError, match=r"needs activation bits; the scheme is w4a16; set e.g. abits=8"):
        LLMInt8().check(Scheme.parse("w4a16"))
    for algorithm in (QUIK(), OWQ()):
        with pytest.raises(ValueError, match="works on weights"):
            algorithm.check(Scheme.parse("w16a8"))
    with pytest.raises(
        ValueError, match=r"does not pay for one column of any layer; raise extra_bits above 0.01"
    ):
        quantize(llama, Pipeline((OWQ(0.01), RTN())), Scheme.parse("w3a16"), tokens)
    for algorithm in (QUIK(n_outliers=48), OWQ(share=0.999), OWQ(extra_bits=14.0)):
        with pytest.raises(
            ValueError, match=r"is to keep \d+ channels of .*, which has 48; let it keep fewer"
        ):
            quantize(llama, Pipeline((algorithm, RTN())), Scheme.parse("w3a16"), tokens)


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (LLMInt8, {"threshold": 0.0}, "must be positive"),
        (QUIK, {"share": 1.0}, "must be between 0 and 1"),
        (QUIK, {"n_outliers": 0}, "must be at least 1"),
        (OWQ, {"extra_bits": -0.1}, "must be positive"),
        (OWQ, {"share": 0.0}, "must be between 0 and 1"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        kind(**wrong)
