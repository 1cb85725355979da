"""What a record says of the model that was quantized, beside its name: where things were found, and what was left."""

from typing import Any

from qbench.models.disk import on_disk
from qbench.models.family import family_of, has_gain, pattern_of
from qbench.models.load import ModelRef


def about(ref: ModelRef, model: Any) -> dict[str, Any]:
    """Plain facts: architecture, dtypes, commit, where the blocks are, and by pattern what is not quantized and why.

    `unlinked` are layers whose input no norm or layer can take a scale for, so that transforms leave it alone.
    """
    family = family_of(model)
    skipped: dict[str, str] = {}
    unlinked: dict[str, None] = {}
    for block in model.get_submodule(family.blocks):
        skipped |= {pattern_of(name): why for name, why in family.skipped(block).items()}
        loose = [link for link in family.scalings(block) if not has_gain(block, link.source)]
        unlinked |= dict.fromkeys(pattern_of(name) for link in loose for name in link.sinks)
    return {
        "family": model.config.model_type,
        "discovered": family.discovered,
        "attention": model.config._attn_implementation,
        "dtype": ref.dtype,
        "checkpoint_dtype": ref.stored_dtype,
        "commit": getattr(model.config, "_commit_hash", None),
        "blocks": "disk" if on_disk(model) else "memory",
        "skipped": skipped,
        "unlinked": list(unlinked),
    }
