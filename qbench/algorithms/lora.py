"""Low-rank compensation: adapters in half precision beside quantized weights, which make up for their error.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685, Equation 3:
`W x + (α / r) B A x`. After quantization, as in Liu et al., "Do Emergent Abilities Exist in Quantized Large Language
Models: An Empirical Study", arXiv:2307.08072, which fine-tunes end to end on instructions. Here each block is brought
near what it was, on unlabelled text: what is measured is quantization, not what a model learns from another data set.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbench.algorithms.base import Algorithm, Kind
from qbench.algorithms.learn import adam, falling, fit, steps_of
from qbench.calib.block import Block
from qbench.quant.grid import wide
from qbench.quant.scheme import Scheme
from qbench.quant.storage import FLOAT_BITS

A, B, SCALING = "lora_a", "lora_b", "lora_scaling"


@dataclass(frozen=True)
class LoRA(Algorithm):
    """Add `(α / r) B A x` to what each quantized layer makes of its input; weights stay on their grids.

    Attributes:
        r: Rank of the adapters.
        alpha: `α`.
        lr: Learning rate of the first step; it falls linearly to zero.
        epochs: Times each sample is met.
        batch_size: Samples for each step.
    """

    r: int = 8
    alpha: float = 16.0
    lr: float = 1e-3
    epochs: int = 10
    batch_size: int = 4
    seed: int = 0

    kind: ClassVar[Kind] = "tune"
    resumable: ClassVar[bool] = False  # adapters are hooks
    needs_float_path: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.r, self.epochs, self.batch_size) < 1:
            raise ValueError(
                f"LoRA has r={self.r}, epochs={self.epochs} and batch_size={self.batch_size}; all must be at least 1"
            )

    @property
    def beside(self) -> str:
        return "adapters beside the layers"

    def check(self, scheme: Scheme) -> None:
        self._check_weights(scheme)

    @torch.no_grad()
    def process(self, block: Block) -> None:
        generator = torch.Generator().manual_seed(self.seed + block.index)
        layers = {name: layer for name, layer in block.linears.items() if block.weight_spec(name) is not None}
        if not layers:
            return
        for layer in layers.values():
            add_adapter(layer, self.r, self.alpha / self.r, generator)
        adapters = {
            f"{name}.{part}": getattr(layer, part) for name, layer in layers.items() for part in (A, B)
        }
        trained = {name: wide(part).clone() for name, part in adapters.items()}
        assert block.inputs is not None
        assert block.float_outputs is not None
        steps = steps_of(self.epochs, block.inputs, self.batch_size)
        fit(
            block, "lora", lambda: {name: part.to(adapters[name].dtype) for name, part in trained.items()},
            adam((list(trained.values()), self.lr)),
            inputs=block.inputs, targets=block.float_outputs, steps=steps, batch_size=self.batch_size,
            seed=self.seed, schedule=falling(steps),
        )  # fmt: skip
        for name, part in adapters.items():
            part.copy_(trained[name])
        block.extra_bits["lora"] = float(FLOAT_BITS * sum(part.numel() for part in adapters.values()))


def add_adapter(layer: nn.Linear, r: int, scaling: float, generator: torch.Generator) -> None:
    """From now on, add to the output of `layer` that of an adapter, which is nothing at first.

    It is kept in buffers: a copy of the layer has its own, they move with it, and they are no parameters of the model.
    """
    bound = 1 / math.sqrt(layer.in_features)  # that of peft, and of nn.Linear
    a = (2 * torch.rand(r, layer.in_features, generator=generator) - 1) * bound
    layer.register_buffer(A, a.to(layer.weight))
    layer.register_buffer(B, torch.zeros(layer.out_features, r).to(layer.weight))
    layer.register_buffer(SCALING, torch.tensor(scaling).to(layer.weight), persistent=False)
    layer.register_forward_hook(_adapted)


def _adapted(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + F.linear(F.linear(args[0], layer.lora_a), layer.lora_b) * layer.lora_scaling
