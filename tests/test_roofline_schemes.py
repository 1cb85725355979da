"""The roofline of a scheme: widths layer by layer, what multiplies them, what they gain, and `qbench roofline`."""

import csv
import itertools
import math
from dataclasses import replace

import pytest
from transformers import AutoConfig, LlamaConfig

from qbench.deploy.comparison import PAYS, Variant, most_sequences, seconds, stops_paying
from qbench.deploy.devices import Unit, device, devices
from qbench.deploy.roofline import Bits, latency, memory, operators
from qbench.deploy.size import size_metrics
from qbench.deploy.widths import narrow_unit, widths
from qbench.models.catalogue import entries
from qbench.models.dimensions import kept_in, skeleton_of
from qbench.models.experts import unpack
from qbench.models.family import family_of
from qbench.models.shape import shape_of, sizes_of
from qbench.quant.scheme import Scheme
from qbench.quant.spec import FORMAT_BITS
from qbench.sweep.settings import Jobs
from qbench.sweep.shipped import CONF
from tests.test_grid import COMPOSER
from tests.test_shape import EXPERTS, FAMILIES, config_of

GPU = device("h100")
SEVEN = shape_of(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=32,
                             num_key_value_heads=32, vocab_size=32000, tie_word_embeddings=False))  # fmt: skip
MIXED = {"down_proj": "w8a16", "*.1.up_proj": "w2a8", "0.*attn.*": "w16a16"}


def variant(scheme, shape=SEVEN, floating=16):
    return Variant(str(scheme), *widths(shape, scheme, floating))


def scheme_named(name):
    return Jobs().job(COMPOSER.config([f"scheme={name}"])).scheme


SHIPPED = sorted(path.stem for path in (CONF / "scheme").glob("*.yaml"))

# Widths


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"qwen3_next"}))
def test_weights_in_memory_are_the_honest_size_of_a_mixed_scheme(name):
    """Layer by layer, by what the engine is told of each."""
    scheme = Scheme.of(4, 8, group_size=4, overrides=MIXED)
    fused, model = skeleton_of(config_of(name)), skeleton_of(config_of(name))
    shape, n = sizes_of(fused), sum(p.numel() for p in model.parameters())
    try:
        kept = kept_in(fused, shape)
        unpack(model)
        family = family_of(model)
    except NotImplementedError as error:
        pytest.skip(f"cannot be quantized: {error}")
    stored = {}
    for index, block in enumerate(model.get_submodule(family.blocks)):
        for layer in family.linears(block):
            weight, spec = block.get_submodule(layer).weight, scheme.layer(index, layer).weight
            each = spec.bits_per_element(*weight.shape) if spec else 16.0
            stored[f"{index}.{layer}"] = each * weight.numel()
    shape, bits = widths(shape, scheme, kept=kept)
    honest = size_metrics(model, n, stored)["model_mb"] * 1e6
    assert memory(shape, bits, 1, 1).weights == pytest.approx(honest, rel=1e-12)


def test_blocks_that_the_scheme_treats_differently_are_told_apart():
    scheme = Scheme.of(4, 8, overrides={"0.*": "w16a16", "down_proj": "w8a8", "3.mlp.up_proj": "w2a16"})
    shape, bits = widths(SEVEN, scheme)
    assert sorted(block.at for block in shape.blocks) == [(0,), (1, 2, *range(4, 32)), (3,)]
    assert shape.n_parameters == SEVEN.n_parameters
    found = {(op.name, op.count): op for op in operators(shape, bits, 1, 1, "decode")}
    n = 4096 * 11008
    assert found["up_proj", 1].weight_bytes * 8 / n == pytest.approx(
        2, abs=0.02
    )  # of block 3, the last of the two
    assert found["up_proj", 30].weight_bytes * 8 / n == pytest.approx(4, abs=0.02)
    assert found["down_proj", 30].weight_bytes * 8 / n == pytest.approx(8, abs=0.02)
    assert (found["up_proj", 1].unit, found["up_proj", 30].unit) == ("fp16", "int8")
    units = {
        op.unit for op in operators(shape, bits, 1, 1, "decode") if op.count == 1 and op.name == "q_proj"
    }
    assert units == {"fp16", "int8"}, "block 0 is in floating point, block 3 is not"


