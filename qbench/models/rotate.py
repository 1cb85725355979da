"""Rotations of a model that leave its function unchanged.

Vectors are rows: a linear layer computes y = x Wᵀ, and a rotation R, orthogonal, takes x to x R. The layer reads it
as before with W R in place of W; its output is rotated with Rᵀ W in place of W, and b R in place of b.

RMSNorm commutes with a rotation once its gains are folded into the layers behind it. LayerNorm becomes RMSNorm where
everything that is added to the residual stream has mean zero (Ashkboos et al., "SliceGPT: Compress Large Language
Models by Deleting Rows and Columns", ICLR 2024, arXiv:2401.15024, section 3.1).

Edits run in float64 and in place. Online rotations are hooks on a layer's input; hooks run in the order of their
registration, so that what quantizes this input, registered later, meets it rotated.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qbench.errors import Unsuitable
from qbench.models.blocks import each_block
from qbench.models.family import Family, family_of
from qbench.models.norms import centres, gain_offset, plain_norm
from qbench.quant.hadamard import hadamard_transform


def turn(x: Tensor, r: Tensor) -> Tensor:
    """Rotate each run of k neighbours along the last axis of `x` by `r`, `(k, k)`: all of it, or head by head."""
    k = len(r)
    return x @ r if x.shape[-1] == k else (x.unflatten(-1, (-1, k)) @ r).flatten(-2)


@torch.no_grad()
def rotate_inputs(reader: Any, r: Tensor) -> None:
    """`W ← W R`: a layer, or a router, now expects inputs rotated by `r`; the rows of an embedding are rotated."""
    w = reader.weight
    w.copy_(turn(w.double(), r.to(w.device, torch.float64)))


@torch.no_grad()
def rotate_outputs(linear: nn.Linear, r: Tensor, rows: Tensor | None = None) -> None:
    """`W ← Rᵀ W` and `b ← b R`: the layer's output is rotated by `r`, or some `rows` of it."""
    w, r = linear.weight, r.to(linear.weight.device, torch.float64)
    part = slice(None) if rows is None else rows.to(w.device)
    w[part] = turn(w[part].double().mT, r).mT.to(w.dtype)
    if linear.bias is not None:
        linear.bias[part] = turn(linear.bias[part].double(), r).to(w.dtype)


def rotate_residual(model: Any, r: Tensor) -> None:
    """Rotate the residual stream by `r`, `(hidden, hidden)`; norms must have been folded."""
    family = family_of(model)
    for path in (*family.embeddings, family.head):
        rotate_inputs(model.get_submodule(path), r)
    for block in each_block(model, family.blocks):
        for _, names in family.readers(block):
            for name in names:
                rotate_inputs(block.get_submodule(name), r)
        for name in family.writers(block):
            rotate_outputs(block.get_submodule(name), r)  # type: ignore[arg-type]


def rotate_values(block: nn.Module, family: Family, r: Tensor) -> None:
    """Rotate the values of every head of a decoder block by `r`, `(value_size, value_size)`, and undo it behind it."""
    assert family.value is not None, "there are no values"
    assert family.attention_out is not None, "nor what reads them"
    layer = block.get_submodule(family.value)
    rotate_outputs(layer, r, family.value_rows(layer.out_features))  # type: ignore[arg-type]
    rotate_inputs(block.get_submodule(family.attention_out), r)


@torch.no_grad()
def rotate_online(linear: nn.Linear, n_heads: int | None = None) -> None:
    """From now on, multiply the layer's input by a Hadamard matrix, and its weight to match.

    Args:
        n_heads: Multiply across the heads, H ⊗ I; otherwise over the whole width.

    Raises:
        ValueError: If no Hadamard matrix of that order is known.
    """
    w = linear.weight
    w.copy_(_hadamard(w.double(), n_heads))
    linear.register_forward_pre_hook(partial(_rotate_input, n_heads=n_heads))


def is_rotated_online(linear: nn.Module) -> bool:
    """Whether the input is rotated on its way in, so that no scale of it can be moved into another layer."""
    hooks = linear._forward_pre_hooks.values()
    return any(isinstance(hook, partial) and hook.func is _rotate_input for hook in hooks)


