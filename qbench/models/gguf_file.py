"""A GGUF file as transformers loads it: every tensor in floating point, as llama.cpp would dequantize it."""

from pathlib import Path
from typing import Any

import torch


def load_gguf(path: Path, config: Any, architecture: str, dtype: torch.dtype, attn: str | None) -> Any:
    """The model on the CPU, in evaluation mode; its tensors are read, not what the file says of its sizes.

    Args:
        config: Of the model that was exported: from a file's own metadata, transformers forgets how a rotary
            embedding is scaled, and the size of Qwen 3's heads.
        architecture: As the file has it; a config of another becomes one of this.

    Raises:
        OSError: If a weight is missing, or of another shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    if config.model_type != architecture:
        said = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        config = AutoConfig.for_model(architecture, **said)
    model, found = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=dtype, attn_implementation=attn,
        quantization_config=GgufConfig(dequantize=True), output_loading_info=True,
    )  # fmt: skip
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, found[what])):
            raise OSError(
                f"transformers loads {path} with {what.replace('_', ' ')}: {', '.join(names[:3])} ({len(names)} in all)"
            )
    return model.eval().requires_grad_(False)
