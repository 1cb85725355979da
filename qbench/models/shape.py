"""The sizes of any decoder, read from a skeleton and one token through it.

No attribute of a config says the same in every family, and none says what is cached. The module tree has the widths of
every layer, and a forward pass on the `meta` device, which computes nothing, has the order of the layers, the elements
that each norm works on, and the cache that transformers makes.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qbench.models.anatomy import experts_of, linears_of, role_of, said, unknown
from qbench.models.sizes import Attention, Block, Linear, Recurrence, Shape

__all__ = ["Shape", "shape_of", "sizes_of"]

_FUSED_QKV = re.compile(r"query_key_value|(^|\.)w?_?qkv(_proj)?$|(^|\.)c_attn$|W_pack", re.IGNORECASE)
_STATES = ("conv_states", "recurrent_states")
_KEY_OR_VALUE = re.compile(r"(^|\.)(k|v|key|value)(_proj|_lin)?$")


def shape_of(config: Any, trust_remote_code: bool = False) -> Shape:
    """Read the sizes of the model that a Hugging Face config describes; no weight is loaded.

    Raises:
        NotImplementedError: If something in the model is not understood; says what.
    """
    from transformers import AutoModelForCausalLM

    own = copy.deepcopy(config)  # building a model writes into it
    with torch.device("meta"):
        # Every architecture has this attention, and it needs no library that this machine may lack.
        model = AutoModelForCausalLM.from_config(
            own, attn_implementation="eager", trust_remote_code=trust_remote_code
        )
    return sizes_of(model.eval())


def sizes_of(skeleton: Any) -> Shape:
    """Read the sizes of a model on the `meta` device.

    Raises:
        NotImplementedError: If something in the model is not understood; says what.
    """
    path, blocks = _blocks(skeleton)
    if len(list(blocks.parameters())) != sum(len(list(block.parameters())) for block in blocks):
        raise unknown(skeleton, f"some of {path} share weights with each other")
    run = _run(skeleton, path, blocks)
    found: dict[Block, list[int]] = {}
    for index, block in enumerate(blocks):
        found.setdefault(_block(skeleton, run, index, block), []).append(index)
    kinds = tuple(replace(kind, at=tuple(at)) for kind, at in found.items())
    embeddings, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    if head is None or embeddings.weight.shape != head.weight.shape:
        raise unknown(skeleton, f"the embeddings are {embeddings} and the head is {head}")
    vocab, width = embeddings.weight.shape
    tied = head.weight is embeddings.weight
    shape = Shape(said(skeleton, "hidden_size"), vocab, width, tied, 0, kinds)
    return replace(shape, n_other=sum(p.numel() for p in skeleton.parameters()) - shape.n_parameters)


def _blocks(skeleton: Any) -> tuple[str, nn.ModuleList]:
    n = said(skeleton, "num_hidden_layers")
    lists = {k: m for k, m in skeleton.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n}
    if not lists:
        raise unknown(skeleton, f"no list of modules is as long as its num_hidden_layers={n}")
    path = max(lists, key=lambda k: sum(p.numel() for p in lists[k].parameters()))  # the outermost of equals
    return path, lists[path]


# One token


@dataclass(frozen=True)
class _Run:
    """What one token met.

    Attributes:
        calls: Of each block, the paths of its modules in the order in which they were called.
        norms: Of each block, the elements of each norm, in that order.
        cache: The layers of transformers' cache.
    """

    calls: list[list[str]]
    norms: list[list[int]]
    cache: list[Any]


def _run(skeleton: Any, path: str, blocks: nn.ModuleList) -> _Run:
    calls: list[list[str]] = [[] for _ in blocks]
    norms: list[list[int]] = [[] for _ in blocks]
    hooks = []

    def watch(index: int, name: str, module: nn.Module) -> None:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            calls[index].append(name)
            if "Norm" in type(module).__name__ and isinstance(output, Tensor):
                norms[index].append(output.numel())

        hooks.append(module.register_forward_hook(note))

    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            watch(index, name, module)
    sorting = [module for module in blocks.modules() if experts_of(module)]
    for module in sorting:  # their forward sorts tokens by numbers that there are not
        module.forward = _first  # type: ignore[method-assign]
    try:
        with torch.no_grad(), torch.device("meta"):
            output = skeleton(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True)
    except Exception as error:  # whatever a family's code raises
        reason = str(error).strip().split("\n")[0]
        raise unknown(skeleton, f"no token can be sent through its skeleton ({reason})") from error
    finally:
        for hook in hooks:
            hook.remove()
        for module in sorting:
            del module.forward
    cache = next(
        (output[key] for key in ("cache", "past_key_values", "cache_params") if output.get(key)), None
    )
    layers = list(getattr(cache, "layers", ()))
    if len(layers) != len(blocks):
        raise unknown(skeleton, f"its cache has {len(layers)} layers for the {len(blocks)} blocks of {path}")
    return _Run(calls, norms, layers)


def _first(hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return hidden


# One block


def _block(skeleton: Any, run: _Run, index: int, block: nn.Module) -> Block:
    layer = run.cache[index]
    has_keys = isinstance(getattr(layer, "keys", None), Tensor)
    has_state = any(getattr(layer, name, None) for name in _STATES)
    linears = [
        replace(x, role=role_of(x, has_keys, has_state))
        for x in linears_of(skeleton, block, run.calls[index])
    ]
    recurrence = _recurrence(skeleton, layer, block, linears) if has_state else None
    attention = None
    if has_keys:
        attention, linears = _attention(skeleton, layer, linears)
    elif any(x.role == "attention" for x in linears):
        raise unknown(skeleton, f"block {index} has attention, but nothing of its own in the cache")
    return Block((), tuple(linears), tuple(run.norms[index]), attention, recurrence)


# What is kept of a sequence


def _recurrence(skeleton: Any, layer: Any, block: nn.Module, linears: list[Linear]) -> Recurrence:
    """Of a layer of the cache that keeps states."""
    states = [list(getattr(layer, name).values()) for name in _STATES]
    axes = [[tuple(x.shape[1:]) for x in kept if isinstance(x, Tensor)] for kept in states]
    if max(map(len, axes)) > 1:
        raise unknown(skeleton, "a block keeps several states")
    owned = [{name for name, _ in m.named_parameters(recurse=False)} for m in block.modules()]
    mixer = next((x.name.rpartition(".")[0] for x in linears if x.role == "recurrence"), "")
    is_mamba = any({"A_log", "D"} <= names for names in owned)
    kind = "mamba" if is_mamba else type(block.get_submodule(mixer)).__name__
    return Recurrence(kind, *(each[0] if each else () for each in axes))


def _attention(skeleton: Any, layer: Any, linears: list[Linear]) -> tuple[Attention, list[Linear]]:
    """Sizes of attention, and the linear layers with what they leave in the cache."""
    n_heads = said(skeleton, "num_attention_heads")
    (_, heads, _, key), value = layer.keys.shape, layer.values.shape[-1]
    cached = layer.keys.numel() + layer.values.numel()
    window = getattr(layer, "sliding_window", None)
    ends = {x.name.rpartition(".")[2]: x for x in linears if x.role == "attention"}
    if "kv_b_proj" in ends:
        return _latent(skeleton, n_heads, cached, window, ends), [
            replace(x, cached=x.outputs) if "kv_a_proj" in x.name else x for x in linears
        ]
    writes = [_written(x, n_heads * key) if x.role == "attention" else x for x in linears]
    total = sum(x.cached for x in writes)
    if total and total % (key + value) == 0 and total <= cached:
        return Attention(n_heads, total // (key + value), key, value, cached, window=window), writes
    return Attention(n_heads, heads, key, value, cached, window=window), linears


def _written(linear: Linear, queries: int) -> Linear:
    if _KEY_OR_VALUE.search(linear.name):
        return replace(linear, cached=linear.outputs)
    if _FUSED_QKV.search(linear.name):
        return replace(linear, cached=linear.outputs - queries)
    return linear


def _latent(
    skeleton: Any, n_heads: int, cached: int, window: int | None, ends: Mapping[str, Linear]
) -> Attention:
    """Multi-head latent attention: a latent and a rotated key are kept, of which each head makes its own."""
    queries, made = ends.get("q_b_proj", ends.get("q_proj")), ends["kv_b_proj"]
    if queries is None or "kv_a_proj_with_mqa" not in ends:
        raise unknown(skeleton, f"latent attention of {', '.join(ends)} is not described")
    rotary = ends["kv_a_proj_with_mqa"].outputs - made.inputs
    key = queries.outputs // n_heads
    value = made.outputs // n_heads - (key - rotary)
    return Attention(n_heads, n_heads, key, value, cached, made.inputs, rotary, window)
