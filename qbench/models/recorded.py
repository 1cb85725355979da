"""Shapes as records keep them: JSON has neither tuples nor classes, and older records had fewer sizes."""

from collections.abc import Mapping
from typing import Any

from qbench.models.sizes import Attention, Block, Linear, Recurrence, Shape


def shape_from(kept: Mapping[str, Any]) -> Shape:
    """The shape that a record keeps, of this qbench or of one that knew only dense decoders of equal blocks.

    Raises:
        TypeError: If it is neither.
    """
    if "blocks" in kept:
        return Shape(**{**kept, "blocks": tuple(_block(block) for block in kept["blocks"])})
    return _dense(**kept)


def _block(kept: Mapping[str, Any]) -> Block:
    attention, recurrence = kept["attention"], kept["recurrence"]
    return Block(
        at=tuple(kept["at"]), norms=tuple(kept["norms"]), linears=tuple(Linear(**x) for x in kept["linears"]),
        attention=None if attention is None else Attention(**attention),
        recurrence=None if recurrence is None else Recurrence(
            recurrence["kind"], tuple(recurrence["conv"]), tuple(recurrence["state"])
        ),
    )  # fmt: skip


def _dense(
    *, hidden: int, ffn: int, head_dim: int, n_heads: int, n_kv_heads: int, n_layers: int, vocab: int, embedding: int,
    tied: bool, gated_mlp: bool, n_other: int,
) -> Shape:  # fmt: skip
    """A record of before there were kinds of blocks: it says nothing of a window."""
    queries, keys = n_heads * head_dim, n_kv_heads * head_dim
    widths = {
        "q": (hidden, queries, 0),
        "k": (hidden, keys, keys),
        "v": (hidden, keys, keys),
        "o": (queries, hidden, 0),
    }
    linears = [Linear(f"self_attn.{x}_proj", i, o, "attention", cached=c) for x, (i, o, c) in widths.items()]
    ups, down = (("gate_proj", "up_proj"), "down_proj") if gated_mlp else (("fc1",), "fc2")
    linears += [Linear(f"mlp.{up}", hidden, ffn, "mlp") for up in ups]
    linears.append(Linear(f"mlp.{down}", ffn, hidden, "mlp"))
    attention = Attention(n_heads, n_kv_heads, head_dim, head_dim, 2 * keys)
    block = Block(tuple(range(n_layers)), tuple(linears), (hidden, hidden), attention)
    return Shape(hidden, vocab, embedding, tied, n_other, (block,))