def _rotate_input(_: nn.Module, args: tuple[Tensor, ...], n_heads: int | None) -> tuple[Tensor, ...]:
    return (_hadamard(args[0], n_heads), *args[1:])


def _hadamard(x: Tensor, n_heads: int | None) -> Tensor:
    if n_heads is None:
        return hadamard_transform(x)
    return hadamard_transform(x.unflatten(-1, (n_heads, -1)).mT).mT.flatten(-2)


@torch.no_grad()
def fold_norms(model: Any) -> None:
    """Make every norm of the residual stream an RMSNorm without gains; the head gets weights of its own.

    Gains, and biases of LayerNorms, go into the layers behind the norms; the head may get a bias by it.

    Raises:
        NotImplementedError: If the model's norms do not stand between the residual stream and what reads it.
    """
    family = family_of(model)
    if why := unrotatable(family):
        raise NotImplementedError(f"the residual stream of this model cannot be rotated: {why}; use {_OTHER}")
    assert family.final_norm is not None, "or it could not be rotated"
    _untie(model, family)
    final: Any = model.get_submodule(family.final_norm)
    centred = centres(final)
    if centred:
        for path in family.embeddings:
            weight = model.get_submodule(path).weight
            weight.copy_(_centred(weight, -1))
    for block in each_block(model, family.blocks):
        for writer in (block.get_submodule(name) for name in family.writers(block)) if centred else ():
            writer.weight.copy_(_centred(writer.weight, 0))
            if writer.bias is not None:
                writer.bias.copy_(_centred(writer.bias, 0))
        for norm, names in family.readers(block):
            _fold(block, norm, [block.get_submodule(name) for name in names])
    _fold(model, family.final_norm, [model.get_submodule(family.head)])


_OTHER = "an algorithm without rotations"


def unrotatable(family: Family) -> str:
    """Why the residual stream of a model cannot be rotated; empty if it can."""
    if family.final_norm is not None:
        return ""
    if family.discovered:
        return "its architecture is not described, so that what reads and writes it is not known"
    return "its norms are part of it, or it begins or ends with projections, or behind a norm"


def check_rotatable(model: Any) -> None:
    """Raises Unsuitable where the residual stream cannot be rotated; a skeleton will do."""
    if why := unrotatable(family_of(model)):
        raise Unsuitable("rotations need a residual stream that plain norms read", f"{why}; use {_OTHER}")


def _fold(parent: nn.Module, path: str, readers: list[Any]) -> None:
    norm: Any = parent.get_submodule(path)
    if getattr(norm, "weight", None) is not None:
        offset = gain_offset(norm)
        gain, bias = norm.weight.double() + offset, getattr(norm, "bias", None)
        for reader in readers:
            w = reader.weight.double()
            if bias is not None:
                _add_bias(reader, w @ bias.double())
            reader.weight.copy_(w * gain)
        norm.weight.fill_(1.0 - offset)
    if centres(norm):
        above, _, name = path.rpartition(".")
        setattr(parent.get_submodule(above), name, plain_norm(norm, readers[0].weight))


def _add_bias(linear: Any, bias: Tensor) -> None:
    if not isinstance(linear, nn.Linear):
        raise NotImplementedError(
            f"the bias of a norm would have to go into a {type(linear).__name__}, which has none of its own; use an "
            "algorithm without rotations"
        )
    if linear.bias is None:
        linear.bias = nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)
    else:
        linear.bias.copy_(linear.bias.double() + bias)


def _centred(x: Tensor, axis: int) -> Tensor:
    return x.double() - x.double().mean(axis, keepdim=True)


def _untie(model: Any, family: Family) -> None:
    """Give the head weights of its own, where it has those of the embedding."""
    head, embedding = (model.get_submodule(path) for path in (family.head, family.embeddings[0]))
    if head.weight is not embedding.weight:
        return
    head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    # Other models may have been made from the same configuration.
    shared, own = model.config, copy.deepcopy(model.config)
    own.tie_word_embeddings = False
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
