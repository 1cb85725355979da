"""The sizes of every family against transformers' own tiny models: parameters, cache, operations; and what uses them."""

import itertools
import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from qbench.deploy.devices import device
from qbench.deploy.roofline import Bits, latency, memory, operators
from qbench.models.anatomy import linears_of
from qbench.models.experts import unpack
from qbench.models.recorded import shape_from
from qbench.models.shape import shape_of, sizes_of

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128,
         "max_position_embeddings": 64}  # fmt: skip
DENSE = SIZES | {"intermediate_size": 112, "num_key_value_heads": 2}
HEADS = DENSE | {"head_dim": 24}  # wider than the residual stream
EXPERTS = DENSE | {"num_experts": 5, "num_local_experts": 5, "n_routed_experts": 5, "num_experts_per_tok": 2,
                   "moe_intermediate_size": 40}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 28, "qk_nope_head_dim": 16,
          "qk_rope_head_dim": 8, "v_head_dim": 20}  # fmt: skip
DEEPSEEK = (
    EXPERTS | LATENT | {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
)
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64}
FALCON = SIZES | {"new_decoder_architecture": False, "bias": False}
MAMBA = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "state_size": 8}
PADDED = {"pad_token_id": 0}
FAMILIES = {
    "opt": SIZES | {"ffn_dim": 112, "word_embed_proj_dim": 64}, "opt:projected": SIZES | {"word_embed_proj_dim": 24},
    "llama": DENSE, "mistral": DENSE, "qwen2": DENSE, "qwen3": HEADS,
    "falcon": FALCON | {"multi_query": True}, "falcon:sequential": FALCON | {"multi_query": False, "parallel_attn": False},
    "falcon:alibi": FALCON | {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True},
    "falcon:new": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128},
    "mixtral": EXPERTS, "glm": HEADS | PADDED, "glm4": HEADS | PADDED, "stablelm": DENSE,
    "gemma": HEADS, "gemma2": HEADS, "gemma3_text": HEADS,
    "mamba": MAMBA, "mamba2": MAMBA | {"num_heads": 8, "head_dim": 16, "n_groups": 2}, "falcon_mamba": MAMBA,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 72, "mlp_only_layers": [0]}, "qwen3_moe": EXPERTS,
    "deepseek_v2": DEEPSEEK, "deepseek_v3": DEEPSEEK, "minicpm3": DENSE | LATENT,
    "phi": DENSE, "phi3": DENSE | PADDED, "phimoe": EXPERTS, "gpt2": GPT, "gptj": GPT | {"rotary_dim": 8},
    "gpt_neox": SIZES | {"intermediate_size": 112},
    "gpt_neox:serial": SIZES | {"intermediate_size": 112, "use_parallel_residual": False},
    "gpt_bigcode": GPT, "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 128, "max_seq_len": 64},
    "granite": DENSE, "granitemoe": EXPERTS, "olmo": DENSE, "olmo2": DENSE, "olmoe": EXPERTS, "cohere": DENSE,
    "starcoder2": DENSE, "smollm3": DENSE | PADDED, "internlm3": HEADS,
    "gpt_oss": EXPERTS | HEADS, "glm4_moe": DEEPSEEK | {"head_dim": 16}, "xglm": {
        "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 112, "vocab_size": 128,
    },
    "jamba": EXPERTS | {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
    "falcon_h1": DENSE | {"mamba_d_ssm": 64, "mamba_n_heads": 4},
    "qwen3_next": EXPERTS | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
}  # fmt: skip
MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "granitemoe", "olmoe"]
# Torch does not count the multiplications of their scans.
RECURRENT = {"mamba", "mamba2", "falcon_mamba", "jamba", "falcon_h1", "qwen3_next"}
GPU = device("h100")


def config_of(name):
    return AutoConfig.for_model(name.split(":")[0], **FAMILIES[name])


def model_of(name):
    torch.manual_seed(0)
    one_by_one = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_config(config_of(name), **one_by_one).eval()


