"""What a GGUF file says of a model, and how llama.cpp names and lays out its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, TensorNameMap, get_tensor_name_map
from torch import Tensor

from qbench.errors import Unsuitable

_ATTENTION, _MLP = ("attn_q", "attn_k", "attn_v", "attn_output"), ("ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's.

    Attributes:
        paired: Whether its rotary embedding turns neighbouring channels, so that rows of queries and keys are reordered.
        factors: Whether it reads a factor for every frequency.
        biases: The layers that may have one.
    """

    kind: MODEL_ARCH
    paired: bool = False
    factors: bool = False
    biases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return MODEL_ARCH_NAMES[self.kind]


_LLAMA = Architecture(MODEL_ARCH.LLAMA, paired=True, factors=True, biases=_ATTENTION + _MLP)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture(MODEL_ARCH.QWEN2, biases=_ATTENTION[:3]),
    "qwen3": Architecture(MODEL_ARCH.QWEN3),
}


def architecture_of(config: Any) -> Architecture:
    """llama.cpp's architecture for a config.

    Raises:
        Unsuitable: If it has none, or the config departs from it; says in what.
    """
    offer = "use --to hf, and llama.cpp's own converter"
    if config.model_type not in ARCHITECTURES:
        raise Unsuitable(
            "GGUF is written for some architectures of llama.cpp", f"{config.model_type} is none of them "
            f"({', '.join(ARCHITECTURES)}); {offer}",
        )  # fmt: skip
    architecture = ARCHITECTURES[config.model_type]
    if config.hidden_act != "silu":
        raise Unsuitable("llama.cpp computes SwiGLU there", f"hidden_act is {config.hidden_act}; {offer}")
    if why := _unwritable(config, architecture):
        raise Unsuitable("llama.cpp has no such rotary embedding", f"{why}; {offer}")
    return architecture


def _unwritable(config: Any, architecture: Architecture) -> str:
    """What of the rotary embedding cannot be said; empty where all can."""
    rope = _rope(config)
    kind, more = rope["rope_type"], rope.keys() & {"attention_factor", "mscale", "mscale_all_dim"}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "it turns only a part of each head"
    if kind not in ("default", "linear", "yarn", "llama3") or (kind == "llama3" and not architecture.factors):
        return f"its type is {kind}, on {config.model_type}"
    if kind == "yarn" and (any(rope[key] is not None for key in more) or not rope.get("truncate", True)):
        return "YaRN with factors of its own for attention, or bounds that are not whole"
    return ""


def write_metadata(file: GGUFWriter, config: Any, vocab_size: int) -> None:
    """Sizes, norms and the rotary embedding."""
    head = head_size(config)
    file.add_type("model")
    # Within its window, attention is the same with and without one; llama.cpp has none for these architectures.
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    file.add_context_length(min(config.max_position_embeddings, window))
    file.add_vocab_size(vocab_size)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_key_length(head)
    file.add_value_length(head)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_dimension_count(head)
    rope = _rope(config)
    file.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        file.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        file.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        file.add_rope_scaling_orig_ctx_len(original)
        file.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        file.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


def rotary_factors(model: Any) -> Tensor | None:
    """What each frequency of Llama 3's rotary embedding is divided by, `(head / 2,)`; `None` for other types."""
    rope = _rope(model.config)
    if rope["rope_type"] != "llama3":
        return None
    used = next(buffer for name, buffer in model.named_buffers() if name.endswith("rotary_emb.inv_freq"))
    exponents = torch.arange(len(used), dtype=torch.float64) / len(used)
    return (rope["rope_theta"] ** -exponents / used.double().cpu()).float()


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True)
class Places:
    """Where tensors of a model are in a file."""

    architecture: Architecture
    names: TensorNameMap
    head: int

    @classmethod
    def of(cls, config: Any) -> "Places":
        architecture = architecture_of(config)
        names = get_tensor_name_map(architecture.kind, config.num_hidden_layers)
        return cls(architecture, names, head_size(config))

    def name(self, tensor: str) -> str:
        """The name that a tensor has there.

        Raises:
            Unsuitable: If the architecture has no such tensor.
        """
        known = self.names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if known is None or (known.endswith(".bias") and _part(known) not in self.architecture.biases):
            raise Unsuitable(f"llama.cpp's {self.architecture.name} has no place for {tensor}", "use --to hf")
        return known

    def order(self, name: str, rows: int) -> Tensor | None:
        """The order of a tensor's rows there, where it is another; `name` is the one there.

        transformers turns channels half a head apart, llama.cpp's llama neighbouring ones.
        """
        if not self.architecture.paired or _part(name) not in ("attn_q", "attn_k"):
            return None
        return torch.arange(rows).reshape(-1, 2, self.head // 2).mT.flatten()


def _part(name: str) -> str:
    return name.split(".")[-2]


def _rope(config: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = config.rope_parameters
    return found
