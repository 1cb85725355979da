"""The architectures that are described: the only file that knows module names, and one value for each.

A new one is a value here; `tests/test_families.py` puts it under every law once its smallest config is listed there.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qbench.models.family import Family, Fused, Heads, Link

ATTENTION = (
    Link("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Link("self_attn.v_proj", ("self_attn.o_proj",)),
)
GATED = (
    Link("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Link("mlp.up_proj", ("mlp.down_proj",)),
)
ROUTER = "chooses experts"
READ_DIRECTLY = "its weight is read, and the layer never called"

LLAMA = Family(
    blocks="model.layers",
    links=(*ATTENTION, *GATED),
    norms=("input_layernorm", "post_attention_layernorm"),
    query_key=("self_attn.q_proj", "self_attn.k_proj"),
    value="self_attn.v_proj",
    attention_out="self_attn.o_proj",
    mlp_out=("mlp.down_proj",),
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
)

OPT = Family(
    blocks="model.decoder.layers",
    links=(
        Link("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Link("self_attn.v_proj", ("self_attn.out_proj",)),
        Link("final_layer_norm", ("fc1",)),
        Link("fc1", ("fc2",)),  # ReLU commutes with a positive scale
    ),
    norms=("self_attn_layer_norm", "final_layer_norm"),
    query_key=("self_attn.q_proj", "self_attn.k_proj"),
    value="self_attn.v_proj",
    attention_out="self_attn.out_proj",
    mlp_out=("fc2",),
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    final_norm="model.decoder.final_layer_norm",
    rotary="none",
)


def _without(family: Family, *norms: str) -> Family:
    """With norms that feed more than linear layers, so that they are no source."""
    links = tuple(replace(k, source=None) if k.source in norms else k for k in family.links)
    return replace(
        family, links=links, norms=tuple(n for n in family.norms if n not in norms), final_norm=None
    )


# opt-350m normalizes after the residual sum, so its norms also feed the residual stream.
OPT_POST_NORM = _without(OPT, *OPT.norms)


def _experts(
    family: Family, at: str = "mlp", router: str = "gate", shared: str = "", last: bool = False
) -> Family:
    """The same with experts in some blocks, in all, or in none, beside a shared expert where there is one.

    Args:
        last: The shared expert runs after the others.
    """
    own = [f"{at}.experts.*.gate_proj", f"{at}.experts.*.up_proj"]
    common = [f"{at}.{shared}.gate_proj", f"{at}.{shared}.up_proj"] if shared else []
    dense = [link for link in GATED if at == "mlp"]
    norm = Link(
        "post_attention_layernorm",
        (*(name for link in dense[:1] for name in link.sinks), *(own + common if last else common + own)),
        also=(f"{at}.{router}", f"{at}.shared_expert_gate"),
        at=at,
    )
    units = [f"{at}.experts.*"] + ([f"{at}.{shared}"] if shared else [])
    inside = [Link(f"{unit}.up_proj", (f"{unit}.down_proj",)) for unit in units]
    return replace(
        family,
        links=(*(k for k in family.links if k not in GATED), norm, *dense[1:], *inside),
        mlp_out=(*family.mlp_out, *(f"{unit}.down_proj" for unit in units)),
        kept=((f"{at}.{router}", ROUTER), (f"{at}.shared_expert_gate", "weighs the shared expert")),
    )


MIXTRAL = _experts(LLAMA)
# What attention adds is normalized first, or norms come after the residual stream is read: it cannot be rotated.
SANDWICH = replace(
    _without(LLAMA, "post_attention_layernorm"),
    links=(*ATTENTION, Link("pre_feedforward_layernorm", GATED[0].sinks), GATED[1]),
    norms=("input_layernorm", "pre_feedforward_layernorm"),
)
POST_NORM = _without(LLAMA, "input_layernorm", "post_attention_layernorm")

GATE_UP = (
    Link("post_attention_layernorm", ("mlp.gate_up_proj",)),
    Link("mlp.gate_up_proj", ("mlp.down_proj",), "second half"),
)
GLM = replace(LLAMA, links=(*ATTENTION, *GATE_UP), rotary="other")
PHI3 = replace(
    LLAMA,
    links=(
        Link("input_layernorm", ("self_attn.qkv_proj",)),
        Link("self_attn.qkv_proj", ("self_attn.o_proj",), "values"),
        *GATE_UP,
    ),
    query_key=("self_attn.qkv_proj",),
    value="self_attn.qkv_proj",
)

LATENT = replace(
    LLAMA,
    links=(
        Link("input_layernorm", ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
        Link("self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
        Link("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
        Link("self_attn.kv_b_proj", ("self_attn.o_proj",), "values"),
        *GATED,
    ),
    query_key=(
        "self_attn.q_proj",
        "self_attn.q_b_proj",
        "self_attn.kv_a_proj_with_mqa",
        "self_attn.kv_b_proj",
    ),
    value="self_attn.kv_b_proj",
    rotary="other",
)

PHI = replace(
    LLAMA,
    links=(
        Link("input_layernorm", (*ATTENTION[0].sinks, "mlp.fc1")),
        Link("self_attn.v_proj", ("self_attn.dense",)),
        Link(None, ("mlp.fc2",)),
    ),
    norms=("input_layernorm",),
    attention_out="self_attn.dense",
    mlp_out=("mlp.fc2",),
    final_norm="model.final_layernorm",
    rotary="other",
)
COHERE = replace(
    LLAMA,
    links=(Link("input_layernorm", (*ATTENTION[0].sinks, *GATED[0].sinks)), ATTENTION[1], GATED[1]),
    norms=("input_layernorm",),
    rotary="other",
)
STARCODER2 = replace(
    LLAMA,
    links=(*ATTENTION, Link("post_attention_layernorm", ("mlp.c_fc",)), Link(None, ("mlp.c_proj",))),
    mlp_out=("mlp.c_proj",),
)

GPT2 = Family(
    blocks="transformer.h",
    links=(
        Link("ln_1", ("attn.c_attn",)),
        Link("attn.c_attn", ("attn.c_proj",), "values"),
        Link("ln_2", ("mlp.c_fc",)),
        Link(None, ("mlp.c_proj",)),
    ),
    norms=("ln_1", "ln_2"),
    query_key=("attn.c_attn",),
    value="attn.c_attn",
    attention_out="attn.c_proj",
    mlp_out=("mlp.c_proj",),
    embeddings=("transformer.wte", "transformer.wpe"),
    final_norm="transformer.ln_f",
    rotary="none",
)
GPTJ = replace(
    GPT2,
    links=(
        Link("ln_1", ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in")),
        Link("attn.v_proj", ("attn.out_proj",)),
        Link(None, ("mlp.fc_out",)),
    ),
    norms=("ln_1",),
    query_key=("attn.q_proj", "attn.k_proj"),
    value="attn.v_proj",
    attention_out="attn.out_proj",
    mlp_out=("mlp.fc_out",),
    embeddings=("transformer.wte",),
    rotary="other",
)

NEOX = Family(
    blocks="gpt_neox.layers",
    links=(
        Link("input_layernorm", ("attention.query_key_value",)),
        Link("attention.query_key_value", ("attention.dense",), "values"),
        Link("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        Link(None, ("mlp.dense_4h_to_h",)),
    ),
    norms=("input_layernorm", "post_attention_layernorm"),
    query_key=("attention.query_key_value",),
    value="attention.query_key_value",
    attention_out="attention.dense",
    mlp_out=("mlp.dense_4h_to_h",),
    embeddings=("gpt_neox.embed_in",),
    final_norm="gpt_neox.final_layer_norm",
    rotary="other",
)

BLOOM = Family(
    blocks="transformer.h",
    links=(
        Link("input_layernorm", ("self_attention.query_key_value",)),
        Link("self_attention.query_key_value", ("self_attention.dense",), "values"),
        Link("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        Link(None, ("mlp.dense_4h_to_h",)),
    ),
    norms=("input_layernorm", "post_attention_layernorm"),
    query_key=("self_attention.query_key_value",),
    value="self_attention.query_key_value",
    attention_out="self_attention.dense",
    mlp_out=("mlp.dense_4h_to_h",),
    embeddings=("transformer.word_embeddings",),
    final_norm=None,  # the stream begins behind a norm, whose gains would stand between it and a rotation
    rotary="none",
    attention="own",
    returns_tuple=True,
)
FALCON = replace(BLOOM, final_norm="transformer.ln_f", rotary="halves")
FALCON_PARALLEL = replace(
    FALCON,
    links=(
        Link("input_layernorm", ("self_attention.query_key_value", "mlp.dense_h_to_4h")),
        FALCON.links[1],
        FALCON.links[3],
    ),
    norms=("input_layernorm",),
)
FALCON_NEW = replace(
    FALCON,
    links=(
        Link("ln_attn", ("self_attention.query_key_value",)),
        FALCON.links[1],
        Link("ln_mlp", ("mlp.dense_h_to_4h",)),
        FALCON.links[3],
    ),
    norms=("ln_attn", "ln_mlp"),
)

MPT = Family(
    blocks="transformer.blocks",
    links=(
        Link("norm_1", ("attn.Wqkv",)),
        Link("attn.Wqkv", ("attn.out_proj",), "values"),
        Link("norm_2", ("ffn.up_proj",)),
        Link(None, ("ffn.down_proj",)),
    ),
    norms=("norm_1", "norm_2"),
    query_key=("attn.Wqkv",),
    value="attn.Wqkv",
    attention_out="attn.out_proj",
    mlp_out=("ffn.down_proj",),
    embeddings=("transformer.wte",),
    final_norm="transformer.norm_f",
    rotary="none",
    attention="own",
    returns_tuple=True,
)

MAMBA = Family(
    blocks="backbone.layers",
    links=(
        Link("norm", ("mixer.in_proj",)),
        Link(None, ("mixer.x_proj",)),
        Link(None, ("mixer.out_proj",)),  # the gate's SiLU stands between it and the scan
    ),
    norms=("norm",),
    query_key=(),
    value=None,
    attention_out="mixer.out_proj",
    mlp_out=(),
    embeddings=("backbone.embeddings",),
    final_norm="backbone.norm_f",
    rotary="none",
    kept=(("mixer.dt_proj", READ_DIRECTLY), ("mixer.conv1d", "a convolution over time")),
    attention="none",
)
MAMBA2 = replace(MAMBA, links=(MAMBA.links[0], Link("mixer.norm", ("mixer.out_proj",))))


def _opt(config: Any) -> Family:
    family = OPT if config.do_layer_norm_before else OPT_POST_NORM
    if config.activation_function != "relu":  # Galactica's GELU
        family = replace(family, links=(*family.links[:-1], replace(family.links[-1], source=None)))
    projected = config.word_embed_proj_dim != config.hidden_size
    return replace(family, final_norm=None) if projected or config._remove_final_layer_norm else family


def _falcon(config: Any) -> Family:
    if config.new_decoder_architecture:
        two = getattr(config, "num_ln_in_parallel_attn", None) in (None, 2)
        family = FALCON_NEW if two else FALCON_PARALLEL
    else:
        family = FALCON_PARALLEL if config.parallel_attn else FALCON
    return replace(family, rotary="none") if config.alibi else family


def _stablelm(config: Any) -> Family:
    rotary = replace(LLAMA, rotary="other")  # of a part of each head
    if not config.use_parallel_residual:
        return rotary
    return replace(COHERE, rotary="other")


def _bloom(config: Any) -> Family:
    return _without(BLOOM, *BLOOM.norms) if config.apply_residual_connection_post_layernorm else BLOOM


DESCRIBED: dict[str, Family | Callable[[Any], Family]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "granite": LLAMA,
    "smollm3": LLAMA,
    "olmo": LLAMA,
    "gemma": LLAMA,
    "internlm3": LLAMA,
    "opt": _opt,
    "falcon": _falcon,
    "bloom": _bloom,
    "mpt": MPT,
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gptj": GPTJ,
    "gpt_neox": NEOX,
    "phi": PHI,
    "phi3": PHI3,
    "starcoder2": STARCODER2,
    "stablelm": _stablelm,
    "cohere": COHERE,
    "cohere2": COHERE,
    "glm": GLM,
    "glm4": replace(GLM, final_norm=None),
    "gemma2": SANDWICH,
    "gemma3_text": SANDWICH,
    "olmo2": POST_NORM,
    "olmo3": POST_NORM,
    "mixtral": MIXTRAL,
    "olmoe": MIXTRAL,
    "qwen3_moe": MIXTRAL,
    "phimoe": _experts(LLAMA, router="router"),
    "granitemoe": _experts(LLAMA, at="block_sparse_moe", router="router"),
    "qwen2_moe": _experts(LLAMA, shared="shared_expert"),
    "deepseek_v2": _experts(LATENT, shared="shared_experts", last=True),
    "deepseek_v3": _experts(LATENT, shared="shared_experts", last=True),
    "glm4_moe": replace(_experts(LLAMA, shared="shared_experts", last=True), rotary="other"),
    "minicpm3": LATENT,
    "mamba": MAMBA,
    "falcon_mamba": MAMBA,
    "mamba2": MAMBA2,
}

STACKED = {"phi3", "mpt", "gpt2", "gpt_bigcode"}
GROUPED = {"falcon", "bloom", "gpt_neox"}


def described(config: Any) -> Family | None:
    """The family of a config, with its heads; `None` if it is not described."""
    entry = DESCRIBED.get(config.model_type)
    if entry is None:
        return None
    family = entry(config) if callable(entry) else entry
    if family.attention == "none":
        return family
    if _clips(config):  # a scale or a rotation of values would not come through
        links = tuple(
            replace(k, source=None, part="all") if k.source == family.value else k for k in family.links
        )
        family = replace(family, links=links, value=None)
    return replace(family, heads=heads_of(config))


def _clips(config: Any) -> bool:
    """Whether queries, keys and values are clipped to a fixed range."""
    return any(getattr(part, "clip_qkv", None) for part in (config, getattr(config, "attn_config", None)))


def heads_of(config: Any) -> Heads:
    """The heads of an architecture's attention, from its config."""
    kind, queries = config.model_type, int(config.num_attention_heads)
    if getattr(config, "kv_lora_rank", None):
        size = int(config.qk_nope_head_dim + config.qk_rope_head_dim)
        return Heads(queries, queries, size, int(config.v_head_dim), "latent")
    fused: Fused = "stacked" if kind in STACKED else "grouped" if kind in GROUPED else "apart"
    size = int(getattr(config, "head_dim", None) or config.hidden_size // queries)
    keys = int(getattr(config, "num_key_value_heads", None) or queries)
    if kind == "falcon":
        keys = (
            config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else queries
        )
    if kind == "gpt_bigcode":
        keys, fused = (1, "stacked") if config.multi_query else (queries, "grouped")
    return Heads(queries, keys, size, size, fused)
