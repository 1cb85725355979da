"""GGUF holds the recipe's own codes where it has the grid, and says so where it has not."""

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qbench.algorithms.base import Pipeline
from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.owq import OWQ
from qbench.algorithms.quarot import QuaRot
from qbench.algorithms.rtn import RTN
from qbench.deploy.formats import FORMATS, gguf
from qbench.deploy.formats.format import Source
from qbench.deploy.formats.gguf_types import (
    FLOATS,
    KINDS,
    fitting,
    packed,
    rounded,
    smallest_holding,
    unpacked,
)
from qbench.deploy.formats.gguf_vocabulary import _ways, vocabulary_of
from qbench.errors import Unsuitable
from qbench.models.load import ModelRef
from qbench.models.manifest import MANIFEST, verify
from qbench.quant.codes import codes_of
from qbench.quant.grid import choose_qparams, fake_quantize, grouped
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec
from tests.gguf_files import MODELS, byte_level, exported, random_model, rope, sentence_piece, told

HALF = 2.0**-11  # rounding to float16, relative; 2^-25 absolute where it is subnormal
IN = 256
SPECS = [
    *(QuantSpec(bits, False, "group", size) for bits in range(1, 9) for size in (32, 128)),
    *(QuantSpec(bits, True, "group", size) for bits in range(2, 9) for size in (32, 128)),
    *(QuantSpec(bits, True, symmetric_mode=mode) for bits in (3, 4, 5, 8) for mode in ("restricted", "gptq")),
    *(QuantSpec(bits, real_zero=True) for bits in (2, 4, 5, 6)),
    *(QuantSpec(4, granularity="group", group_size=32, scale_bits=3, real_zero=real) for real in (False, True)),
    *(QuantSpec(bits, True, "block", 64) for bits in (4, 8)),
    *(QuantSpec(bits, bits == 8, "tensor") for bits in (4, 8)),
    QuantSpec(4, granularity="group", group_size=16), QuantSpec(8, True, format="e4m3"), QuantSpec(4, True, format="nf4"),
    *(Scheme.of(4, weight_format=name).weights[0] for name in ("mxfp4", "nvfp4")),
]  # fmt: skip
HELD = [(spec, kind) for spec in SPECS for kind in KINDS.values() if kind.holds(spec, IN)]


def weight(rows: int = 64) -> torch.Tensor:
    w = torch.randn(rows, IN, generator=torch.Generator().manual_seed(3)) * 0.05
    w[:, 64:96] += 0.1  # groups on one side of zero
    w[5, :64] = 0
    return w


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


@pytest.mark.parametrize(("spec", "kind"), HELD, ids=lambda x: getattr(x, "name", str(x)))
def test_codes_are_read_back_but_for_scales_in_float16(spec, kind):
    w = weight()
    grid = choose_qparams(w, spec)
    on_grid = fake_quantize(w, spec, grid)
    codes = codes_of(on_grid, grid, spec)
    data = packed(kind, codes, grid, spec)
    assert 8 * data.nbytes == kind.bits * w.numel()
    back = unpacked(kind, data).double()
    if kind.name == "mxfp4":
        assert torch.equal(back.float(), on_grid)
        return
    shifted = (grid.scale * grid.zero).double().abs() if kind.minimum else torch.zeros(())
    least = (grouped(torch.ones_like(w), spec) * shifted).reshape(w.shape)
    reach = 256  # codes less zero-points, and one for the minimum
    bound = HALF * (1 + HALF) * (on_grid.double().abs() + least) + reach * 2.0**-25
    rounding = 2.0**-22 * (on_grid.double().abs() + 2 * least)  # of the products and the sum in float32
    assert ((back - on_grid.double()).abs() <= bound + rounding).all()


def test_every_type_that_takes_codes_is_met():
    assert {kind.name for _, kind in HELD} == {
        kind.name for kind in KINDS.values() if kind.low is not None
    } | {"mxfp4"}


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_smallest_type_is_one_that_holds_the_grid(spec):
    found = smallest_holding(spec, IN)
    assert (found is None) == all(spec != held for held, _ in HELD)
    assert found is None or all(found.bits <= kind.bits for held, kind in HELD if held == spec)
    assert smallest_holding(spec, IN + 8) is None