def test_experts_that_differ_count_in_their_mean():
    shape = shape_of(AutoConfig.for_model("mixtral", **EXPERTS))
    one, bits = widths(shape, Scheme.of(4, 8, overrides={"experts.2.*": "w16a16"}))
    even, plain = widths(shape, Scheme.of(4, 8))
    named = {op.name: op for op in operators(one, bits, 64, 1, "decode")}
    alike = {op.name: op for op in operators(even, plain, 64, 1, "decode")}
    whole = 16 * 64 * 112 / 8 * (1 - (3 / 5) ** 64)  # bytes of an expert, and how likely it is to be read
    assert named["up_proj"].weight_bytes == pytest.approx(alike["up_proj"].weight_bytes * 4 / 5 + whole)
    assert (named["up_proj"].unit, alike["up_proj"].unit) == ("fp16", "int8")
    assert named["gate"] == alike["gate"], "a router is left alone"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_scheme_has_a_roofline(name):
    scheme = scheme_named(name)
    model, plain = variant(scheme), variant(Scheme())
    for phase in ("prefill", "decode"):
        ours, base = (seconds(x, GPU, 1, 512, phase, True) for x in (model, plain))
        assert 0 < ours <= base
    ours, base = (memory(x.shape, x.bits, 1, 512) for x in (model, plain))
    assert (ours.weights < base.weights) == (scheme.weight is not None)
    assert (ours.kv < base.kv) == (scheme.kv is not None)


@pytest.mark.parametrize("kvbits", [2, 3, 4, 8])
def test_a_cache_holds_its_scales_and_zero_points(kvbits):
    """A head of 128 has a scale of 16 bits and an integer zero-point of its own for every token, or each group has."""
    assert variant(Scheme.of(kvbits=kvbits)).bits.kv == kvbits + (16 + kvbits) / 128
    assert variant(Scheme.of(kvbits=kvbits, kv_group_size=32)).bits.kv == kvbits + (16 + kvbits) / 32
    assert variant(Scheme.of(kvbits=kvbits, kv_symmetric=True)).bits.kv == kvbits + 16 / 128
    assert variant(Scheme.of(kvbits=kvbits, kv_layout="kivi")).bits.kv == kvbits + (16 + kvbits) / 32
    assert variant(Scheme.of(kvbits=kvbits, kv_layout="tensor")).bits.kv == kvbits


def test_the_last_tokens_of_a_cache_are_in_floating_point():
    model = variant(Scheme.of(kvbits=2, kv_layout="kivi"))
    assert model.bits.kv_residual == 128
    assert memory(model.shape, model.bits, 3, 100).kv == memory(SEVEN, Bits(16), 3, 100).kv
    quantized = model.bits.kv / 16 * memory(SEVEN, Bits(16), 3, 1000 - 128).kv
    assert memory(model.shape, model.bits, 3, 1000).kv == pytest.approx(
        memory(SEVEN, Bits(16), 3, 128).kv + quantized
    )
    read = sum(op.count * op.kv_read_bytes for op in operators(model.shape, model.bits, 3, 1000, "decode"))
    assert read == pytest.approx(memory(model.shape, model.bits, 3, 1000).kv)


def test_scales_of_the_cache_do_not_keep_attention_from_the_integer_units():
    found = {op.name: op.unit for op in operators(*_pair(variant(Scheme.of(8, 8, 8))), 1, 64, "decode")}
    assert found["qk_matmul"] == found["pv_matmul"] == "int8"
    floats = variant(Scheme.of(8, 8, 8, act_format="e4m3", weight_format="e4m3"))
    found = {op.name: op.unit for op in operators(*_pair(floats), 1, 64, "decode")}
    assert (found["q_proj"], found["qk_matmul"]) == ("fp8", "fp16"), "the cache's integers are no fp8"


def _pair(model):
    return model.shape, model.bits


@pytest.mark.parametrize(("weight", "activation"), itertools.product(["int", *FORMAT_BITS], repeat=2))
def test_two_formats_share_units_only_where_both_have_them(weight, activation):
    unit = narrow_unit(weight, activation)
    assert unit == narrow_unit(activation, weight)
    if "nf4" in (weight, activation):
        assert unit == "fp16", "a codebook is looked up"
    else:
        both = {("int" if each == "int" else "float") for each in (weight, activation)}
        assert unit == {("int",): "int8", ("float",): "fp8"}.get(tuple(both), "fp16")