def weights_in(block):
    """Elements of all matrices, by their axes alone."""
    aside = re.compile("conv|A_log|bias|norm")  # of two axes or three, and no linear layers
    return sum(p.numel() for name, p in block.named_parameters() if p.dim() > 1 and not aside.search(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_and_every_matrix_is_counted(name):
    model, shape = model_of(name), shape_of(config_of(name))
    assert shape.n_parameters == sum(p.numel() for p in model.parameters())
    (blocks,) = [
        m for k, m in model.named_modules() if re.fullmatch(r"(\w+\.)+(layers|h|blocks)", k) and len(m) == 2
    ]
    for kind in shape.blocks:
        for index in kind.at:
            assert sum(x.n_weights for x in kind.linears) == weights_in(blocks[index])
    assert sorted(i for kind in shape.blocks for i in kind.at) == [0, 1]
    assert shape.n_embedding == model.get_output_embeddings().weight.numel()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_token_leaves_in_the_cache_what_the_shape_says(name):
    shape, batch, tokens = shape_of(config_of(name)), 3, 5
    output = model_of(name)(torch.arange(batch * tokens).view(batch, tokens), use_cache=True)
    cache = next(output[key] for key in ("cache", "past_key_values", "cache_params") if key in output)
    keys = [x for x in cache.layers if isinstance(getattr(x, "keys", None), torch.Tensor)]
    elements = sum(x.keys.numel() + x.values.numel() for x in keys)
    assert elements == batch * tokens * shape.cached_elements
    states = [x for x in cache.layers if hasattr(x, "conv_states")]
    kept = sum(s.numel() for x in states for s in (*x.conv_states.values(), *x.recurrent_states.values()))
    assert kept == batch * sum(len(b.at) * b.recurrence.kept for b in shape.blocks if b.recurrence)
    assert elements + kept > 0
    # No engine need keep what is kept twice: Falcon's new decoder repeats each of two heads for two queries.
    assert shape.cached_elements == shape.kv_elements * (2 if name == "falcon:new" else 1)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - RECURRENT - {"opt:projected"}))
def test_a_prefill_does_the_multiplications_that_torch_counts(name):
    shape, tokens, model = shape_of(config_of(name)), 6, model_of(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(tokens).view(1, -1), use_cache=False)
    found = operators(shape, Bits(16), 1, tokens, "prefill")
    matrices = [op for op in found if op.weight_bytes or op.name in ("qk_matmul", "pv_matmul")]
    assert sum(op.count * op.operations for op in matrices) == counter.get_total_flops()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_shape_survives_a_record(name):
    shape = shape_of(config_of(name))
    assert shape_from(json.loads(json.dumps(asdict(shape)))) == shape


def test_a_record_of_before_there_were_kinds_of_blocks_is_read():
    shape, old = shape_of(config_of("llama")), {
        "hidden": 64, "ffn": 112, "head_dim": 16, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "vocab": 128,
        "embedding": 64, "tied": False, "gated_mlp": True, "n_other": 320,
    }  # fmt: skip
    assert shape_from(old) == shape
    opt = shape_from(old | {"gated_mlp": False, "n_kv_heads": 4, "tied": True})
    assert list(opt.linears.values()) == [(64, 64)] * 4 + [(64, 112), (112, 64)]
    with pytest.raises(TypeError, match="ffn"):
        shape_from({"hidden": 64})


def test_reading_the_sizes_leaves_the_skeleton_and_the_config_as_they_were():
    config = config_of("mixtral")
    before = config.to_dict()
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    modules = [m for m in skeleton.modules() if m._forward_hooks or "forward" in vars(m)]
    assert sizes_of(skeleton) == shape_of(config) == sizes_of(skeleton)
    assert [m for m in skeleton.modules() if m._forward_hooks or "forward" in vars(m)] == modules
    assert config.to_dict() == before


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_counted_alike_fused_and_unpacked(name):
    model = model_of(name)
    fused = [set(linears_of(model, block, [])) for block in model.model.layers]
    unpack(model)
    assert [set(linears_of(model, block, [])) for block in model.model.layers] == fused
    assert any(x.count == 5 and x.active == 2 for block in fused for x in block)


