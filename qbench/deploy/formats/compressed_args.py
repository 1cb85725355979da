"""Grids in the terms of compressed-tensors, or why there are none for them."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from qbench.errors import Unsuitable
from qbench.quant.scheme import KVSpec
from qbench.quant.spec import QuantSpec

_FLOATS = {"e4m3": 8, "e2m3": 6, "e2m1": 4}
_HF = "export it with --to hf, in floating point"


@dataclass(frozen=True)
class Group:
    """Layers that are stored alike.

    Attributes:
        weights, inputs: The grids; `None` leaves inputs in floating point.
    """

    weights: QuantSpec
    inputs: QuantSpec | None

    def scheme(self, targets: list[str] | None = None) -> Any:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        inputs = None if self.inputs is None else QuantizationArgs(**_args(self.inputs, of_input=True))
        weights = QuantizationArgs(**_args(self.weights, of_input=False))
        return QuantizationScheme(
            targets=targets or ["Linear"], weights=weights, input_activations=inputs, format=self.format
        )

    @property
    def format(self) -> str:
        """Of the format's kinds, by name."""
        w = self.weights
        if w.scale_format == "e4m3":
            return "nvfp4-pack-quantized"
        if w.scale_format == "e8m0":
            return {8: "mxfp8-quantized", 6: "mxfp6-pack-quantized", 4: "mxfp4-pack-quantized"}[w.bits]
        if w.format == "e4m3":
            return "float-quantized" if self.inputs is not None else "naive-quantized"
        return "int-quantized" if self.inputs is not None and w.bits == 8 else "pack-quantized"

    @property
    def compressor(self) -> Any:
        """The library's own.

        Raises:
            Unsuitable: If the installed version has none.
        """
        from compressed_tensors.compressors import BaseCompressor

        if self.format not in BaseCompressor.registered_names():
            raise Unsuitable(
                f"the installed compressed-tensors has no {self.format}",
                "install a newer one, or use --to hf",
            )
        return BaseCompressor.get_value_from_registry(self.format)

    @property
    def needs_bfloat16(self) -> bool:
        return self.weights.scale_format != "float16"


def group_of(weight: QuantSpec | None, inputs: QuantSpec | None) -> Group:
    """How a layer with these grids is stored.

    Raises:
        Unsuitable: If the format has none of them.
    """
    if weight is None:
        raise Unsuitable(
            "compressed-tensors has no layer with quantized inputs and a floating-point weight", _HF
        )
    _check_weight(weight)
    if inputs is not None:
        _check_input(inputs)
    # What a weight's grid does not say does not tell groups apart.
    return Group(
        replace(weight, symmetric_mode="full", scale_bits=16, scale_group=16, zero_in_range=True), inputs
    )


def kv_args(kv: KVSpec | None) -> dict[str, Any] | None:
    """The cache's grid; `None` where it stays in floating point.

    Raises:
        Unsuitable: If the format has none like it.
    """
    if kv is None:
        return None
    static = kv.key == kv.value and kv.key.granularity == "tensor" and kv.key.symmetric and kv.bits == 8
    if not static or kv.rotate or kv.residual or kv.key_by_channel:
        raise Unsuitable(
            "compressed-tensors has one fixed scale of 8 bits for all keys of a block, and one for all values",
            "export a recipe with kvbits=8 kv_layout=tensor kv_symmetric=true, or kvbits=16",
        )
    return _args(kv.key, of_input=True)


def _check_weight(spec: QuantSpec) -> None:
    if spec.format != "int" and spec.format not in _FLOATS:
        raise Unsuitable(f"compressed-tensors has no weights in {spec.format}", _HF)
    if spec.format in ("e2m3", "e2m1") and spec.scale_format == "float16":
        raise Unsuitable(
            f"compressed-tensors has {spec.format} in MX and NVFP4 groups alone",
            "set weight_format=mxfp4 or nvfp4",
        )
    if spec.real_zero or spec.bits == 1:
        raise Unsuitable(
            "compressed-tensors has zero-points that are integers, not real numbers",
            "export it with --to gguf, whose q4_1 has real ones, or --to hf, in floating point",
        )
    if spec.format == "int" and spec.granularity == "block":
        raise Unsuitable(
            "compressed-tensors has blocks of rows and columns in FP8 alone", "set weight_granularity=auto"
        )
    if spec.granularity == "tensor" and not spec.symmetric:
        raise Unsuitable(
            "compressed-tensors stores no zero-point of a whole tensor", "set weight_symmetric=true"
        )


def _check_input(spec: QuantSpec) -> None:
    if spec.scale_format == "e4m3":
        raise Unsuitable(
            "compressed-tensors has a fixed second scale for NVFP4 inputs, qbench one for each token",
            "export a recipe with abits=16",
        )
    if spec.scale_format == "e8m0":
        raise Unsuitable(
            "compressed-tensors rounds the range of MX inputs before it takes its exponent, qbench cuts it off",
            "export a recipe with abits=16",
        )
    if spec.format not in ("int", "e4m3", "e2m1", "e2m3"):
        raise Unsuitable(
            f"compressed-tensors has no inputs in {spec.format}", "export a recipe with abits=16"
        )
    if not spec.dynamic and not spec.symmetric:
        raise Unsuitable(
            "compressed-tensors' engines take fixed input ranges that are symmetric", "set act_symmetric=true"
        )


def _args(spec: QuantSpec, *, of_input: bool) -> dict[str, Any]:
    """As `compressed_tensors.quantization.QuantizationArgs` has them."""
    rows = "token" if of_input else "channel"
    strategy = {"tensor": "tensor", "row": rows, "group": "group", "block": "block"}[spec.granularity]
    args: dict[str, Any] = {
        "num_bits": spec.bits, "type": "int" if spec.format == "int" else "float", "symmetric": spec.symmetric,
        "strategy": strategy, "dynamic": of_input and spec.dynamic,
    }  # fmt: skip
    if spec.granularity == "group":
        args["group_size"] = spec.group_size
    if spec.granularity == "block":
        args["block_structure"] = [spec.group_size, spec.group_size]
    if spec.scale_format == "e8m0":
        args["scale_dtype"] = torch.uint8
    if spec.scale_format == "e4m3":
        args |= {"strategy": "tensor_group", "scale_dtype": torch.float8_e4m3fn}
    return args
