"""The layers of one block, by its module tree: every matrix is counted, or the model is refused."""

import re
from dataclasses import replace
from typing import Any

from torch import nn

from qbench.models.sizes import Linear, Role

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
# Of some families a block's only mixer, be it attention or a state or an MLP; the cache says which.
MIXER = re.compile(r"mixer|mamba|ssm|recurrent|temporal|linear_attn|conv", re.IGNORECASE)
_ROUTER = re.compile(r"router|(^|\.)gate$|shared_expert_gate$", re.IGNORECASE)
_GATE_UP = ("gate_proj", "up_proj")


def unknown(skeleton: Any, what: str) -> NotImplementedError:
    return NotImplementedError(
        f"the sizes of model_type {skeleton.config.model_type!r} cannot be read: {what}; see qbench/models/shape.py"
    )


def said(skeleton: Any, name: str) -> int:
    """What the config of the decoder says."""
    value = getattr(skeleton.config.get_text_config(decoder=True), name, None)
    if not isinstance(value, int):
        raise unknown(skeleton, f"its config says {name}={value!r}, which is not one number")
    return value


def linears_of(skeleton: Any, block: nn.Module, calls: list[str]) -> list[Linear]:
    """In the order of their calls; those of experts stand where the experts were called."""
    found: dict[str, Linear] = {}
    place: dict[str, int] = {}
    hidden = said(skeleton, "hidden_size")
    for path, module in block.named_modules():
        for linear in _of_module(path, module, hidden):
            known = found.get(linear.name)
            if known is not None and (known.inputs, known.outputs) != (linear.inputs, linear.outputs):
                raise unknown(skeleton, f"the layers {linear.name} of its experts are of several sizes")
            found[linear.name] = linear if known is None else replace(known, count=known.count + linear.count)
            if path in calls:
                place.setdefault(linear.name, calls.index(path))
    _check(skeleton, block, hidden)
    mixture, last = any(linear.count > 1 for linear in found.values()), len(calls)
    for name, linear in found.items():
        if linear.count > 1:
            found[name] = replace(linear, role="expert", active=_active(skeleton, block, linear))
        elif mixture and _ROUTER.search(name):
            found[name] = replace(linear, role="router")
    return sorted(found.values(), key=lambda x: place.get(x.name, last))


def _of_module(path: str, module: nn.Module, hidden: int) -> list[Linear]:
    name = re.sub(r"(?<=experts)\.\d+(?=\.|$)", "", path)
    if isinstance(module, nn.Linear):
        return [Linear(name, module.in_features, module.out_features, "mlp")]
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if type(module).__name__ == "Conv1D" and weight is not None:  # transformers': weights (inputs, outputs)
        return [Linear(name, weight.shape[0], weight.shape[1], "mlp")]
    if weight is not None and weight.dim() == 2 and _ROUTER.search(f"{type(module).__name__} {path}"):
        return [Linear(name, weight.shape[1], weight.shape[0], "router")]
    found = []
    for label, p in experts_of(module):
        n, outputs, inputs = p.shape
        reads = label != "down_proj"  # the residual stream; the other writes it
        if getattr(module, "is_transposed", (inputs if reads else outputs) != hidden):
            outputs, inputs = inputs, outputs
        parts = _GATE_UP if label == "gate_up_proj" else (label,)
        found += [Linear(f"{name}.{part}", inputs, outputs // len(parts), "expert", n) for part in parts]
    return found


def _check(skeleton: Any, block: nn.Module, hidden: int) -> None:
    """Nothing that multiplies the residual stream goes uncounted."""
    for path, module in block.named_modules():
        if _of_module(path, module, hidden) or isinstance(module, nn.Conv1d | nn.Embedding):
            continue
        for name, p in module.named_parameters(recurse=False):
            axes = [n for n in p.shape if n > 1]
            if len(axes) > 1 and hidden in axes and "Norm" not in type(module).__name__:
                raise unknown(skeleton, f"{path}.{name}, {tuple(p.shape)}, is no layer that is known")


def _active(skeleton: Any, block: nn.Module, experts: Linear) -> int:
    """How many experts a router chooses."""
    around = experts.name.split(".experts")[0]
    owner = block.get_submodule(around) if "." in experts.name else block
    chosen = {m.top_k for m in owner.modules() if isinstance(getattr(m, "top_k", None), int)}
    if not chosen:
        chosen = {said(skeleton, "num_experts_per_tok")}
    if len(chosen) != 1:
        raise unknown(
            skeleton,
            f"how many of the {experts.count} {experts.name} are active is not clear: {sorted(chosen)}",
        )
    return int(chosen.pop())


def role_of(linear: Linear, attention: bool, recurrence: bool) -> Role:
    """What a layer serves, by its name and by whether its block keeps keys, or a state."""
    if linear.role != "mlp":
        return linear.role
    if MIXER.search(linear.name):
        return "recurrence" if recurrence else "attention" if attention else "mlp"
    if _ATTENTION.search(linear.name):
        return "attention" if attention or not recurrence else "recurrence"
    return "mlp"


def experts_of(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Weights of all experts together, `(experts, outputs, inputs)`, that a module holds."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return []
    return [
        (name, p) for name, p in module.named_parameters(recurse=False) if p.dim() == 3 and min(p.shape) > 1
    ]