@pytest.mark.parametrize("kind", [k for k in KINDS.values() if not k.needs_llamacpp], ids=lambda k: k.name)
def test_what_is_rounded_anew_is_within_a_step(kind):
    w = weight()
    back = unpacked(kind, rounded(kind, w))
    if kind.block == 1:
        eps = {"f32": 0.0, "f16": HALF, "bf16": 2.0**-8}[kind.name]
        assert ((back - w).abs() <= eps * w.abs() + (kind.name == "f16") * 2.0**-25).all()
        return
    blocks = w.unflatten(1, (-1, 32))
    span = blocks.abs().amax(-1) if not kind.minimum else blocks.amax(-1) - blocks.amin(-1)
    # A scale is the end of the range by the largest integer; MXFP4's numbers are 2 scales apart at the end, of 4 to 8.
    steps = 2 if kind.name == "mxfp4" else kind.high if kind.low != -128 else 127
    assert ((back - w).unflatten(1, (-1, 32)).abs().amax(-1) <= span / steps * (1 + 4 * HALF)).all()


def test_rows_that_blocks_do_not_divide_get_another_type():
    for kind in KINDS.values():
        assert fitting(kind, 256) == kind
        assert fitting(kind, 33) == (kind if kind.block == 1 else None)
        there = fitting(kind, 640)
        assert there is not None
        assert 640 % there.block == 0


def test_scales_beyond_float16_are_refused():
    spec = QuantSpec(4, True, "group", 32)
    w = weight() * 1e8
    grid = choose_qparams(w, spec)
    with pytest.raises(ValueError, match="GGUF's float16 ends at 65504"):
        packed(KINDS["q4_0"], codes_of(fake_quantize(w, spec, grid), grid, spec), grid, spec)


