"""Greedy generation by a model of transformers, timed; and copies of one with other linear layers."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from qbench.deploy.bench.backend import Engine, Run
from qbench.deploy.operators import Bits
from qbench.models.decoding import go_on

Clock = Callable[[], float]


@dataclass(eq=False)
class Generator(Engine):
    """A causal language model in memory.

    Attributes:
        clock: In seconds.
    """

    model: Any
    widths: Bits
    device: str = "cpu"
    clock: Clock = time.perf_counter

    @property
    def weight_bytes(self) -> int:
        return stored(self.model)

    @property
    def bits(self) -> Bits:
        return self.widths

    @torch.inference_mode()
    def run(self, prompts: Tensor, new_tokens: int) -> Run:
        prompts = prompts.to(self.device)
        start = self._now()
        out = self.model(prompts, use_cache=True, **last_only(self.model))
        token = out.logits[:, -1:].argmax(-1)
        first = self._now()
        for _ in range(new_tokens - 1):
            out = self.model(token, use_cache=True, **go_on(out))
            token = out.logits[:, -1:].argmax(-1)
        return Run(first - start, self._now() - first)

    def _now(self) -> float:
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()


def last_only(model: Any) -> dict[str, int]:
    """Ask for the logits of the last token alone, as engines do: those of a whole prompt may cost more than the prompt."""
    return {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}


def stored(module: nn.Module) -> int:
    """Bytes of parameters and buffers; what is shared counts once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors if t.numel()}.values())


def in_float32(model: Any, layers: Mapping[str, nn.Module]) -> Any:
    """A copy of `model` with other modules in the place of some; what is in float32 already is shared, not copied."""
    shared: dict[int, Any] = {
        id(t): t for t in (*model.parameters(), *model.buffers()) if t.dtype == torch.float32
    }
    # What is replaced is not copied before.
    shared |= {id(model.get_submodule(name)): nn.Identity() for name in layers}
    own = copy.deepcopy(model, shared).float()
    for name, layer in layers.items():
        own.set_submodule(name, layer)
    return own
