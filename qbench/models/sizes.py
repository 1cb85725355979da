"""The sizes of a decoder as plain numbers: what a record keeps, and what is counted without loading a model."""

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Literal

Role = Literal["attention", "recurrence", "mlp", "expert", "router"]


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block, or the experts' layers of one name together.

    Attributes:
        name: Path within the block; an expert's number is left out, and a fused gate and up are two.
        count: How many there are, each of `inputs` and `outputs`: the experts, otherwise 1.
        active: How many of them one token goes through.
        cached: Outputs that a token leaves in the cache as they are.
    """

    name: str
    inputs: int
    outputs: int
    role: Role
    count: int = 1
    active: int = 1
    cached: int = 0

    @property
    def n_weights(self) -> int:
        return self.inputs * self.outputs * self.count


@dataclass(frozen=True)
class Attention:
    """Sizes of softmax attention.

    Attributes:
        n_kv_heads: Heads of keys and values that differ; as many as there are queries' where they are made from a latent.
        key_dim, value_dim: Of one head, position included.
        cached: Elements a token in transformers' cache, which repeats shared heads in some families (Falcon).
        latent: Width of the latent that keys and values are made from (multi-head latent attention), or `None`.
        latent_rotary: Width of the rotated key beside it, which all heads share.
        window: How many tokens it looks back on, itself among them; `None`: all.
    """

    n_heads: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    cached: int
    latent: int | None = None
    latent_rotary: int = 0
    window: int | None = None

    @property
    def kept(self) -> int:
        """Elements a token that a cache must hold: no head twice, and the latent in place of what is made from it."""
        if self.latent is not None:
            return self.latent + self.latent_rotary
        return self.n_kv_heads * (self.key_dim + self.value_dim)

    def looks_back(self, context: int) -> int:
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True)
class Recurrence:
    """What a layer with a state of fixed size keeps of a sequence.

    Attributes:
        kind: `mamba` (both versions), or the class of another.
        conv: Channels and width of the convolution; empty without one.
        state: Axes of the state, its width last: channels and width (Mamba), or heads, channels and width (Mamba2).
    """

    kind: str
    conv: tuple[int, ...]
    state: tuple[int, ...]

    @property
    def inner(self) -> int:
        """Channels, of all heads together."""
        return prod(self.state[:-1])

    @property
    def kept(self) -> int:
        """Elements a sequence."""
        return sum(prod(axes) for axes in (self.conv, self.state) if axes)


@dataclass(frozen=True)
class Block:
    """A kind of block.

    Attributes:
        at: Which of the model's blocks are of this kind.
        linears: In forward order.
        norms: Elements a token of each norm, in forward order.
    """

    at: tuple[int, ...]
    linears: tuple[Linear, ...]
    norms: tuple[int, ...]
    attention: Attention | None = None
    recurrence: Recurrence | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The shortest end of each linear layer's name that no other of the block has."""
        paths = [linear.name.split(".") for linear in self.linears]
        ends = Counter(".".join(path[-n:]) for path in paths for n in range(1, len(path) + 1))
        found = []
        for path in paths:
            mine = [".".join(path[-n:]) for n in range(1, len(path) + 1)]
            found.append(next((end for end in mine if ends[end] == 1), mine[-1]))
        return tuple(found)

    @property
    def activations(self) -> tuple[tuple[int, int, int], ...]:
        """Of each MLP of the block: elements that its activation reads and writes, and how many times a token."""
        groups: dict[str, list[Linear]] = {}
        for linear in self.linears:
            if linear.role in ("mlp", "expert"):
                groups.setdefault(linear.name.rpartition(".")[0], []).append(linear)
        return tuple(
            (sum(up.outputs for up in ups), down.inputs, down.active) for *ups, down in groups.values() if ups
        )


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; plain numbers, so that a record can keep them.

    Attributes:
        hidden: Width of the residual stream.
        embedding: Width of the word embeddings and of what the head reads; other than `hidden` where projections
            stand between.
        tied: The head's weight is the embeddings'.
        n_other: Parameters that are neither embeddings nor head nor linear layers of a block: norms, biases,
            learned positions, embedding projections, convolutions; and routers, which are never quantized.
        blocks: Each kind once.
    """

    hidden: int
    vocab: int
    embedding: int
    tied: bool
    n_other: int
    blocks: tuple[Block, ...]

    @property
    def n_layers(self) -> int:
        return sum(len(block.at) for block in self.blocks)

    @property
    def n_linear(self) -> int:
        """Weights of the linear layers of all blocks, all experts included, routers not."""
        return sum(
            len(block.at) * x.n_weights for block in self.blocks for x in block.linears if x.role != "router"
        )

    @property
    def n_embedding(self) -> int:
        """Weights of the word embeddings, which are as many as the head's."""
        return self.vocab * self.embedding

    @property
    def n_parameters(self) -> int:
        """All parameters; tied ones once."""
        return self.n_linear + self.n_embedding * (1 if self.tied else 2) + self.n_other

    @property
    def n_active_parameters(self) -> int:
        """Those that one token meets: the weights of experts that are not asked are left out, their biases are not."""
        idle = sum(
            len(block.at) * x.inputs * x.outputs * (x.count - x.active)
            for block in self.blocks
            for x in block.linears
        )
        return self.n_parameters - idle

    @property
    def kv_elements(self) -> int:
        """Elements of keys and values that a token must leave in the cache, of all blocks."""
        return sum(len(block.at) * block.attention.kept for block in self.blocks if block.attention)

    @property
    def cached_elements(self) -> int:
        """Elements of keys and values that a token leaves in transformers' cache."""
        return sum(len(block.at) * block.attention.cached for block in self.blocks if block.attention)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer of one block, in forward order, where blocks are alike."""
        block = self._alike()
        return {label: (x.inputs, x.outputs) for label, x in zip(block.labels, block.linears, strict=True)}

    @property
    def ffn(self) -> int:
        """Width inside the MLP, where there is one."""
        (activation,) = self._alike().activations
        return activation[1]

    @property
    def n_heads(self) -> int:
        return self._attention().n_heads

    @property
    def n_kv_heads(self) -> int:
        return self._attention().n_kv_heads

    def _alike(self) -> Block:
        if len(self.blocks) != 1:
            raise ValueError(
                f"this model has {len(self.blocks)} kinds of blocks; ask each of `blocks` for its sizes"
            )
        return self.blocks[0]

    def _attention(self) -> Attention:
        attention = self._alike().attention
        if attention is None:
            raise ValueError("the blocks of this model have no attention, but a recurrent state")
        return attention
