"""What torch's kernels have in common: codes put in the place of a model's linear layers, and reasons not to."""

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from qbench.deploy.bench.backend import Backend, Engine, Recipe, Subject, no_recipe
from qbench.deploy.bench.generation import Generator, in_float32
from qbench.deploy.devices import Unit
from qbench.deploy.layers import QuantizedLayer
from qbench.deploy.operators import Bits, Layer
from qbench.models.rotate import is_rotated_online
from qbench.quant.grid import QParams
from qbench.quant.spec import QuantSpec

_IN_BLOCK = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")
_EXPERT = re.compile(r"experts\.\d+")  # which sizes have all of as one layer
_REST = 32.0  # bits of embeddings, norms, attention, head, keys and values: all in float32


class Kernel(nn.Module):
    """A linear layer that computes with codes; `(..., in)` to `(..., out)`.

    Attributes:
        unit: What multiplies, for the roofline.
    """

    unit: Unit

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.reshape(-1, x.shape[-1])).to(x.dtype)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """Without the bias, of rows `(n, in)`."""


class TorchKernels(Backend):
    """A backend whose layers are kernels of torch, for CPUs; the rest of the model stays in float32."""

    runs_recipe = True

    def why_not(self, subject: Subject) -> str:
        if why := no_recipe(subject, "codes of linear layers"):
            return why
        if torch.device(subject.device).type != "cpu":
            return f"it runs on a CPU, the device is {subject.device}; set device=cpu"
        assert subject.recipe is not None, "no_recipe has looked"
        return _why_not_model(subject.recipe) or next(filter(None, self._refusals(subject.recipe)), "")

    def _refusals(self, recipe: Recipe) -> Iterator[str]:
        """Why layers cannot be computed; those in floating point are left alone."""
        for layer in recipe.layers:
            if layer.spec is not None and (why := _why_not(layer, recipe) or self.why_not_layer(layer)):
                yield f"{layer.name}: {why}"

    @abstractmethod
    def why_not_layer(self, layer: QuantizedLayer) -> str:
        """Why the kernel cannot compute a layer of codes on one grid; empty if it can."""

    @abstractmethod
    def kernel(self, layer: QuantizedLayer, codes: Tensor, bias: Tensor | None) -> Kernel:
        """The layer, from its codes, `(out, in)`."""

    def open(self, subject: Subject) -> Engine:
        assert subject.recipe is not None, "why_not was asked"
        model, made = subject.recipe.model, dict[str, Kernel]()
        for layer in subject.recipe.layers:
            if layer.spec is not None:
                bias = model.get_submodule(layer.name).bias
                made[layer.name] = self.kernel(
                    layer, layer.codes(), None if bias is None else bias.detach().float()
                )
        return Generator(in_float32(model, made), widths(made))


def widths(kernels: Mapping[str, Kernel]) -> Bits:
    """Of a model in float32 with these kernels: each by what it holds."""
    layers = {}
    for name, kernel in kernels.items():
        if (found := _IN_BLOCK.match(name)) is not None:
            held = sum(b.numel() * b.element_size() for k, b in kernel.named_buffers() if k != "bias")
            layers[int(found[1]), _EXPERT.sub("experts", found[2])] = Layer(
                8 * held / kernel.n_weights, _REST, kernel.unit
            )
    return Bits(_REST, _REST, _REST, head=_REST, floating=_REST, layers=layers)


def grid_of(layer: QuantizedLayer) -> tuple[QuantSpec, QParams]:
    """Of a layer that was found to have both; scale and zero-point of every row, `(out, n_groups, 1)`."""
    assert layer.spec is not None, "only quantized layers become kernels"
    assert layer.grid is not None, "why_not was asked"
    return layer.spec, QParams(*(part.expand(layer.weight.shape[0], -1, 1) for part in layer.grid))


def _why_not_model(recipe: Recipe) -> str:
    """What of a recipe is beside its linear layers."""
    if recipe.scheme.kv is not None or recipe.scheme.bmm is not None:
        return f"attention and its cache are in floating point here, and {recipe.scheme} quantizes them"
    return ""


def _why_not(layer: QuantizedLayer, recipe: Recipe) -> str:
    """What no kernel here computes."""
    linear = recipe.model.get_submodule(layer.name)
    if not isinstance(linear, nn.Linear):
        return f"it is a {type(linear).__name__}; linear layers can be replaced"
    if is_rotated_online(linear):
        return "its input is rotated on its way in, for which there is no kernel here"
    if len(linear._forward_pre_hooks) > (layer.activation is not None) or linear._forward_hooks:
        return "what enters or leaves it is changed on the way, for which there is no kernel here"
    if layer.kept is not None or layer.widths is not None:
        return (
            "some of its weights are in floating point, or of other bits than others; a kernel has one width"
        )
    if layer.grid is None:
        return "its algorithm leaves no grid from which codes could be read"
    if layer.grid.scale.ndim != 3:
        return (
            "its whole weight shares a scale; a kernel has one for a row or a group (weight_granularity=auto)"
        )
    return ""