SCHEMES = {
    "w8g32-sym": (Scheme.of(8, group_size=32, weight_symmetric=True), "q8_0"),
    "w4g64-sym": (Scheme.of(4, group_size=64, weight_symmetric=True), "q4_0"),
    "w4": (Scheme.of(4), "q4_1"),
    "w5g32": (Scheme.of(5, group_size=32), "q5_1"),
    "mxfp4": (Scheme.of(4, weight_format="mxfp4"), "mxfp4"),
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("algorithm", [RTN(), GPTQ()], ids=["rtn", "gptq"])
def test_a_file_holds_the_codes_that_the_algorithm_chose(tmp_path, tokenizer, name, algorithm):
    scheme, kind = SCHEMES[name]
    tokens = torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(1))
    made = exported(
        tmp_path / "out",
        random_model(*MODELS["qwen2"]),
        tokenizer,
        scheme,
        algorithm=algorithm,
        tokens=tokens,
    )
    verify(made.folder)
    read = {tensor.name: tensor for tensor in GGUFReader(made.file).tensors}
    assert len(read) == len(made.model.state_dict())
    parts = {"self_attn.q_proj": "attn_q", "mlp.down_proj": "ffn_down"}
    for (ours, theirs), index in zip(parts.items(), (0, 1), strict=True):
        tensor = read[f"blk.{index}.{theirs}.weight"]
        evaluated, stored = made.weights[f"model.layers.{index}.{ours}"]
        assert tensor.tensor_type == KINDS[kind].type
        assert torch.equal(unpacked(KINDS[kind], tensor.data), stored)
        assert (stored - evaluated).norm() <= 2 * HALF * 16 * evaluated.norm()
        assert made.bits[f"model.layers.{index}.{ours}"] == KINDS[kind].bits * evaluated.numel()
    assert made.format.statement() in told(made.file)["general.description"]
    assert f"14 layers as {kind}, in the recipe's own codes" in made.format.statement()


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_weights_that_are_stored(tmp_path, tokenizer, name):
    scheme = Scheme.of(4, group_size=32, weight_symmetric=True)
    made = exported(tmp_path / "out", random_model(*MODELS[name]), tokenizer, scheme)
    ids = torch.randint(0, 512, (2, 60), generator=torch.Generator().manual_seed(2))
    read, why = made.format.reader(made.folder, None)
    assert not why
    with torch.inference_mode():
        assert torch.equal(read(ids), made.store()(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_is_not_quantized_stays_in_the_models_dtype(tmp_path, tokenizer, dtype):
    scheme = Scheme.of(4, group_size=32, weight_symmetric=True, overrides={"1.mlp.*": "w16a16"})
    made = exported(tmp_path / "out", random_model("llama", {}, dtype), tokenizer, scheme)
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in GGUFReader(made.file).tensors}
    assert types["token_embd.weight"] == types["blk.1.ffn_up.weight"] == FLOATS[dtype].name
    assert types["blk.0.attn_norm.weight"] == "f32"
    assert types["blk.0.ffn_up.weight"] == "q4_0"
    ids = torch.arange(40)[None]
    read, _ = made.format.reader(made.folder, None)
    with torch.inference_mode():
        assert torch.equal(read(ids), made.store()(ids).logits.float())


def test_a_head_of_its_own_is_read(tmp_path, tokenizer):
    rotate = Pipeline([QuaRot(online=False), RTN()])
    made = exported(
        tmp_path / "out", random_model(*MODELS["llama-tied"]), tokenizer, Scheme.of(4), algorithm=rotate
    )
    assert "output.weight" in {tensor.name for tensor in GGUFReader(made.file).tensors}
    ids = torch.arange(40)[None]
    read, _ = made.format.reader(made.folder, None)
    with torch.inference_mode():
        assert torch.equal(read(ids), made.store()(ids).logits)


def test_the_file_says_what_it_rounded(tmp_path, tokenizer):
    model = random_model(*MODELS["llama"])
    made = exported(tmp_path / "out", model, tokenizer, Scheme.of(4, group_size=32), "gguf-q4_0")
    assert "14 layers rounded anew to q4_0" in told(made.file)["general.description"]
    assert "own codes" not in made.format.statement()
    assert all(not torch.equal(*pair) for pair in made.weights.values())


@pytest.mark.parametrize(("to", "rounds"), [("gguf-f16", False), ("gguf-q8_0", True)])
def test_that_inputs_are_rounded_is_said_of_quantized_types_alone(tmp_path, tokenizer, to, rounds):
    made = exported(tmp_path / "out", random_model(*MODELS["llama"]), tokenizer, Scheme.of(4), to)
    assert any("rounds the inputs" in note for note in made.format.notes()) == rounds


def test_the_metadata_are_the_models(tmp_path, tokenizer):
    model = random_model(*MODELS["mistral"])
    made = exported(tmp_path / "out", model, tokenizer, Scheme.of(4))
    said, config = told(made.file), model.config
    assert said["general.architecture"] == "llama"
    assert said["llama.context_length"] == config.sliding_window
    assert said["llama.attention.head_count_kv"] == config.num_key_value_heads
    assert said["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps, rel=2.0**-23)
    assert said["tokenizer.ggml.tokens"][: len(tokenizer)] == tokenizer.convert_ids_to_tokens(
        range(len(tokenizer))
    )
    assert len(said["tokenizer.ggml.tokens"]) == 512
    assert said["tokenizer.ggml.pre"] == "gpt-2"


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_not_read(tmp_path, tokenizer, cut):
    made = exported(tmp_path / "out", random_model(*MODELS["llama"]), tokenizer, Scheme.of(4))
    whole = made.file.read_bytes()
    made.file.write_bytes(whole[: int(len(whole) * cut)])
    with pytest.raises(OSError, match=r"model.gguf has \d+ bytes, qbench_manifest.json says"):
        made.format.reader(made.folder, None)
    (made.folder / MANIFEST).unlink()
    with pytest.raises(OSError, match="damaged or cut off"):
        made.format.reader(made.folder, None)


REFUSED = {
    "inputs": (
        Scheme.of(8, 8, group_size=32, weight_symmetric=True),
        RTN(),
        {},
        "rounds inputs of quantized layers",
    ),
    "cache": (Scheme.of(4, kvbits=8), RTN(), {}, "says nothing of keys and values"),
    "groups of 16": (Scheme.of(4, group_size=16), RTN(), {}, "no type of GGUF has the recipe's grid"),
    "8 bits": (Scheme.of(8), RTN(), {}, "no type of GGUF has the recipe's grid"),
    "nvfp4": (Scheme.of(4, weight_format="nvfp4"), RTN(), {}, "no type of GGUF has the recipe's grid"),
    "kept": (
        Scheme.of(4),
        Pipeline([OWQ(), GPTQ()]),
        {},
        "codes of one grid for a layer, not channels that stay",
    ),
    "online": (
        Scheme.of(4),
        Pipeline([QuaRot(), RTN()]),
        {},
        "Hadamard matrices that inputs are multiplied by",
    ),
    "activation": (Scheme.of(4), RTN(), {"hidden_act": "gelu"}, "hidden_act is gelu"),
    "rotary": (Scheme.of(4), RTN(), rope("dynamic", factor=2.0), "its type is dynamic"),
    "attention of YaRN": (
        Scheme.of(4),
        RTN(),
        rope("yarn", factor=2.0, attention_factor=1.5),
        "YaRN with factors",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_has_not_is_refused_before_weights_are_loaded(name):
    scheme, algorithm, changed, why = REFUSED[name]
    with torch.device("meta"):
        skeleton = random_model("llama", changed)
    with pytest.raises(Unsuitable, match=why):
        FORMATS["gguf"](Source(skeleton, algorithm, scheme, torch.float32)).check()


@pytest.mark.parametrize(
    ("kind", "why"), [("opt", "opt is none of them"), ("qwen3", "no place for .*q_proj.bias")]
)
def test_other_architectures_are_refused_by_name(kind, why):
    changed = {"attention_bias": True} if kind == "qwen3" else {"word_embed_proj_dim": 128}
    with torch.device("meta"):
        skeleton = random_model(kind, changed)
    with pytest.raises(Unsuitable, match=why):
        FORMATS["gguf"](Source(skeleton, RTN(), Scheme.of(4), torch.float32)).check()


def test_types_that_llama_cpp_rounds_to_need_it(monkeypatch):
    monkeypatch.setattr(gguf, "has_llamacpp", lambda: False)
    with torch.device("meta"):
        skeleton = random_model("llama", {"hidden_size": 256})
    for kind in KINDS.values():
        form = FORMATS[f"gguf-{kind.name}"](Source(skeleton, RTN(), Scheme.of(4), torch.float32))
        if kind.needs_llamacpp:
            with pytest.raises(
                Unsuitable, match=r"rounded by llama.cpp itself; pip install 'qbench\[llamacpp\]'"
            ):
                form.check()
        else:
            form.check()


@pytest.mark.parametrize("name", [name for name, _ in _ways()])
def test_how_text_is_cut_is_recognized(name):
    (way, whole) = next((way, whole) for (known, whole), way in _ways().items() if known == name)
    found = vocabulary_of(byte_level(way, whole), 600)
    assert (found.kind, found.pre) == ("gpt2", name)
    assert len(found.tokens) == len(found.types) == 600


def test_tokenizers_that_cut_or_change_text_otherwise_are_refused():
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("e"), "isolated"), plain])
    with pytest.raises(Unsuitable, match="cuts text in a way of its own; known are those of gpt-2"):
        vocabulary_of(byte_level(words), 512)
    with pytest.raises(Unsuitable, match="cuts text in a way of its own"):
        vocabulary_of(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), 512)
    lower = byte_level(plain)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(Unsuitable, match="normalizes text"):
        vocabulary_of(lower, 512)
    with pytest.raises(Unsuitable, match=r"it has \d+ tokens, and the embedding 64 rows"):
        vocabulary_of(lower, 64)


