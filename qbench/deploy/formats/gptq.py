"""GPTQ's layout: codes packed along the inputs, 2, 3, 4 or 8 bits each, with a scale and a zero-point of each group.

`gptqmodel` (an optional extra), which owns the format, packs and unpacks; every layer is unpacked again and compared before
it is written.

Zero-points are stored in one of two ways. `gptq` stores them less one, so that 0 has no place; it is kept to symmetric
grids, whose zero-point is 2^(bits-1). `gptq_v2` stores them as they are.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qbench.deploy.formats.format import Logits
from qbench.deploy.formats.gptqmodel import Parts, can_pack, kernel_for, packed, parts_of, quietly
from qbench.deploy.formats.hf import HuggingFace, logits_of
from qbench.deploy.layers import QuantizedLayer
from qbench.deploy.writer import Writer
from qbench.errors import Unsuitable
from qbench.models.family import family_of
from qbench.models.layout import hub_names, load_checkpoint
from qbench.quant.spec import QuantSpec

WORD = 32  # bits of what codes are packed into
# transformers reads or initializes weights of these by name, which packed layers have not (5.24).
_UNLOADED = {"gpt_bigcode", "mamba", "mamba2", "falcon_mamba"}
_OTHERS = "export it with --to compressed-tensors, or with --to hf in floating point"


class GPTQLayout(HuggingFace):
    """Packed integers of one width, weights alone.

    Attributes:
        kernel: The one of gptqmodel's that runs on every device, with every width.
        widths: Bits that it has.
    """

    name: ClassVar[str] = "gptq"
    title: ClassVar[str] = "GPTQ's layout, which GPTQModel, vLLM, SGLang and transformers load"
    packages: ClassVar[tuple[str, ...]] = ("gptqmodel",)
    kernel: ClassVar[str] = "torch"
    widths: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)

    def check(self) -> None:
        self.check_function()
        scheme = self.source.scheme
        if mixes := self.source.algorithm.mixes:
            raise Unsuitable(f"{self.name} has codes of one grid for a layer, not {mixes}", _OTHERS)
        for what, there in (
            ("inputs", bool(scheme.activations)),
            ("keys and values", scheme.kv is not None),
            ("attention's products", scheme.bmm is not None),
        ):
            if there:
                raise Unsuitable(
                    f"{self.name} is for weights, and says nothing of {what}, which the scheme quantizes",
                    _OTHERS,
                )
        for spec in self._planned.values():
            self._check_spec(spec)
        if len({_kind(spec) for spec in self._planned.values()}) != 1:
            raise Unsuitable(
                f"{self.name} has one width and one group size for all layers that it packs", _OTHERS
            )
        self._check_layers()
        self._check_library()

    def _check_spec(self, spec: QuantSpec) -> None:
        if spec.format != "int":
            raise Unsuitable(f"{self.name} has integers alone, not {spec.format}", _OTHERS)
        if spec.bits not in self.widths:
            known = ", ".join(map(str, self.widths))
            raise Unsuitable(f"{self.name} has codes of {known} bits, not of {spec.bits}", _OTHERS)
        if spec.real_zero:
            raise Unsuitable(f"{self.name} has zero-points that are integers, not real numbers", _OTHERS)
        if spec.granularity not in ("row", "group"):
            raise Unsuitable(
                f"{self.name} has a scale for a row, or for a group of a row, not for a {spec.granularity}",
                _OTHERS,
            )

    def _check_layers(self) -> None:
        """Refuse layers that readers of the format do not replace, or that do not fill whole words."""
        if (model_type := self.source.skeleton.config.model_type) in _UNLOADED:
            raise Unsuitable(f"transformers does not load {self.name} checkpoints of {model_type}", _OTHERS)
        modules = dict(self.built.named_modules())
        for name, spec in self._planned.items():
            kind = type(modules[name]).__name__ if name in modules else "part of merged experts"
            if kind != "Linear":
                raise Unsuitable(
                    f"{name} is a {kind} to transformers, and {self.name} packs nn.Linear", _OTHERS
                )
            whole = WORD if WORD % spec.bits else WORD // spec.bits
            for side, size in zip(("outputs", "inputs"), self._shape(name), strict=True):
                if size % whole:
                    raise Unsuitable(
                        f"{name} has {size} {side}, and {self.name} packs {whole} codes of {spec.bits} bits at a time",
                        _OTHERS,
                    )
        self._hub_names  # noqa: B018  (raises where a layer is none of its own)

    def _check_library(self) -> None:
        missing = [name for name in ("gptqmodel", "optimum") if find_spec(name) is None]
        if missing:
            raise Unsuitable(
                f"{self.name} is packed by gptqmodel and read with optimum; {' and '.join(missing)} cannot be found",
                "pip install 'qbench[gptqmodel]', or export with --to compressed-tensors",
            )
        with quietly():
            fits = can_pack(self._layout, self._where, self.kernel)
        if not fits:
            size = self._layout["group_size"]
            raise Unsuitable(f"gptqmodel has no {self.name} with groups of {size}", _OTHERS)

    @cached_property
    def _planned(self) -> dict[str, QuantSpec]:
        """The grid of each layer that is packed."""
        family, planned = family_of(self.source.skeleton), {}
        for index, block in enumerate(self.source.skeleton.get_submodule(family.blocks)):
            for name in family.linears(block):
                if (spec := self.source.scheme.layer(index, name).weight) is not None:
                    planned[f"{family.blocks}.{index}.{name}"] = spec
        if not planned:
            raise Unsuitable(
                f"{self.name} is for quantized weights, which the scheme leaves in floating point",
                "set wbits",
            )
        return planned

    @cached_property
    def _hub_names(self) -> dict[str, str]:
        return hub_names(self.source.skeleton, self.built, self._planned)

    def _shape(self, name: str) -> tuple[int, int]:
        rows, columns = self.source.skeleton.get_parameter(f"{name}.weight").shape
        return rows, columns

    def block(
        self,
        writer: Writer,
        path: str,
        block: nn.Module,
        layers: Sequence[QuantizedLayer],
        fixed: Mapping[str, Tensor],
    ) -> None:
        packed = {layer.name: self._packed(layer) for layer in layers if layer.spec is not None}
        self.write_packed(writer, path, block, packed, self._hub_names)

    def stored(self, layer: QuantizedLayer) -> Tensor:
        return self._read(parts_of(layer)).to(self.source.dtype)

    def _read(self, parts: Parts) -> Tensor:
        """The weight as kernels unpack it: the product of a step and a float16 scale, in float16."""
        size = parts.codes.shape[1] // parts.scale.shape[1]
        return parts.scale.repeat_interleave(size, 1) * parts.steps

    def stored_bits(self, layer: QuantizedLayer) -> float:
        rows, columns = layer.weight.shape
        spec = layer.spec
        if spec is None:
            return float(rows * columns * self.source.dtype.itemsize * 8)
        return float(
            rows * columns * spec.bits
            + spec.n_scales(rows, columns) * (16 + spec.bits)
            + self._beside(columns)
        )

    def _beside(self, columns: int) -> int:
        """Bits of the group of each input, which is stored although inputs keep their order."""
        return 32 * columns

    def _packed(self, layer: QuantizedLayer) -> dict[str, Tensor]:
        """A layer's tensors by their names in the format.

        Raises:
            ValueError: If the weight is not codes of one grid, or is not what was packed when it is unpacked.
        """
        parts = parts_of(layer)
        with quietly(), torch.no_grad():
            module = packed(self._kernel, self._layout, parts)
            if not torch.equal(self._unpack(module), parts.steps):
                raise ValueError(
                    f"{layer.name} is not what was packed once gptqmodel unpacks it; please report it with its version"
                )
            return self._tensors(module) | {"scales": parts.scale.T}

    @cached_property
    def _kernel(self) -> Any:
        return kernel_for(self._layout, self._where, self.kernel)

    def _unpack(self, module: Any) -> Tensor:
        """The steps, `(out, in)`: exact in float16, scales being one."""
        steps: Tensor = module.dequantize_weight().T.int()
        return steps

    def _tensors(self, module: Any) -> dict[str, Tensor]:
        """What is stored beside scales; of zero-points, one less where the format has them so."""
        from gptqmodel import QuantizeConfig
        from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

        if self.checkpoint_format == "gptq":
            convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=module.bits))
        return {"qweight": module.qweight, "qzeros": module.qzeros, "g_idx": module.g_idx}

    @property
    def checkpoint_format(self) -> str:
        return "gptq" if self._layout["sym"] else "gptq_v2"

    @cached_property
    def _layout(self) -> dict[str, Any]:
        """Of all layers; inputs keep their order whatever order they were rounded in."""
        spec = next(iter(self._planned.values()))
        return {
            "bits": spec.bits,
            "group_size": spec.group_size or -1,
            "desc_act": False,
            "sym": self._implied(spec),
        }

    def _implied(self, spec: QuantSpec) -> bool:
        """Whether zero-points go without saying, though they are stored."""
        return spec.symmetric

    @property
    def _where(self) -> dict[str, str]:
        return {"format": self.checkpoint_format, "quant_method": self.name}

    def quantization(self) -> dict[str, Any]:
        blocks = family_of(self.source.skeleton).blocks
        said = {
            "quant_method": self.name, **self._layout, "lm_head": False, "checkpoint_format": self.checkpoint_format,
            "pack_dtype": "int32", "block_name_to_quantize": blocks, **self._skipped(),
        }  # fmt: skip
        if self._left:
            said["modules_in_block_to_quantize"] = [_shortened(self._planned, self._left, blocks)]
        return said

    @cached_property
    def _left(self) -> list[str]:
        """Layers of blocks that readers would replace, were they not told."""
        blocks = family_of(self.source.skeleton).blocks
        linears = [n for n, m in self.built.named_modules() if type(m) is nn.Linear]
        return [name for name in linears if name.startswith(f"{blocks}.") and name not in self._planned]

    def _skipped(self) -> dict[str, Any]:
        """How GPTQModel is told of layers that are not packed; transformers is told otherwise."""
        return {"dynamic": {f"-:{re.escape(name)}$": {} for name in self._left}} if self._left else {}

    def reader(self, folder: Path, attn: str | None) -> tuple[Logits | None, str]:
        with quietly(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            model = load_checkpoint(folder, self.source.dtype, attn, kernel=self.kernel)
        read = logits_of(model)

        def quiet(ids: Tensor) -> Tensor:
            # It has torch compile the unpacking of each layer, which takes longer than all that is read here.
            with quietly(), torch.compiler.set_stance("force_eager"):
                return read(ids)

        return quiet, ""

    def notes(self) -> list[str]:
        return [
            "Scales are rounded to float16, and so is a weight when it is unpacked; codes are those that were evaluated.",
            f"It was compared as GPTQModel's kernel `backend={self.kernel!r}` computes it; others round otherwise "
            "(on a CPU, the one chosen by itself takes everything to bfloat16).",
        ]


def _shortened(packed: Iterable[str], left: Sequence[str], blocks: str) -> list[str]:
    """Layers by their names within a block, if these say the same: readers look at how a name ends."""
    names = list(packed)
    within = dict.fromkeys(name.removeprefix(f"{blocks}.").partition(".")[2] for name in names)
    return names if any(name.endswith(tuple(within)) for name in left) else list(within)


def _kind(spec: QuantSpec) -> tuple[int, int | None, bool]:
    return spec.bits, spec.group_size, spec.symmetric