def test_blocks_that_differ_are_of_different_kinds():
    first, second = shape_of(config_of("deepseek_v3")).blocks
    assert (first.at, second.at) == ((0,), (1,))
    assert first.attention == second.attention
    assert {x.role for x in first.linears} == {"attention", "mlp"}
    assert {x.role for x in second.linears} == {"attention", "mlp", "expert", "router"}
    assert (first.activations, second.activations) == (((224, 112, 1),), ((80, 40, 2), (80, 40, 1)))
    with pytest.raises(ValueError, match="2 kinds of blocks"):
        _ = shape_of(config_of("deepseek_v3")).linears
    config = AutoConfig.for_model("gemma3_text", **HEADS | {"num_hidden_layers": 7}, sliding_window=32)
    local, whole = shape_of(config).blocks  # every sixth looks back over everything
    assert (local.at, whole.at) == ((0, 1, 2, 3, 4, 6), (5,))
    assert (local.attention.window, whole.attention.window) == (32, None)


def test_the_published_counts_of_mixtral_are_met():
    """46.7B parameters, of which a token uses 12.9B: Mistral AI, "Mixtral of experts", 2023."""
    shape = shape_of(AutoConfig.for_model("mixtral"))
    assert round(shape.n_parameters / 1e9, 1) == 46.7
    assert round(shape.n_active_parameters / 1e9, 1) == 12.9


def test_the_published_cache_of_deepseek_is_met():
    """Per token and block 9/2 of a head's width: DeepSeek-AI, "DeepSeek-V2", 2024, table 1; the same in its successor."""
    shape = shape_of(AutoConfig.for_model("deepseek_v3", num_hidden_layers=4))
    assert shape.kv_elements == 4 * (512 + 64) == 4 * 128 * 9 // 2
    attention = shape.blocks[0].attention
    assert (attention.n_heads, attention.key_dim, attention.value_dim) == (128, 192, 128)


@pytest.mark.parametrize(("kind", "why"), [("openai-gpt", "its cache has 0 layers for the 1 blocks of transformer.h"),
                                           ("jetmoe", "no token can be sent through its skeleton")])  # fmt: skip
def test_what_is_not_understood_is_said(kind, why):
    with pytest.raises(NotImplementedError, match=f"model_type '{kind}' cannot be read: {why}"):
        shape_of(AutoConfig.for_model(kind, num_hidden_layers=1, n_layer=1))


def test_a_matrix_that_no_layer_holds_is_refused():
    model = model_of("llama")
    model.model.layers[1].mlp.extra = torch.nn.Parameter(torch.zeros(64, 8))
    with pytest.raises(NotImplementedError, match=r"mlp\.extra, \(64, 8\), is no layer that is known"):
        sizes_of(model.to("meta"))


def test_blocks_that_share_weights_are_refused():
    model = model_of("llama").to("meta")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(NotImplementedError, match=r"some of model\.layers share weights"):
        sizes_of(model)


# The roofline


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"qwen3_next"}))
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_family_has_a_roofline(name, phase):
    shape, bits = shape_of(config_of(name)), Bits(4.25, kv=8)
    plain, fused = (latency(shape, bits, GPU, 2, 48, phase, fused=fused) for fused in (False, True))
    assert 0 < fused.seconds <= plain.seconds
    assert memory(shape, bits, 2, 48).kv > 0
    assert memory(shape, Bits(16), 1, 1).weights == 2 * shape.n_parameters


def test_a_state_that_is_not_described_has_no_roofline():
    with pytest.raises(
        NotImplementedError, match=r"operators of Qwen3NextGatedDeltaNet, .* are not described"
    ):
        operators(shape_of(config_of("qwen3_next")), Bits(16), 1, 8, "decode")


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_experts_are_read_as_often_as_they_are_expected_to_be_chosen(rows):
    """Over all choices that `rows` tokens may make."""
    shape = shape_of(config_of("mixtral"))
    choices = list(itertools.combinations(range(5), 2))
    together = [len(set().union(*chosen)) for chosen in itertools.product(choices, repeat=rows)]
    expected = sum(together) / len(together)
    found = {op.name: op for op in operators(shape, Bits(8), rows, 4, "decode")}
    assert found["down_proj"].weight_bytes == pytest.approx(64 * 112 * expected, rel=1e-12)
    assert found["down_proj"].operations == 2 * 2 * 64 * 112 * rows
    assert found["gate"].weight_bytes == 2 * 5 * 64, "a router is of 16 bits"


