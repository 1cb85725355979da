"""From the names that quantization works with back to those of the hub's checkpoints.

Loading unpacks fused experts, turns `Conv1D` around (`qbench.models.experts`), and lets transformers rename and merge
what the hub's checkpoints hold; a checkpoint that others are to load undoes all three.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qbench.models.experts import experts_in
from qbench.models.manifest import verify_if_listed

_PART = re.compile(r"(.+)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def plain(model: Any) -> Any:
    """The model as transformers builds it, without weights: experts fused, `Conv1D` as it is."""
    with torch.device("meta"):
        return type(model)(model.config)


def turned_around(built: Any) -> set[str]:
    """The names of layers whose weights `built`, a model as transformers builds it, keeps transposed."""
    from transformers.pytorch_utils import Conv1D

    return {name for name, module in built.named_modules() if isinstance(module, Conv1D)}


def hub_tensors(model: Any, built: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model, by their names in its state dict, as the hub's checkpoints name and shape them.

    Args:
        built: What `plain` makes of the model.
        tensors: Of all experts of a block, or of none.
    """
    from transformers.core_model_loading import revert_weight_conversion

    fused = _fused(model, tensors)
    for name in turned_around(built):
        if f"{name}.weight" in fused:
            fused[f"{name}.weight"] = fused[f"{name}.weight"].T
    return dict(revert_weight_conversion(built, fused))


def hub_names(model: Any, built: Any, layers: Iterable[str]) -> dict[str, str]:
    """The names that the hub's checkpoints have for layers, by their names in the model; found by marked tensors.

    Raises:
        NotImplementedError: If a layer is no layer of its own there.
    """
    numbers = {name: index for index, name in enumerate(layers)}
    marked = {f"{name}.weight": torch.full((1, 1), float(index)) for name, index in numbers.items()}
    found: dict[int, str] = {}
    for name, tensor in hub_tensors(model, built, marked).items():
        if tensor.numel() == 1:
            found[int(tensor.item())] = name.removesuffix(".weight")
    if lost := [name for name, index in numbers.items() if index not in found]:
        raise NotImplementedError(
            f"{lost[0]} ({len(lost)} such layers) is no layer of its own in checkpoints of {type(model).__name__}: "
            "they keep it merged with others"
        )
    return {name: found[index] for name, index in numbers.items()}


def _fused(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With experts that were unpacked as the parameters that transformers has for them."""
    paths = experts_in(model).keys()
    parts: dict[str, dict[tuple[int, str], Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _PART.fullmatch(name)
        if match and match[1] in paths:
            parts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        else:
            rest[name] = tensor
    for path, found in parts.items():
        n = 1 + max(index for index, _ in found)
        halves = [torch.cat([found[i, "gate_proj"], found[i, "up_proj"]]) for i in range(n)]
        rest[f"{path}.gate_up_proj"] = torch.stack(halves)
        rest[f"{path}.down_proj"] = torch.stack([found[i, "down_proj"] for i in range(n)])
    return rest


def save_around(
    model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype, quantization: Mapping[str, Any] | None
) -> None:
    """Write everything but the weights: config, generation config, tokenizer.

    Args:
        quantization: What the config says of it; `None` for nothing.
    """
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {
        "architectures": [type(model).__name__], "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": is_tied(model),
    }  # fmt: skip
    config.pop("_name_or_path", None)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def is_tied(model: Any) -> bool:
    """Whether the head's weight is the embedding's, as the model stands now."""
    head: nn.Module | None = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def load_checkpoint(
    folder: Path, dtype: torch.dtype, attn: str | None, dense: bool = False, kernel: str | None = None
) -> Any:
    """A checkpoint as any user of transformers loads it, in evaluation mode.

    Args:
        dense: Have compressed-tensors make floating-point weights of it at once; what it says of inputs is lost.
        kernel: What computes a checkpoint in GPTQ's or AWQ's layout, by gptqmodel's name for it.

    Raises:
        OSError: If the files do not agree with their manifest, where there is one, or a weight is missing or misshapen.
    """
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    verify_if_listed(folder)
    more = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dense else {}
    if kernel is not None:
        more = {"quantization_config": _computed_by(kernel, folder)}
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attn, use_safetensors=True, output_loading_info=True, **more
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, found[what])):
            raise OSError(
                f"transformers loads {folder} with {what.replace('_', ' ')}: {', '.join(names[:3])} ({len(names)} in all)"
            )
    return model.eval().requires_grad_(False)


def _computed_by(kernel: str, folder: Path) -> Any:
    """What a checkpoint in GPTQ's or AWQ's layout says of itself, with a choice of kernel."""
    from transformers import AwqConfig, GPTQConfig

    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    kind = {"gptq": GPTQConfig, "awq": AwqConfig}[said.pop("quant_method")]
    return kind(**said, backend=kernel)
