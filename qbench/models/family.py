"""Where things are in a decoder: the only file that knows module names.

A `Link` states that a module's output feeds some linear layers and nothing else. It is what scale
migration (SmoothQuant, AWQ) acts upon, and its sinks share one input, hence one set of statistics.

Rotations (QuaRot, SpinQuant) act upon the residual stream: embeddings begin it, blocks read it through norms and
add to it, the head reads it through the final norm.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Link:
    """`source` (a norm or a linear layer) feeds `sinks`; names are relative to the block.

    `source` is `None` where nothing that could absorb a scale produces the sinks' input.
    """

    source: str | None
    sinks: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """Module names shared by the models of one architecture.

    Attributes:
        blocks: Dotted path of the decoder blocks from the model's root.
        links: The block's links in forward order; their sinks are the layers to quantize.
        query_key: The linear layers whose outputs meet in a product; clipping leaves them alone.
        value: The linear layer whose output attention averages, head by head.
        writers: The layers whose outputs are added to the residual stream: attention's and the MLP's, in this order.
        embeddings: Paths, from the model's root, of the embeddings whose sum enters the first block.
        final_norm: Path of the norm between the last block and the head; `None` where there is none, or where
            embeddings or head reach the residual stream by another way (projections).
        head: Path of the layer that makes the logits.
        rotary: Whether queries and keys are turned by a rotary embedding, in pairs of channels half a head apart.
    """

    blocks: str
    links: tuple[Link, ...]
    query_key: tuple[str, ...]
    value: str
    writers: tuple[str, str]
    embeddings: tuple[str, ...]
    final_norm: str | None
    head: str = "lm_head"
    rotary: bool = True

    @property
    def linears(self) -> tuple[str, ...]:
        """The layers to quantize, in forward order."""
        return tuple(name for link in self.links for name in link.sinks)

    @property
    def readers(self) -> tuple[str, ...]:
        """The layers that read the residual stream, through a norm."""
        return tuple(name for name in self.linears if name not in self.writers)


LLAMA = Family(
    blocks="model.layers",
    links=(
        Link("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Link("self_attn.v_proj", ("self_attn.o_proj",)),
        Link("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Link("mlp.up_proj", ("mlp.down_proj",)),
    ),
    query_key=("self_attn.q_proj", "self_attn.k_proj"),
    value="self_attn.v_proj",
    writers=("self_attn.o_proj", "mlp.down_proj"),
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
    query_key=("self_attn.q_proj", "self_attn.k_proj"),
    value="self_attn.v_proj",
    writers=("self_attn.out_proj", "fc2"),
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    final_norm="model.decoder.final_layer_norm",
    rotary=False,
)

# opt-350m normalizes after the residual sum, so its norms also feed the residual stream.
OPT_POST_NORM = replace(
    OPT,
    links=tuple(replace(k, source=None) if "norm" in str(k.source) else k for k in OPT.links),
    final_norm=None,
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "opt": OPT,
}


def family_of(model: nn.Module) -> Family:
    """Look up the family of a Hugging Face causal language model.

    Raises:
        NotImplementedError: If the architecture has no entry in `FAMILIES`, or is a variant of one whose
            links do not hold.
    """
    config = model.config
    kind = config.model_type
    if kind not in FAMILIES:
        raise NotImplementedError(
            f"model_type {kind!r} is not described yet (known: {', '.join(sorted(FAMILIES))}); "
            "add a Family to qbench/models/family.py"
        )
    if kind == "opt":
        if config.activation_function != "relu":
            raise NotImplementedError(
                f"this OPT model has activation {config.activation_function!r}; only 'relu', through which "
                "scales can be moved, is described in qbench/models/family.py"
            )
        if not config.do_layer_norm_before:
            return OPT_POST_NORM
        projected = config.word_embed_proj_dim != config.hidden_size
        return replace(OPT, final_norm=None) if projected or config._remove_final_layer_norm else OPT
    return FAMILIES[kind]


def head_dim_of(config: Any) -> int:
    """Channels of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
