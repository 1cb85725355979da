"""GGUF, the one file that llama.cpp loads: codes as they are where a type of GGUF has the grid, or rounded anew.

`--to gguf` takes, for each layer, the smallest type that holds its grid: codes are those that the algorithm chose, and
only scales and minima are rounded, to float16. `--to gguf-<type>` writes every layer as that type, by its own quantizer
where it does not hold the grid: another rounding, on top of the recipe's. llama.cpp rounds the inputs of quantized layers
to 8 bits itself, in blocks of 32 (K-quants: 256).
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from gguf import GGML_QUANT_VERSION, GGUFReader, GGUFWriter
from torch import Tensor, nn

from qbench.deploy.formats.format import Format, Logits, Source
from qbench.deploy.formats.gguf_metadata import Places, rotary_factors, write_metadata
from qbench.deploy.formats.gguf_tensors import Tensors
from qbench.deploy.formats.gguf_types import (
    FLOATS,
    KINDS,
    Kind,
    Packed,
    fitting,
    packed,
    rounded,
    smallest_holding,
    unpacked,
)
from qbench.deploy.formats.gguf_vocabulary import vocabulary_of
from qbench.deploy.formats.hf import logits_of
from qbench.deploy.layers import QuantizedLayer
from qbench.deploy.llamacpp import NO_LLAMACPP, gguf_logits, has_llamacpp
from qbench.deploy.writer import Writer
from qbench.errors import Unsuitable, first_line
from qbench.models.family import family_of
from qbench.models.gguf_file import load_gguf
from qbench.models.layout import is_tied
from qbench.models.manifest import verify_if_listed
from qbench.quant.spec import QuantSpec

GGUF_FILE = "model.gguf"
# Of llama.cpp's Q8_0 and Q8_1; beside K-quants its groups are of 256.
ENGINE_INPUTS = QuantSpec(8, True, "group", 32)


class GGUF(Format):
    """One file with metadata, tokenizer and tensors, which wait in a folder until all are known.

    Attributes:
        kind: Of all quantized layers; `None` for the smallest that holds a layer's grid.
    """

    name: ClassVar[str] = "gguf"
    title: ClassVar[str] = "GGUF, which llama.cpp loads"
    packages: ClassVar[tuple[str, ...]] = ("gguf",)
    loading: ClassVar[str] = "The tokenizer is in the file.\n\n```bash\nllama-cli -m model.gguf\n```"
    kind: ClassVar[Kind | None] = None

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._held: Counter[Kind] = Counter()
        self._anew: Counter[Kind] = Counter()

    def check(self) -> None:
        self._check_outside()
        if self.kind is None and (mixes := self.source.algorithm.mixes):
            raise Unsuitable(f"GGUF has codes of one grid for a layer, not {mixes}", _OFFER)
        if self.source.dtype not in FLOATS:
            raise Unsuitable(
                f"GGUF is not written in {self.source.dtype}", "use float32, float16 or bfloat16"
            )
        family = family_of(self.source.skeleton)
        for index, block in enumerate(self.source.skeleton.get_submodule(family.blocks)):
            for name in family.linears(block):
                spec = self.source.scheme.layer(index, name).weight
                if spec is not None:
                    self._check_layer(f"{index}.{name}", spec, block.get_submodule(name).in_features)

    def _check_outside(self) -> None:
        """Refuse what a model needs beside weights, and architectures that are not known."""
        algorithm, scheme = self.source.algorithm, self.source.scheme
        if algorithm.beside:
            raise Unsuitable(f"the model needs {algorithm.beside}, which a GGUF file cannot hold", _PLAIN)
        if scheme.activations or scheme.bmm is not None:
            raise Unsuitable(
                "llama.cpp rounds inputs of quantized layers in a way of its own, to 8 bits",
                "export a recipe with abits=16",
            )
        if scheme.kv is not None:
            raise Unsuitable(
                "a GGUF file says nothing of keys and values",
                "export a recipe with kvbits=16, and choose their type where llama.cpp runs (-ctk, -ctv)",
            )
        for name in self.source.skeleton.state_dict():
            self._tensors.places.name(name)

    def _check_layer(self, name: str, spec: QuantSpec, in_features: int) -> None:
        if self.kind is None:
            if smallest_holding(spec, in_features) is None:
                raise Unsuitable(
                    "no type of GGUF has the recipe's grid",
                    f"{name} has rows of {in_features} in {self.source.scheme}; {_OFFER}",
                )
            return
        kind = fitting(self.kind, in_features)
        if kind is None:
            raise Unsuitable(
                f"{self.kind.name} stores {self.kind.block} neighbours together",
                f"{name} has rows of {in_features}; use --to gguf-f16 or gguf-bf16",
            )
        if kind.needs_llamacpp and not has_llamacpp():
            raise Unsuitable(
                f"{kind.name} is rounded by llama.cpp itself",
                "pip install 'qbench[llamacpp]', which compiles it",
            )

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer that llama.cpp has not; as `check`, before weights are loaded."""
        vocabulary_of(tokenizer, self.source.skeleton.get_input_embeddings().weight.shape[0])

    def block(
        self,
        writer: Writer,
        path: str,
        block: nn.Module,
        layers: Sequence[QuantizedLayer],
        fixed: Mapping[str, Tensor],
    ) -> None:
        quantized = {layer.name: layer for layer in layers if layer.spec is not None}
        for name, tensor in block.state_dict().items():
            full = f"{path}.{name}"
            if layer := quantized.get(full.removesuffix(".weight")):
                kind, held = self._kind(layer)
                (self._held if held else self._anew)[kind] += 1
                self._tensors.keep(writer.folder, full, kind, self._packed(layer), len(tensor))
            else:
                self._plain(writer, full, tensor)

    def finish(self, writer: Writer, model: Any, tokenizer: Any) -> None:
        blocks, head = family_of(model).blocks, family_of(model).head
        for name, tensor in model.state_dict().items():
            if not name.startswith(f"{blocks}.") and not (is_tied(model) and name == f"{head}.weight"):
                self._plain(writer, name, tensor)
        rows = model.get_input_embeddings().weight.shape[0]
        file = GGUFWriter(writer.folder / GGUF_FILE, self._tensors.places.architecture.name)
        write_metadata(file, model.config, rows)
        vocabulary_of(tokenizer, rows).write(file)
        file.add_description(self.statement())
        file.add_quantization_version(GGML_QUANT_VERSION)
        most = (self._held + self._anew).most_common(1)
        file.add_file_type(most[0][0].file if most else FLOATS[self.source.dtype].file)
        if (factors := rotary_factors(model)) is not None:
            file.add_tensor("rope_freqs.weight", factors.numpy())
        self._tensors.write(writer.folder, file)

    def stored(self, layer: QuantizedLayer) -> Tensor:
        return unpacked(self._kind(layer)[0], self._packed(layer))

    def stored_bits(self, layer: QuantizedLayer) -> float:
        return self._kind(layer)[0].bits * layer.weight.numel()

    def reader(self, folder: Path, attn: str | None) -> tuple[Logits | None, str]:
        """transformers, which computes with the weights as they are stored; llama.cpp is `engine`."""
        verify_if_listed(folder)
        path, config = folder / GGUF_FILE, copy.deepcopy(self.source.skeleton.config)
        try:
            names = {tensor.name for tensor in GGUFReader(path).tensors}
        except (ValueError, IndexError) as error:
            raise OSError(f"{path} is damaged or cut off ({first_line(error)}); export it again") from error
        config.tie_word_embeddings = "output.weight" not in names
        model = load_gguf(path, config, self._tensors.places.architecture.name, self.source.dtype, attn)
        return logits_of(model), ""

    def engine(self, folder: Path) -> tuple[Logits | None, str]:
        """llama.cpp, or why it is not to be had; it rounds inputs of quantized layers to `ENGINE_INPUTS`."""
        return (partial(gguf_logits, folder / GGUF_FILE), "") if has_llamacpp() else (None, NO_LLAMACPP)

    def engine_input(self, layer: QuantizedLayer) -> QuantSpec:
        kind = self._kind(layer)[0]
        return replace(ENGINE_INPUTS, group_size=max(kind.block, ENGINE_INPUTS.group_size or 1))

    def notes(self) -> list[str]:
        inner = "llama.cpp rounds the inputs of quantized layers to 8 bits, which the recipe did not."
        return [self.statement() + ".", inner] if self._rounds_inputs else [self.statement() + "."]

    def statement(self) -> str:
        """What was stored as it is, and what was rounded anew."""
        parts = [f"{n} layers as {kind.name}, in the recipe's own codes" for kind, n in self._held.items()]
        if self._held:
            parts.append("scales and minima rounded to float16")
        if any(kind == KINDS["mxfp4"] for kind in self._held):
            parts.append("those of mxfp4 powers of two as they are")
        parts += [f"{n} layers rounded anew to {kind.name}" for kind, n in self._anew.items()]
        if self.kind is not None and any(kind != self.kind for kind in self._held + self._anew):
            parts.append(f"{self.kind.name} does not divide the rows of those that are of another type")
        return f"qbench: {self.source.scheme}; " + "; ".join(parts or ["no layer quantized"])

    @property
    def _rounds_inputs(self) -> bool:
        """Whether llama.cpp rounds what some layer reads: it does where weights are of a quantized type."""
        return any(kind not in FLOATS.values() for kind in self._held + self._anew)

    @cached_property
    def _tensors(self) -> Tensors:
        return Tensors(Places.of(self.source.skeleton.config))

    def _kind(self, layer: QuantizedLayer) -> tuple[Kind, bool]:
        """What a layer is stored as, and whether in the recipe's codes."""
        columns, spec = layer.weight.shape[1], layer.spec
        if spec is None:
            return FLOATS[self.source.dtype], False
        kind = smallest_holding(spec, columns) if self.kind is None else fitting(self.kind, columns)
        mixed = layer.grid is None or layer.kept is not None or layer.widths is not None
        held = (
            kind is not None and not mixed and not self.source.algorithm.mixes and kind.holds(spec, columns)
        )
        if kind is None or not (held or self.kind):
            raise ValueError(f"{layer.name} was rounded to a grid that no type of GGUF has; {_OFFER}")
        return kind, held

    def _packed(self, layer: QuantizedLayer) -> Packed:
        """A layer as it is stored, its rows in the model's order."""
        kind, held = self._kind(layer)
        if held and layer.spec is not None and layer.grid is not None:
            return packed(kind, layer.codes(), layer.grid, layer.spec)
        return rounded(kind, layer.weight)

    def _plain(self, writer: Writer, name: str, tensor: Tensor) -> None:
        """A tensor that stays in floating point; llama.cpp reads vectors in float32 alone."""
        kind = FLOATS[self.source.dtype if tensor.dim() > 1 else torch.float32]
        self._tensors.keep(writer.folder, name, kind, rounded(kind, tensor), len(tensor))


_OFFER = "use --to gguf-<type>, which rounds the weights anew, or --to hf"
_PLAIN = "export a recipe without them, such as algo=quarot_gptq algo.steps.rotate.online=false"


def _of(kind: Kind) -> type[GGUF]:
    """The format that writes one type."""
    about = f"GGUF of {kind.name}, which llama.cpp loads"
    return type(f"GGUF_{kind.name}", (GGUF,), {"name": f"gguf-{kind.name}", "title": about, "kind": kind})


GGUFS: tuple[type[GGUF], ...] = (GGUF, *(_of(kind) for kind in KINDS.values()))
