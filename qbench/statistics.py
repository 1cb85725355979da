"""How the tensors of a model are distributed: weights, inputs of layers, keys and values, layer by layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qbench.calib.block import Block
from qbench.calib.moments import Moments
from qbench.calib.stream import first_inputs, to_device
from qbench.engine import placed
from qbench.models.attention import observe_kv, use_quantized_attention
from qbench.models.family import family_of
from qbench.quant.scheme import KVSpec
from qbench.quant.spec import QuantSpec

_KV = KVSpec(QuantSpec(8), QuantSpec(8))  # says how keys are shown: not rotated; its grids are not used


@dataclass(frozen=True)
class TensorStatistics:
    """What there is to say of one tensor.

    Attributes:
        tensor: `W`, a layer's weight; `A`, what enters it; `K`, keys after the rotary embedding; `V`, values.
        layer: The layer's name in its block; empty for keys and values, which belong to the block.
    """

    block: int
    layer: str
    tensor: Literal["W", "A", "K", "V"]
    absmax: float
    mean: float
    std: float
    kurtosis: float


@torch.no_grad()
def tensor_statistics(
    model: Any, tokens: Tensor, *, batch_size: int = 8, device: torch.device | str = "cpu"
) -> Iterator[TensorStatistics]:
    """Statistics of a floating-point model on `tokens`, `(n_samples, seq_len)`, block after block.

    The model is set to run an attention that can be listened to, and computes the same. One block at a time is on
    `device`.

    Raises:
        ValueError: If the model runs another attention than `sdpa`.
    """
    device, family = torch.device(device), family_of(model)
    if family.attention != "none":
        use_quantized_attention(model)
    stream, kwargs = first_inputs(model, family, tokens, batch_size)
    for index, layer in enumerate(model.get_submodule(family.blocks)):
        with placed(layer, device):
            block = Block(index, layer, family, stream, to_device(kwargs[index], device), device)
            yield from _of_layers(block)
            if family.attention == "none":
                stream = stream.through(layer, block.kwargs, device)
                continue
            keys, values = Moments(), Moments()
            with observe_kv(layer, _KV, keys.update, values.update):
                stream = stream.through(layer, block.kwargs, device)
            yield _row(index, "", "K", keys.value)
            yield _row(index, "", "V", values.value)


def _of_layers(block: Block) -> Iterator[TensorStatistics]:
    for link, (inputs,) in block.observe(Moments).items():
        for name in link.sinks:
            weight = Moments()
            weight.update(block.linear(name).weight)
            yield _row(block.index, name, "W", weight.value)
            yield _row(block.index, name, "A", inputs)


def _row(block: int, layer: str, tensor: Literal["W", "A", "K", "V"], moments: Tensor) -> TensorStatistics:
    return TensorStatistics(block, layer, tensor, *moments.tolist())
