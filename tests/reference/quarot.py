"""QuaRot on a Llama with explicit matrices: what every weight becomes, and what every layer is then given."""

import torch
from torch import Tensor


def by_head(r: Tensor, n_heads: int) -> Tensor:
    """One `r` for each head, along the diagonal."""
    return torch.block_diag(*[r] * n_heads)


def matrices(model, q: Tensor, head: Tensor, across: Tensor, mlp: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer of a block: what its input and its output are multiplied by, vectors being rows."""
    config = model.config
    one = torch.eye(config.head_dim, dtype=torch.float64)
    unchanged = torch.eye(config.num_attention_heads * config.head_dim, dtype=torch.float64)
    unchanged_kv = torch.eye(config.num_key_value_heads * config.head_dim, dtype=torch.float64)
    neither = torch.eye(config.intermediate_size, dtype=torch.float64)
    mixed = by_head(head, config.num_attention_heads) @ torch.kron(across, one)
    return {
        "self_attn.q_proj": (q, unchanged),
        "self_attn.k_proj": (q, unchanged_kv),
        "self_attn.v_proj": (q, by_head(head, config.num_key_value_heads)),
        "self_attn.o_proj": (mixed, q),
        "mlp.gate_proj": (q, neither),
        "mlp.up_proj": (q, neither),
        "mlp.down_proj": (mlp, q),
    }


def gain_in_front(block, name: str) -> Tensor | None:
    """The gains of the norm that a layer reads the residual stream through."""
    if name.endswith(("q_proj", "k_proj", "v_proj")):
        return block.input_layernorm.weight
    return block.post_attention_layernorm.weight if name.endswith(("gate_proj", "up_proj")) else None


def rotated_weights(model, q: Tensor, head: Tensor, across: Tensor, mlp: Tensor) -> dict[str, Tensor]:
    """By path: the new value of every weight, `(out, in)`, in float64."""
    new = {
        "model.embed_tokens.weight": model.model.embed_tokens.weight @ q,
        "lm_head.weight": model.lm_head.weight @ torch.diag(model.model.norm.weight) @ q,
        "model.norm.weight": torch.ones_like(model.model.norm.weight),
    }
    for index, block in enumerate(model.model.layers):
        for name, (inputs, outputs) in matrices(model, q, head, across, mlp).items():
            gain = gain_in_front(block, name)
            w = block.get_submodule(name).weight
            w = w if gain is None else w @ torch.diag(gain)
            # y = x Wᵀ: with x M for x, and y N for y, Wᵀ becomes M⁻¹ Wᵀ N.
            new[f"model.layers.{index}.{name}.weight"] = (inputs.T @ w.T @ outputs).T
        for norm in ("input_layernorm", "post_attention_layernorm"):
            new[f"model.layers.{index}.{norm}.weight"] = torch.ones_like(block.get_submodule(norm).weight)
    return new
