"""compressed-tensors: codes and scales as vLLM, SGLang and transformers load them.

The library that owns the format packs and unpacks (`compressed_tensors.compressors`). It rounds weights anew as it packs
them; these lie on their grids already, and every layer is unpacked again and compared before it is written.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qbench.deploy.formats.compressed_args import Group, group_of, kv_args
from qbench.deploy.formats.format import Logits
from qbench.deploy.formats.hf import HuggingFace, logits_of
from qbench.deploy.layers import QuantizedLayer
from qbench.deploy.writer import Writer
from qbench.errors import Unsuitable
from qbench.models.family import family_of
from qbench.models.layout import hub_names, load_checkpoint
from qbench.quant.codes import decoded, outer_of
from qbench.quant.grid import QParams
from qbench.quant.spec import QuantSpec, SymmetricMode

_DENSE = "from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True))"
_MISREAD = "compressed-tensors 0.18 to 0.20 makes no room for packed zero-points; with 0.15 to 0.17 the plain way works"
_ONE_SCHEME = "export a recipe with one scheme for all layers, abits=16 and kvbits=16"
_SYMMETRIC = "export a recipe with weight_symmetric=true, or install compressed-tensors<0.18"


class CompressedTensors(HuggingFace):
    """Packed integers, FP8, MX and NVFP4; one format for each group of layers that have one scheme."""

    name: ClassVar[str] = "compressed-tensors"
    title: ClassVar[str] = "compressed-tensors, which vLLM, SGLang and transformers load"
    packages: ClassVar[tuple[str, ...]] = ("compressed-tensors",)

    def __init__(self, source: Any) -> None:
        super().__init__(source)
        self._written: dict[str, Group] = {}

    def check(self) -> None:
        self.check_function()
        scheme, offer = self.source.scheme, "export it with --to hf, in floating point"
        if mixes := self.source.algorithm.mixes:
            raise Unsuitable(f"compressed-tensors has codes of one grid for a layer, not {mixes}", offer)
        if scheme.bmm is not None:
            raise Unsuitable(
                "compressed-tensors leaves attention's products in floating point",
                "export a recipe without quant_bmm",
            )
        if not scheme.weights:
            raise Unsuitable(
                "compressed-tensors is for quantized weights, which the scheme leaves in floating point",
                offer,
            )
        for group in set(self._planned.values()):
            if group.needs_bfloat16 and self.source.dtype != torch.bfloat16:
                raise Unsuitable(
                    f"compressed-tensors unpacks {group.format} to bfloat16, and does not run beside other dtypes",
                    "set dtype=bfloat16",
                )
            group.compressor  # noqa: B018  (raises where the library has none)
        kv_args(scheme.kv)
        self._check_layers()

    @cached_property
    def _planned(self) -> dict[str, Group]:
        """What each layer that is quantized is written as."""
        family, planned = family_of(self.source.skeleton), {}
        for index, block in enumerate(self.source.skeleton.get_submodule(family.blocks)):
            for name in family.linears(block):
                own = self.source.scheme.layer(index, name)
                if own.weight is not None or own.activation is not None:
                    planned[f"{family.blocks}.{index}.{name}"] = group_of(own.weight, own.activation)
        return planned

    @cached_property
    def _hub_names(self) -> dict[str, str]:
        return hub_names(self.source.skeleton, self.built, self._planned)

    @cached_property
    def fused(self) -> bool:
        """Whether transformers merges quantized layers into others as it loads them (experts)."""
        modules = dict(self.built.named_modules())
        return any(name not in modules for name in self._planned)

    def _check_layers(self) -> None:
        modules = dict(self.built.named_modules())
        for name in self._planned:
            module = modules.get(name)
            if module is not None and type(module) is not nn.Linear:
                raise Unsuitable(
                    f"{name} is a {type(module).__name__} to transformers, and compressed-tensors packs nn.Linear alone",
                    "export it with --to hf, in floating point",
                )
        if self.fused and any(not group.weights.symmetric for group in self._planned.values()):
            raise Unsuitable(
                "transformers merges experts as it loads them, and unpacks no zero-points of theirs",
                "export a recipe with weight_symmetric=true",
            )
        if self._dense and not self._dense_is_all:
            raise Unsuitable(
                "transformers makes floating-point weights of these layers as it loads them, all by one scheme, and "
                "forgets what inputs, keys and values are to be",
                _ONE_SCHEME if self.fused else _SYMMETRIC,
            )
        self._hub_names  # noqa: B018  (raises where a layer is none of its own)

    def block(
        self,
        writer: Writer,
        path: str,
        block: nn.Module,
        layers: Sequence[QuantizedLayer],
        fixed: Mapping[str, Tensor],
    ) -> None:
        packed = {layer.name: self._packed(layer) for layer in layers if layer.spec is not None}
        self._written |= {name: group for name, (group, _) in packed.items()}
        self.write_packed(
            writer, path, block, {n: tensors for n, (_, tensors) in packed.items()}, self._hub_names
        )
        if kv_args(self.source.scheme.kv) is not None:
            attention = (family_of(self.source.skeleton).attention_out or "").rpartition(".")[0]
            for ours, theirs in (("keys", "k_scale"), ("values", "v_scale")):
                scale = fixed[f"{ours}|scale"].reshape(1).to(self.source.dtype)
                writer.add({f"{path}.{attention}.{theirs}": scale})

    def stored(self, layer: QuantizedLayer) -> Tensor:
        group, tensors = self._packed(layer)
        return _unpacked(group, tensors).to(self.source.dtype)

    def _packed(self, layer: QuantizedLayer) -> tuple[Group, dict[str, Tensor]]:
        """A layer's tensors by their names in the format.

        Raises:
            ValueError: If the weight does not lie on the grid that the rounder left, or cannot be unpacked to it.
        """
        spec = layer.spec
        if spec is None or layer.grid is None:
            raise ValueError(
                f"{layer.name} was rounded to a grid that compressed-tensors has not; use --to hf"
            )
        codes, weight = layer.codes(), layer.weight.detach().to(self.source.dtype)
        group = group_of(spec, layer.activation)
        if spec.format == "int":  # rounded anew with a rounded scale, high codes would move
            stored = QParams(layer.grid.scale.to(self.source.dtype).float(), layer.grid.zero)
            weight = decoded(codes, stored, spec, torch.float32)
        given = {"weight": weight, **_parameters(layer, spec, self.source.dtype)}
        tensors = group.compressor.compress(given, group.scheme())
        back = _unpacked(group, tensors)
        wanted, wrong = layer.weight.detach(), back.double() - layer.weight.detach().double()
        # Scales, zero at most, and the product are each rounded once: three units in the last place at most.
        eps = (
            0.0
            if self.source.dtype == torch.float32 == wanted.dtype
            else 3 * max(torch.finfo(self.source.dtype).eps, torch.finfo(wanted.dtype).eps)
        )
        if (wrong.abs() > eps * wanted.double().abs()).any():
            raise ValueError(
                f"{layer.name} is not what was evaluated once it is packed, by {wrong.abs().max():.1e}"
            )
        if layer.input_grid is not None:
            tensors["input_scale"] = layer.input_grid.scale.reshape(1).to(self.source.dtype)
        return group, tensors

    def stored_bits(self, layer: QuantizedLayer) -> float:
        spec, wide = layer.spec, self.source.dtype.itemsize * 8
        if spec is None:
            return float(layer.weight.numel() * wide)
        rows, columns = layer.weight.shape
        plain = replace(spec, scale_bits=16)
        bits = plain.bits_per_element(rows, columns) * rows * columns
        if spec.scale_format == "float16":  # as wide as the checkpoint's dtype
            bits += (wide - 16) * plain.n_scales(rows, columns)
        return bits

    def reader(self, folder: Path, attn: str | None) -> tuple[Logits | None, str]:
        return logits_of(load_checkpoint(folder, self.source.dtype, attn, dense=self._dense)), ""

    @property
    def reads_kv(self) -> bool:
        # The library finds the cache among attention's arguments by the names that transformers had for it until 5.23.
        family = family_of(self.source.skeleton)
        attention = (family.attention_out or "").rpartition(".")[0]
        module = self.built.get_submodule(family.blocks)[0].get_submodule(attention)
        return bool({"past_key_value", "past_key_values"} & signature(module.forward).parameters.keys())

    def as_read(self, spec: QuantSpec) -> QuantSpec:
        # Its largest magnitude is half a step beyond the highest code, as in GPTQ's grids.
        mode: SymmetricMode = (
            "gptq" if spec.format == "int" and spec.symmetric and spec.dynamic else spec.symmetric_mode
        )
        return replace(spec, symmetric_mode=mode)

    def notes(self) -> list[str]:
        """How it is loaded where that is not the plain way, and what is not as it was evaluated."""
        found = []
        if self._dense:
            why = "it merges experts as it loads them" if self.fused else _MISREAD
            found.append(f"transformers loads it with `{_DENSE}`: {why}.")
        odd = {
            g.weights.bits
            for g in self._planned.values()
            if g.format == "pack-quantized" and 32 % g.weights.bits
        }
        if odd:
            found.append(
                f"Codes of {', '.join(map(str, sorted(odd)))} bits lie as compressed-tensors "
                f"{version('compressed-tensors')} packs them: before 0.18, 32 // bits in a word; from 0.18 on, without "
                "gaps. Each reads only its own."
            )
        if self.source.scheme.kv is not None and not self.reads_kv:
            found.append(
                "The installed transformers and compressed-tensors do not find each other's cache: loaded there, keys "
                "and values stay in floating point. Engines that read k_scale and v_scale (vLLM, SGLang) find them."
            )
        if any(g.weights.scale_format == "e4m3" for g in self._planned.values()):
            found.append(
                "vLLM and SGLang merge layers (q, k and v; gate and up) as they load them, and take one second scale for "
                "all parts, the largest that is stored. Here each layer has its own, so that their weights are others there."
            )
        if any(
            g.weights.format == "e4m3" and g.weights.granularity == "tensor" for g in self._planned.values()
        ):
            found.append(
                "vLLM and SGLang round merged layers (q, k and v; gate and up) anew as they load them, to the largest of "
                "their scales; weight_granularity=auto, with a scale for each row, is loaded as it is."
            )
        if self.source.scheme.kv is not None and self.source.scheme.kv.key.format == "int":
            found.append("vLLM has keys and values in FP8 alone; kv_format=e4m3 is what it computes.")
        if any(self.as_read(spec) != spec for spec in self.source.scheme.activations):
            found.append(
                "transformers' compressed-tensors quantizes int8 inputs with scale 2 max|x| / (2^bits - 1), evaluated was "
                "max|x| / (2^(bits-1) - 1), as in vLLM's kernels; act_symmetric_mode=gptq evaluates the former."
            )
        return found

    @property
    def _dense_is_all(self) -> bool:
        """Whether floating-point weights by one scheme are all that there is to the model."""
        groups = set(self._planned.values())
        return len(groups) == 1 and not any(g.inputs for g in groups) and self.source.scheme.kv is None

    @cached_property
    def _dense(self) -> bool:
        """Whether transformers can load it only with `dequantize=True`."""
        return self.fused or any(_zeros_are_misread(group) for group in set(self._planned.values()))

    def quantization(self) -> dict[str, Any]:
        """The library's own config: groups of layers by scheme, what is ignored, the cache."""
        from compressed_tensors.quantization import QuantizationConfig

        groups: dict[Group, list[str]] = {}
        for name, group in self._written.items():
            groups.setdefault(group, []).append(self._hub_names[name])
        ignored = [name for name in _like_linears(self.built) if name not in self._written]
        packed = self._written.keys() | set(self._hub_names.values())
        alone = len(groups) == 1
        config = QuantizationConfig(
            config_groups={
                f"group_{i}": group.scheme(["Linear"] if alone else names)
                for i, (group, names) in enumerate(groups.items())
            },
            ignore=_shortened(ignored, packed), kv_cache_scheme=kv_args(self.source.scheme.kv),
            format=next(iter(groups)).format if alone else "mixed-precision", quantization_status="compressed",
        )  # fmt: skip
        return {"quant_method": "compressed-tensors", **config.model_dump(mode="json", exclude_none=True)}