def test_weights_alone_are_multiplied_in_floating_point():
    for floating, unit in ((16, "fp16"), (32, "fp32")):
        model = variant(Scheme.of(4, group_size=128), floating=floating)
        assert {op.unit for op in operators(model.shape, model.bits, 1, 64, "prefill")} == {unit}


def test_a_model_in_32_bits_is_twice_one_in_16():
    half, full = variant(Scheme()), variant(Scheme(), floating=32)
    expected = Bits(32, 32, 32, 32, kv_code=32, floating=32, narrow=full.bits.narrow, layers=full.bits.layers)
    assert full.bits == expected
    for phase in ("prefill", "decode"):
        pairs = zip(
            operators(*_pair(half), 2, 256, phase), operators(*_pair(full), 2, 256, phase), strict=True
        )
        assert all(b.bytes == 2 * a.bytes and b.operations == a.operations for a, b in pairs)
    assert memory(*_pair(full), 2, 256).total == 2 * memory(*_pair(half), 2, 256).total
    assert seconds(full, GPU, 1, 256, "decode", True) == pytest.approx(
        2 * seconds(half, GPU, 1, 256, "decode", True)
    )


# Devices


@pytest.mark.parametrize("name", devices())
def test_narrower_operands_are_never_slower(name):
    found = device(name)
    units: tuple[Unit, ...] = ("fp32", "fp16")
    assert found.peak(units[0]) <= found.peak(units[1]) <= min(found.peak("int8"), found.peak("fp8"))
    stated = {"fp16": found.fp16, "int8": found.int8, "fp8": found.fp8}
    assert all(found.peak(unit) >= peak for unit, peak in stated.items() if peak is not None)


def test_fp8_gains_operations_only_where_there_are_units():
    model = variant(scheme_named("fp8"))
    integers = variant(scheme_named("w8a8"))
    times = {
        name: [
            seconds(x, device(name), 1, 4096, "prefill", True) for x in (variant(Scheme()), integers, model)
        ]
        for name in ("a100-80", "h100")
    }
    plain, whole, small = times["a100-80"]
    assert whole < 0.6 * plain
    assert small > 0.95 * plain
    plain, whole, small = times["h100"]
    assert small == pytest.approx(whole, rel=0.01)
    assert small < 0.65 * plain


# What a scheme gains


@pytest.mark.parametrize("hardware", ["h100", "a100-80", "rtx4090", "m1-max"])
@pytest.mark.parametrize("context", [128, 4096])
def test_weight_only_quantization_stops_paying_at_the_batch_that_is_found(hardware, context):
    model, plain, gpu = variant(Scheme.of(4, group_size=128)), variant(Scheme()), device(hardware)
    batch = stops_paying(model, plain, gpu, context)

    def gain(n):
        return seconds(plain, gpu, n, context, "decode", True) / seconds(
            model, gpu, n, context, "decode", True
        )

    assert gain(1) > 2
    assert gain(batch - 1) >= PAYS > gain(batch)
    assert all(gain(n) < PAYS for n in (batch + 1, 2 * batch, 16 * batch))


def test_weight_only_quantization_stops_paying_where_the_longest_layers_are_bound_by_computing():
    """Without a cache to speak of: about peak / bandwidth operations a byte of 16 bits, fewer than 3 times as many."""
    batch = stops_paying(variant(Scheme.of(4)), variant(Scheme()), GPU, 1)
    assert 1 < batch / (GPU.fp16 / GPU.bandwidth) < 3


def test_a_longer_context_hides_the_weights_earlier():
    found = [stops_paying(variant(Scheme.of(4)), variant(Scheme()), GPU, n) for n in (64, 1024, 16384)]
    assert found == sorted(found, reverse=True)


def test_what_gains_nothing_or_always_is_said():
    plain = variant(Scheme())
    assert stops_paying(plain, plain, GPU, 512) == 1
    assert stops_paying(variant(Scheme.of(8, 8, 8)), plain, GPU, 512) is None


