"""The sizes of a model that its need of memory is computed from."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from qbench.models.family import Family


@dataclass(frozen=True)
class Sizes:
    """Elements and widths of a model.

    Attributes:
        outside, blocks, block: Parameters outside of the blocks, in all blocks, and in the largest one.
        links: By kind of block: of each link, the outputs of its sinks together and their inputs.
        heads: Whose scores attention holds, `(seq_len, seq_len)` each; 0 where its kernel does not.
    """

    outside: int
    blocks: int
    block: int
    n_blocks: int
    hidden: int
    vocab: int
    links: tuple[tuple[tuple[int, int], ...], ...]
    heads: int


def sizes_of(skeleton: Any, family: Family) -> Sizes:
    """Read them from a model on the `meta` device."""
    blocks = list(skeleton.get_submodule(family.blocks))
    config = skeleton.config.get_text_config()
    kinds = {tuple(p.shape for p in block.parameters()): block for block in blocks}
    counts = [sum(p.numel() for p in block.parameters()) for block in blocks]
    holds_scores = config._attn_implementation == "eager" or family.attention == "own"
    return Sizes(
        outside=sum(p.numel() for p in skeleton.parameters()) - sum(counts),
        blocks=sum(counts),
        block=max(counts),
        n_blocks=len(blocks),
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        links=tuple(tuple(_links(family, block)) for block in kinds.values()),
        heads=getattr(config, "num_attention_heads", 0) if holds_scores else 0,
    )


def _links(family: Family, block: nn.Module) -> Iterator[tuple[int, int]]:
    for link in family.inputs(block):
        shapes = [block.get_submodule(name).get_parameter("weight").shape for name in link.sinks]
        yield sum(rows for rows, _ in shapes), shapes[0][1]