def test_experts_of_a_large_batch_are_all_read_and_never_twice():
    found = operators(shape_of(config_of("mixtral")), Bits(16), 1000, 4, "decode")
    assert next(op for op in found if op.name == "up_proj").weight_bytes == pytest.approx(2 * 5 * 64 * 112)


def test_latent_attention_reads_the_latent_and_not_what_is_made_of_it():
    shape, batch, context = shape_of(config_of("minicpm3")), 3, 50
    found = {op.name: op for op in operators(shape, Bits(16, kv=8), batch, context, "decode")}
    tokens = batch * context
    assert (found["qk_matmul"].kv_read_bytes, found["pv_matmul"].kv_read_bytes) == (36 * tokens, 28 * tokens)
    (fused,) = (op for op in operators(shape, Bits(16, kv=8), batch, context, "decode", on_chip=GPU.on_chip)
                if op.name == "fused_attention")  # fmt: skip
    assert fused.kv_read_bytes == 36 * tokens, "the latent is key and value at once"
    assert memory(shape, Bits(16, kv=8), batch, context).kv == 2 * 36 * tokens
    assert found["kv_a_proj_with_mqa"].kv_written_bytes == 36 * batch
    first = {op.name: op for op in operators(shape, Bits(16, kv=8), batch, context, "prefill")}
    assert first["qk_matmul"].kv_read_bytes == 0
    assert first["qk_matmul"].read_bytes == 2 * tokens * 4 * 24 * 2, (
        "queries and keys, of 4 heads, in two bytes"
    )


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_window_costs_no_more_than_its_width(phase):
    windowed = shape_of(AutoConfig.for_model("mistral", **DENSE, sliding_window=16))
    (block,) = windowed.blocks
    whole = replace(windowed, blocks=(replace(block, attention=replace(block.attention, window=None)),))
    short, long = ({op.name: op for op in operators(windowed, Bits(16), 1, n, phase)} for n in (16, 64))
    assert operators(windowed, Bits(16), 1, 16, phase) == operators(whole, Bits(16), 1, 16, phase)
    assert long["qk_matmul"].kv_read_bytes == short["qk_matmul"].kv_read_bytes
    times = 4 if phase == "prefill" else 1
    assert long["softmax"].operations == times * short["softmax"].operations
    assert memory(windowed, Bits(16), 1, 64).kv == memory(whole, Bits(16), 1, 16).kv


def test_mamba_decodes_at_the_same_speed_after_any_context():
    shape = shape_of(config_of("mamba"))
    one, many = (latency(shape, Bits(16), GPU, 2, n, "decode") for n in (1, 4096))
    assert one == many
    assert memory(shape, Bits(16), 2, 4096).kv == 2 * 2 * 2 * (128 * 4 + 128 * 8)
    found = {op.name: op for op in one.operators}
    # x, step, gate and output of 128 channels and two of 8 for each sequence; the state of 128 x 8 read and written.
    assert found["scan"].bytes == 2 * 2 * (4 * 128 + 2 * 8 + 2 * 128 * 8)
    assert found["conv1d"].bytes == 2 * 2 * (2 * 128 + 2 * 128 * 4)
    second = {op.name: op for op in operators(shape_of(config_of("mamba2")), Bits(16), 1, 6, "prefill")}
    # 128 channels and two groups' inputs and outputs of 8, 8 heads' steps, gate, output; the state is only written.
    assert second["scan"].bytes == 2 * (6 * (160 + 8 + 128 + 128) + 8 * 16 * 8)


def test_a_parallel_block_has_one_norm_and_two_sums():
    names = [op.name for op in operators(shape_of(config_of("phi")), Bits(16), 1, 8, "prefill")]
    assert [n for n in names if "norm" in n or "add" in n] == ["norm_0", "attn_add", "mlp_add"]