@pytest.mark.parametrize("context", [64, 2048])
def test_as_many_sequences_fit_as_memory_holds(context):
    model = variant(Scheme.of(4, group_size=128))
    most = most_sequences(model, GPU, context)
    fits = [memory(*_pair(model), n, context).total <= GPU.memory for n in (most, most + 1)]
    assert fits == [True, False]
    assert most_sequences(variant(Scheme()), replace(GPU, memory=13e9), context) == 0


# Operator by operator


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("w", "a", "k", "n_kv"),
    [(2, 2, 2, 32), (0.5, 2, 2, 32), (1, 1, 1, 8), (0.5, 0.5, 0.25, 8), (2, 2, 0.5, 4)],
)
def test_each_operator_is_that_of_the_formulae(phase, fused, w, a, k, n_kv):
    """The roofline's table, by its own symbols: operations, and bytes, of every operator of a block and of the head."""
    h, f, d, n_h, b, s, vocab = 4096, 11008, 128, 32, 3, 700, 32000
    config = LlamaConfig(hidden_size=h, intermediate_size=f, num_attention_heads=n_h, num_key_value_heads=n_kv,
                         num_hidden_layers=2, vocab_size=vocab)  # fmt: skip
    t = s if phase == "prefill" else 1

    def linear(inputs, outputs, out=a):
        return 2 * inputs * outputs * b * t, inputs * outputs * w + inputs * b * t * a + outputs * b * t * out

    score, attended = t * s * n_h * b, 2 * t * s * d * n_h * b
    product = (t * d * n_h + t * s * n_h) * b * a + s * d * n_kv * b * k
    expected = {
        "q_proj": linear(h, h), "o_proj": linear(h, h), "k_proj": linear(h, n_kv * d, k), "v_proj": linear(h, n_kv * d, k),
        "gate_proj": linear(h, f), "up_proj": linear(h, f), "down_proj": linear(f, h),
        "norm_0": (7 * b * t * h, 2 * b * t * h * a), "norm_1": (7 * b * t * h, 2 * b * t * h * a),
        "attn_add": (b * t * h, 2 * b * t * h * a), "mlp_add": (b * t * h, 2 * b * t * h * a),
        "mlp_act": (2 * b * t * f, 3 * b * t * f * a),
        "lm_head": (2 * vocab * h * b * t, 2 * vocab * h + b * t * (h + vocab) * a),
    }  # fmt: skip
    if fused:
        rows = min(math.ceil(GPU.on_chip / (k * d)), d)
        moved = 2 * t * d * n_h * b * a + math.ceil(t / rows) * s * d * n_kv * b * k * 2
        expected["fused_attention"] = 2 * attended + 5 * score, moved
    else:
        expected |= {
            "qk_matmul": (attended, product),
            "pv_matmul": (attended, product),
            "softmax": (5 * score, 2 * score * a),
        }
    bits = Bits(8 * w, 8 * a, 8 * k)
    found = operators(shape_of(config), bits, b, s, phase, GPU.on_chip if fused else None)
    assert {op.name: (op.operations, pytest.approx(op.bytes)) for op in found} == expected
    assert {op.count for op in found if op.name != "lm_head"} == {2}


# The catalogue

COUNTED = [entry for entry in entries().values() if entry.config]
SMALLEST = {entry.family: entry for entry in sorted(COUNTED, key=lambda entry: -entry.parameters)}


def test_the_sizes_of_every_family_of_the_catalogue_are_checked_against_transformers():
    """Parameters, cache and multiplications of each are those of transformers' own tiny model, in `test_shape.py`."""
    known = {entry.family for entry in entries().values() if not entry.remote_code}
    assert known <= {name.split(":")[0] for name in FAMILIES}


@pytest.mark.parametrize("entry", SMALLEST.values(), ids=lambda entry: entry.name)
def test_the_smallest_of_each_family_has_the_parameters_that_the_catalogue_counts(entry):
    shape = shape_of(AutoConfig.for_model(entry.family, **entry.dimensions))
    assert shape.n_parameters == entry.parameters


@pytest.mark.slow
@pytest.mark.parametrize("entry", COUNTED, ids=lambda entry: entry.name)
def test_every_model_of_the_catalogue_has_a_roofline(entry):
    shape = shape_of(AutoConfig.for_model(entry.family, **entry.dimensions))
    assert shape.n_parameters == entry.parameters
    for scheme in (Scheme.of(4, 16, 4, 128), Scheme.of(8, 8)):
        model = variant(scheme, shape)
        assert latency(*_pair(model), GPU, 1, 512, "decode", True).bound == "memory"