def _zeros_are_misread(group: Group) -> bool:
    """Whether the installed library expects packed zero-points to be unpacked.

    It makes room for a layer's tensors by compressing one without storage, and some versions pack no zero-points then.
    """
    if group.weights.symmetric or group.format != "pack-quantized":
        return False
    with torch.device("meta"):
        weight, scale = torch.empty(32, group.weights.group_size or 32), torch.empty(32, 1)
        given = {"weight": weight, "weight_scale": scale, "weight_zero_point": scale.to(torch.int8)}
    return len(group.compressor.compress(given, group.scheme())["weight_zero_point"]) == len(scale)


def _parameters(layer: QuantizedLayer, spec: QuantSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    """Scales and zero-points as the compressor takes them."""
    assert layer.grid is not None
    rows = len(layer.weight)
    scale, zero = layer.grid
    if spec.granularity == "tensor":
        return {"weight_scale": scale.flatten()[:1].to(dtype)}
    if spec.granularity == "block":
        scale = scale.expand(rows, -1, 1)[:: spec.group_size]
    scale = scale.expand(len(scale) if spec.granularity == "block" else rows, -1, 1).squeeze(-1)
    if spec.scale_format == "e8m0":
        return {"weight_scale": scale}
    if spec.scale_format == "e4m3":
        outer = outer_of(scale)
        return {"weight_scale": scale / outer, "weight_global_scale": (1 / outer).reshape(1)}
    found = {"weight_scale": scale.to(dtype)}
    if not spec.symmetric:
        # Codes are stored with a sign: all are shifted by half of the range.
        shifted = zero.expand(rows, -1, 1).squeeze(-1) - 2 ** (spec.bits - 1)
        found["weight_zero_point"] = shifted.to(torch.int8)
    return found


def _unpacked(group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
    return group.compressor.decompress(dict(tensors), group.scheme())["weight"]


def _like_linears(built: nn.Module) -> list[str]:
    """What engines may take for linear layers; routers are, though transformers has modules of their own for them."""
    found = []
    for name, module in built.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            found.append(name)
    return found


def _shortened(names: Sequence[str], packed: Collection[str]) -> list[str]:
    """Layers by one pattern for those of all blocks, where none that is packed fits it; else by their names."""
    alone, patterns = list[str](), dict[str, None]()
    for name in names:
        pattern = re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name))
        if pattern == re.escape(name) or any(re.fullmatch(pattern, other) for other in packed):
            alone.append(name)
        else:
            patterns[pattern] = None
    return alone + [f"re:{pattern}$" for pattern in sorted(patterns)]
