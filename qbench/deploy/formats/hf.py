"""Floating-point weights as quantization left them, in the hub's layout: what any library loads, and nothing smaller."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qbench.deploy.formats.format import Format, Logits
from qbench.deploy.layers import QuantizedLayer
from qbench.deploy.writer import Writer
from qbench.errors import Unsuitable
from qbench.models.family import family_of
from qbench.models.layout import hub_tensors, is_tied, load_checkpoint, plain, save_around


class HuggingFace(Format):
    """Safetensors with every weight in floating point, on its grid."""

    name: ClassVar[str] = "hf"
    title: ClassVar[str] = "floating-point safetensors, which any library loads"

    def check(self) -> None:
        self.check_function()
        scheme = self.source.scheme
        if not scheme.weights and not scheme.is_float:
            raise Unsuitable(
                f"of {scheme} a checkpoint in floating point would hold nothing: weights alone are in it",
                "set kvbits where the engine runs; an engine of compressed-tensors reads kvbits=8 kv_layout=tensor "
                "kv_symmetric=true beside quantized weights",
            )

    def check_function(self) -> None:
        """Refuse what is no function of a checkpoint of the architecture.

        Raises:
            Unsuitable: As `check`.
        """
        if beside := self.source.algorithm.beside:
            raise Unsuitable(
                f"the model needs {beside}, which no checkpoint of its architecture holds",
                "export the recipe without them; where they are rotations, with algo.steps.rotate.online=false",
            )
        if self.source.scheme.kv is not None and self.source.scheme.kv.rotate:
            raise Unsuitable(
                "keys are rotated at inference, which no checkpoint of its architecture says",
                "export a recipe with kv_rotate=false",
            )

    def block(
        self,
        writer: Writer,
        path: str,
        block: nn.Module,
        layers: Sequence[QuantizedLayer],
        fixed: Mapping[str, Tensor],
    ) -> None:
        writer.add(self._hub({f"{path}.{name}": tensor for name, tensor in block.state_dict().items()}))

    def write_packed(
        self,
        writer: Writer,
        path: str,
        block: nn.Module,
        packed: Mapping[str, Mapping[str, Tensor]],
        names: Mapping[str, str],
    ) -> None:
        """Write a block whose quantized layers are other tensors than a weight: these, and the rest as it is.

        Args:
            packed: By a layer's name in the model: its tensors, by their names in the format.
            names: Of layers on the hub, by their names in the model.
        """
        rest = {f"{path}.{name}": tensor for name, tensor in block.state_dict().items()}
        writer.add(self._hub({n: t for n, t in rest.items() if n.removesuffix(".weight") not in packed}))
        for name, tensors in packed.items():
            writer.add({f"{names[name]}.{key}": tensor for key, tensor in tensors.items()})

    def finish(self, writer: Writer, model: Any, tokenizer: Any) -> None:
        family, tied = family_of(model), is_tied(model)
        rest = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not name.startswith(f"{family.blocks}.") and not (tied and name == f"{family.head}.weight")
        }
        writer.add(self._hub(rest))
        save_around(model, tokenizer, writer.folder, self.source.dtype, self.quantization())

    def quantization(self) -> dict[str, Any] | None:
        """What `config.json` says of quantization."""
        return None

    def stored(self, layer: QuantizedLayer) -> Tensor:
        return layer.weight.detach().to(self.source.dtype)

    def stored_bits(self, layer: QuantizedLayer) -> float:
        return float(layer.weight.numel() * self.source.dtype.itemsize * 8)

    def reader(self, folder: Path, attn: str | None) -> tuple[Logits | None, str]:
        return logits_of(load_checkpoint(folder, self.source.dtype, attn)), ""

    def notes(self) -> list[str]:
        scheme = self.source.scheme
        quantized = [
            what
            for what, there in (
                ("inputs of linear layers", bool(scheme.activations)),
                ("keys and values", scheme.kv is not None),
                ("attention's products", scheme.bmm is not None),
            )
            if there
        ]
        if not quantized:
            return []
        return [
            f"Weights alone are in this checkpoint; {', '.join(quantized)} are not quantized by who loads it."
        ]

    @cached_property
    def built(self) -> Any:
        """The model as transformers builds it, without weights."""
        return plain(self.source.skeleton)

    def _hub(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        wanted = self.source.dtype
        cast = {n: t.to(wanted) if t.dtype in _FLOATS else t for n, t in tensors.items()}
        return hub_tensors(self.source.skeleton, self.built, cast)


def logits_of(model: Any) -> Logits:
    def read(ids: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = model(ids, use_cache=False).logits
            return found.float()

    return read


_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