# The command


def test_one_point_shows_every_operator_and_is_written(qbench, capsys, tmp_path):
    assert (
        qbench("roofline", "model=llama-2-7b", "scheme=w4a16g128", "hardware=h100", "csv=out/roof.csv") == 0
    )
    out = capsys.readouterr().out
    assert all(words in out for words in (
        "Llama-2-7b-hf, 6.74B parameters (dimensions of the catalogue)", "h100: NVIDIA H100 SXM, 3072 GB/s",
        "prefill, w4a16g128, batch 1, 2048 tokens", "decode, w4a16g128", "fused_attention", "gains less than 5% over fp16",
        "nothing was run on the device",
    ))  # fmt: skip
    with (tmp_path / "out/roof.csv").open() as file:
        plain, quantized = csv.DictReader(file)
    model = variant(Scheme.parse("w4a16g128"))
    found = latency(*_pair(model), GPU, 1, 2048, "decode", True)
    assert float(quantized["decode ms"]) == 1e3 * found.seconds
    assert float(quantized["decode speed-up"]) == pytest.approx(
        float(plain["decode ms"]) / float(quantized["decode ms"])
    )
    assert float(plain["prefill speed-up"]) == 1
    with (tmp_path / "out/roof_operators.csv").open() as file:
        rows = [
            row for row in csv.DictReader(file) if row["scheme"] == "w4a16g128" and row["phase"] == "decode"
        ]
    assert [row["operator"] for row in rows] == [op.name for op in found.operators]
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1)


def test_lists_make_a_table_of_all_points(qbench, capsys, tmp_path):
    assert qbench("roofline", "model=micro-llama", "scheme=w4a16g128_down8,w8a8", "hardware=h100,a100-80", "batch=1,8,32",
                  "seq=128,512", "phase=decode", "fused=false", "csv=roof.csv") == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "fused_attention" not in out
    assert "qk_matmul" not in out
    assert "a100-80   w4a16g128-[down_proj:w8a16g128]  32     512" in out, "brackets are no markup"
    with (tmp_path / "roof.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 3 * 2  # schemes with floating point, devices, batches, lengths
    assert not any(key.startswith("prefill") for key in rows[0])
    assert {row["scheme"] for row in rows} == {"fp16", "w4a16g128-[down_proj:w8a16g128]", "w8a8-wsym"}


@pytest.mark.parametrize(("arguments", "why"), [
    (["hardware=h100", "fused"], "`qbench roofline` takes key=value; got fused"),
    ([], "name a device, for example hardware=h100, or hardware=this"),
    (["hardware=h1000"], r"did you mean h100"),
    (["hardware=h100", "batch=1,0"], "batch=1,0: must be whole numbers from 1"),
    (["hardware=h100", "seq=long"], "seq=long: must be whole numbers from 1"),
    (["hardware=h100", "context=8"], "calls the tokens of a sequence seq"),
    (["hardware=h100", "phase=train"], "phase=train: there are prefill and decode"),
    (["hardware=h100", "fused=maybe"], "fused=maybe is neither true nor false"),
    (["hardware=h100", "scheme=w5"], "unknown scheme 'w5'"),
    (["hardware=h100", "scheme=w8a16", "wbits=9"], "1 to 8 bits"),
    (["hardware=h100", "model=chatglm2-6b"], "the catalogue does not have its dimensions; fetch it where there is a"),
    (["hardware=h100", "model=hf", "model.id=./nowhere"], "'nowhere' does not exist"),
])  # fmt: skip
def test_what_cannot_be_understood_is_said(qbench, capsys, arguments, why):
    given = arguments if any(a.startswith("model=") for a in arguments) else ["model=nano-llama", *arguments]
    assert qbench("roofline", *given) == 2
    assert why in capsys.readouterr().err


def test_floating_point_is_of_32_bits_where_it_is_asked_for(qbench, capsys):
    for dtype, label in (("float32", "fp32"), ("bfloat16", "fp16"), ("auto", "fp16")):
        assert (
            qbench("roofline", "model=nano-llama", "hardware=h100", "phase=decode", f"model.dtype={dtype}")
            == 0
        )
        assert f"over {label} " in capsys.readouterr().out
