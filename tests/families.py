"""The smallest configuration of every described family: a new family is one line here, and under every law."""

import copy
import functools

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from qbench.models.experts import unpack

_SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = _SIZES | {
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_WIDE = _LLAMA | {"head_dim": 8}
_ROUTED = _WIDE | {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = _LLAMA | {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "head_dim": 8,
}  # fmt: skip
_DEEPSEEK = _LATENT | {
    "n_routed_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}  # fmt: skip
_FALCON = _SIZES | {
    "bias": False,
    "new_decoder_architecture": False,
    "multi_query": True,
    "parallel_attn": True,
}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
_MAMBA = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}

# By name: `<model_type>`, or `<model_type>:<variant>`.
SIZES: dict[str, dict[str, object]] = {
    "llama": _LLAMA,
    "llama:mha-tied": _LLAMA | {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama:biased": _LLAMA | {"attention_bias": True, "mlp_bias": True},
    "mistral": _LLAMA | {"sliding_window": 8},
    "ministral": _WIDE,
    "qwen2": _LLAMA,
    "qwen3": _WIDE,
    "granite": _LLAMA | {"residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "smollm3": _LLAMA,
    "internlm3": _WIDE,
    "olmo": _LLAMA,
    "olmo:clipped": _LLAMA | {"clip_qkv": 0.5},
    "olmo2": _LLAMA,
    "olmo3": _LLAMA,
    "gemma": _WIDE,
    "gemma2": _WIDE | {"sliding_window": 8},
    "gemma3_text": _WIDE | {"sliding_window": 8},
    "glm": _WIDE,
    "glm4": _WIDE,
    "phi": _LLAMA,
    "phi3": _LLAMA,
    "stablelm": _LLAMA,
    "stablelm:parallel": _LLAMA | {"use_parallel_residual": True},
    "cohere": _LLAMA,
    "cohere2": _WIDE | {"sliding_window": 8},
    "starcoder2": _LLAMA,
    "minicpm3": _LATENT,
    "opt": _SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "opt:post-norm": _SIZES
    | {
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
        "do_layer_norm_before": False,
    },
    "opt:projected": _SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96},
    "bloom:post-norm-residual": {
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 96,
        "apply_residual_connection_post_layernorm": True,
    },
    "falcon": _FALCON,
    "falcon:new": _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon:new-one-norm": _FALCON
    | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    "falcon:alibi": _FALCON | {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 96, "max_seq_len": 64},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_bigcode:mha": _GPT | {"multi_query": False},
    "gptj": _GPT | {"rotary_dim": 4},
    "gpt_neox": _SIZES | {"intermediate_size": 64, "max_position_embeddings": 64},
    "gpt_neox:serial": _SIZES
    | {"intermediate_size": 64, "max_position_embeddings": 64, "use_parallel_residual": False},
    "mixtral": _LLAMA | {"num_local_experts": 4, "intermediate_size": 16},
    "olmoe": _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16},
    "qwen2_moe": _ROUTED
    | {
        "num_experts": 4,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
    "qwen3_moe": _ROUTED | {"num_experts": 4},
    "phimoe": _LLAMA | {"num_local_experts": 4, "intermediate_size": 16},
    "granitemoe": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16},
    "glm4_moe": _ROUTED | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v2:lite": _DEEPSEEK | {"q_lora_rank": None},
    "deepseek_v3": _DEEPSEEK | {"n_group": 2, "topk_group": 1},
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "mamba2": _MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 1},
}


def config_of(name: str, **more: object) -> PreTrainedConfig:
    return AutoConfig.for_model(name.partition(":")[0], **copy.deepcopy(SIZES[name] | more))


@functools.cache
def _made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name)).double().eval()
    with torch.no_grad():
        for path, p in model.named_parameters():
            if "norm" in path or ".ln_" in path:
                p.add_(torch.rand_like(p) * 0.5 + 0.1) if path.endswith("weight") else p.normal_(std=0.1)
                p.view(-1)[::13] *= 4.0
            elif path.endswith("bias"):
                p.normal_(std=0.1)
    unpack(model)
    return model.requires_grad_(False)


def family_model(name: str) -> nn.Module:
    """A random model of a family with outlier channels, in float64 so that laws hold to rounding error."""
    return copy.deepcopy(_made(name))
