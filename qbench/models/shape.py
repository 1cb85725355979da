"""The sizes of a decoder, from its config: the only file that knows the config's attribute names.

Whatever is counted from a model without loading it (operations, bytes, parameters) starts from here.
"""

from dataclasses import dataclass, replace
from typing import Any

from qbench.models.family import head_dim_of


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense decoder whose blocks are alike; plain numbers, so that a record can keep them.

    Attributes:
        hidden: Width of the residual stream.
        ffn: Width inside the MLP.
        embedding: Width of the word embeddings and of what the head reads; other than `hidden` where projections
            stand between.
        tied: The head's weight is the embeddings'.
        gated_mlp: The MLP has gate, up and down layers, instead of two.
        n_other: Parameters of norms, biases, learned positions and embedding projections together.
    """

    hidden: int
    ffn: int
    head_dim: int
    n_heads: int
    n_kv_heads: int
    n_layers: int
    vocab: int
    embedding: int
    tied: bool
    gated_mlp: bool
    n_other: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer of one block, in forward order."""
        queries, keys = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        attention = {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
        }
        up, down = (self.hidden, self.ffn), (self.ffn, self.hidden)
        if self.gated_mlp:
            return attention | {"gate_proj": up, "up_proj": up, "down_proj": down}
        return attention | {"fc1": up, "fc2": down}

    @property
    def n_linear(self) -> int:
        """Weights of the linear layers of all blocks."""
        return self.n_layers * sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def n_embedding(self) -> int:
        """Weights of the word embeddings, which are as many as the head's."""
        return self.vocab * self.embedding

    @property
    def n_parameters(self) -> int:
        """All parameters; tied ones once."""
        return self.n_linear + self.n_embedding * (1 if self.tied else 2) + self.n_other


def shape_of(config: Any) -> Shape:
    """Read the sizes from a Hugging Face config.

    Raises:
        NotImplementedError: If the architecture is not described.
    """
    kind = config.model_type
    if kind == "opt":
        return _opt(config)
    if kind in ("llama", "mistral", "qwen2", "qwen3"):
        return _llama(config)
    raise NotImplementedError(
        f"the sizes of model_type {kind!r} are not described yet (known: llama, mistral, opt, qwen2, qwen3); "
        "add it to qbench/models/shape.py"
    )


def _llama(config: Any) -> Shape:
    shape = Shape(
        hidden=config.hidden_size, ffn=config.intermediate_size, head_dim=head_dim_of(config),
        n_heads=config.num_attention_heads, n_kv_heads=config.num_key_value_heads, n_layers=config.num_hidden_layers,
        vocab=config.vocab_size, embedding=config.hidden_size, tied=bool(config.tie_word_embeddings),
        gated_mlp=True, n_other=0,
    )  # fmt: skip
    kind = config.model_type
    biased: tuple[str, ...] = ()
    if kind == "qwen2" or (kind in ("llama", "qwen3") and config.attention_bias):
        biased += ("q_proj", "k_proj", "v_proj")
    if kind in ("llama", "qwen3") and config.attention_bias:
        biased += ("o_proj",)
    if kind == "llama" and config.mlp_bias:
        biased += ("gate_proj", "up_proj", "down_proj")
    head_norms = 2 * shape.head_dim if kind == "qwen3" else 0  # of queries and keys
    in_block = 2 * shape.hidden + head_norms + _biases(shape, biased)
    return replace(shape, n_other=shape.n_layers * in_block + shape.hidden)


def _opt(config: Any) -> Shape:
    shape = Shape(
        hidden=config.hidden_size, ffn=config.ffn_dim, head_dim=head_dim_of(config),
        n_heads=config.num_attention_heads, n_kv_heads=config.num_attention_heads, n_layers=config.num_hidden_layers,
        vocab=config.vocab_size, embedding=config.word_embed_proj_dim, tied=bool(config.tie_word_embeddings),
        gated_mlp=False, n_other=0,
    )  # fmt: skip
    norm = 2 * shape.hidden if config.layer_norm_elementwise_affine else 0
    in_block = 2 * norm + (_biases(shape, tuple(shape.linears)) if config.enable_bias else 0)
    n_other = shape.n_layers * in_block
    n_other += (config.max_position_embeddings + 2) * shape.hidden  # the first two positions are never used
    if config.do_layer_norm_before and not config._remove_final_layer_norm:
        n_other += norm
    if shape.embedding != shape.hidden:
        n_other += 2 * shape.embedding * shape.hidden
    return replace(shape, n_other=n_other)


def _biases(shape: Shape, layers: tuple[str, ...]) -> int:
    return sum(shape.linears[name][1] for name in layers)
