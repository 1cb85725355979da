"""A checkpoint's tensors brought into a transformers model: all but the decoder blocks at once, those one at a time.

transformers renames, splits and merges what old checkpoints and the hub's layouts hold (`w1`, `w2`, `w3` of each
expert become two 3-D parameters); its own conversion is used, on one block's tensors, so that a block is to the bit
what `from_pretrained` makes of it. The whole conversion is gone through on the `meta` device first: a tensor that is
missing or of a wrong shape is named before anything is read.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qbench.models.blockreader import ON_CPU, ON_META, BlockReader, check, convert
from qbench.models.checkpoint import Checkpoint, refuse_quantized


def open_assembled(
    config: Any, model_class: Any, checkpoint: Checkpoint, blocks: str, dtype: torch.dtype
) -> tuple[Any, BlockReader]:
    """A model whose blocks are on the `meta` device while the rest is on the CPU, and the reader of its blocks.

    Raises:
        OSError: If the checkpoint lacks a parameter, or has one of a wrong shape; names it and the file.
        NotImplementedError: If the checkpoint is quantized, or blocks share parameters.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    refuse_quantized(config, checkpoint.folder)
    model = _on_meta(config, model_class, checkpoint, dtype)
    load_config = LoadStateDictConfig(
        pretrained_model_name_or_path=str(checkpoint.folder),
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),
    )
    _check_own(model, blocks)
    layers = model.get_submodule(blocks)
    names, outside = _assigned(model, blocks, len(layers), checkpoint, load_config)
    with _without(model, blocks):
        shell = copy.deepcopy(model)
        bare = [copy.deepcopy(layer, {id(model.config): shell.config}) for layer in layers]
        _finish(
            shell, convert(shell, checkpoint.outlines(outside), load_config, ON_META), checkpoint, outside
        )
        with checkpoint.slices(outside) as slices:
            _finish(model, convert(model, slices, load_config, ON_CPU), checkpoint, outside)
    _read_generation_config(model, checkpoint)
    reader = BlockReader(checkpoint, shell, blocks, bare, names, load_config)
    for index in range(len(layers)):
        reader.rehearse(index)
    return model.eval(), reader


def _on_meta(config: Any, model_class: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """As `from_pretrained` builds it: what is not of `dtype` is so because the architecture says it."""
    from transformers.utils import ContextManagers

    config = copy.deepcopy(config)
    config.name_or_path = str(checkpoint.folder)
    for part in (config, *(getattr(config, key) for key in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    with ContextManagers(model_class.get_init_context(dtype, False, False, None)):
        return model_class(config)


def _check_own(model: Any, blocks: str) -> None:
    inside = [
        (name, p)
        for name, p in model.named_parameters(remove_duplicate=False)
        if name.startswith(blocks + ".")
    ]
    tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    seen: dict[int, str] = {}
    for name, parameter in inside:
        if id(parameter) in seen or name in tied:
            other = seen.get(id(parameter), "another parameter")
            raise NotImplementedError(
                f"{name} is the same as {other}, and blocks that share parameters cannot be read one at a time; "
                "load the model whole"
            )
        seen[id(parameter)] = name


def _assigned(
    model: Any, blocks: str, n_blocks: int, checkpoint: Checkpoint, load_config: Any
) -> tuple[list[list[str]], list[str]]:
    """The names in the checkpoint that belong to each block, and those that belong to none."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    own, prefix = model.state_dict(), model.base_model_prefix
    renamings = [x for x in load_config.weight_mapping if isinstance(x, WeightRenaming)]
    converters = [x for x in load_config.weight_mapping if isinstance(x, WeightConverter)]
    inside, outside = [list[str]() for _ in range(n_blocks)], list[str]()
    of_block = re.compile(re.escape(blocks) + r"\.(\d+)\.")
    # In this order, since some renamings depend on what they saw before.
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        new, _ = rename_source_key(name, renamings, converters, prefix, own)
        if new not in own and name in own:
            new, _ = rename_source_key(name, [], [], prefix, own)
        found = of_block.match(new)
        where = inside[int(found[1])] if found and int(found[1]) < n_blocks else outside
        where.append(name)
    return inside, outside


@contextmanager
def _without(model: Any, blocks: str) -> Iterator[None]:
    """While it lasts, a model has no blocks."""
    layers = model.get_submodule(blocks)
    model.set_submodule(blocks, nn.ModuleList())
    try:
        yield
    finally:
        model.set_submodule(blocks, layers)


def _finish(model: Any, info: Any, checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """What `from_pretrained` does after loading, here of a model without blocks: tie, and compute what is not stored."""
    on_meta = next(model.parameters()).is_meta
    model.mark_tied_weights_as_initialized(info)
    if not on_meta:
        model._move_missing_keys_from_meta_to_device(info.missing_and_mismatched(), None, None, None)
    model._initialize_missing_keys(False)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    check(model, info, checkpoint, names, "")


def _read_generation_config(model: Any, checkpoint: Checkpoint) -> None:
    from transformers import GenerationConfig

    if model.can_generate() and (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