def test_pieces_of_sentence_piece_have_scores_in_the_order_of_their_merges():
    text = Path(__file__).read_text()
    tokenizer = sentence_piece((text,))
    found = vocabulary_of(tokenizer, 512)
    assert (found.kind, found.begins, found.ends, found.prefix) == ("llama", True, False, True)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    made = list(dict.fromkeys("".join(pair) for pair in merges))
    assert sorted(made, key=lambda token: -found.scores[found.tokens.index(token)]) == made
    with pytest.raises(Unsuitable, match="every two pieces of a token must be"):
        vocabulary_of(sentence_piece((text,), every=False), 512)


def test_a_piece_that_no_merge_makes_is_refused():
    """llama.cpp would make it of its parts."""
    spec = json.loads(sentence_piece((Path(__file__).read_text(),)).backend_tokenizer.to_str())
    first = "".join(spec["model"]["merges"][0])
    spec["model"]["vocab"][3 * first] = len(spec["model"]["vocab"])
    spec["model"]["vocab"][2 * first] = len(spec["model"]["vocab"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<s>", eos_token="</s>"
    )
    with pytest.raises(Unsuitable, match="it does not merge"):
        vocabulary_of(tokenizer, 600)


def test_embedded_models_are_taken():
    for name in ("zoo/micro-llama", "zoo/nano-llama"):
        ref = ModelRef(name)
        form = FORMATS["gguf"](Source(ref.skeleton(), RTN(), Scheme.of(4), torch.float32))
        form.check()
        form.check_tokenizer(ref.tokenizer())
