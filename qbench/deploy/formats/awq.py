"""AWQ's layout for GEMM kernels: 4-bit codes packed along the outputs, eight to a word, in an order of its own.

Packed and unpacked by `gptqmodel`, as GPTQ's layout.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qbench.deploy.formats.gptq import GPTQLayout
from qbench.deploy.formats.gptqmodel import Parts
from qbench.errors import Unsuitable
from qbench.quant.spec import QuantSpec

# transformers puts scales behind the activation functions of these, which its quantizer had moved out of a weight
# (`transformers.integrations.awq.AWQ_SCALES_MAPPINGS`), and misses them in a checkpoint without.
_SCALED = {"starcoder2", "falcon", "mpt", "gptj", "gpt_neox", "gpt_bigcode", "bloom"}


class AWQLayout(GPTQLayout):
    """Packed integers of 4 bits, weights alone."""

    name: ClassVar[str] = "awq"
    title: ClassVar[str] = "AWQ's GEMM layout, which GPTQModel, vLLM, SGLang and transformers load"
    kernel: ClassVar[str] = "torch_awq"
    widths: ClassVar[tuple[int, ...]] = (4,)

    def _check_layers(self) -> None:
        super()._check_layers()
        if (kind := self.source.skeleton.config.model_type) in _SCALED:
            raise Unsuitable(
                f"transformers expects scales of the activation function in awq checkpoints of {kind}",
                "export it with --to gptq or compressed-tensors",
            )
        if self.source.dtype == torch.float32:
            raise Unsuitable(
                "awq is computed in 16 bits, and does not run beside float32", "set dtype=float16"
            )

    @property
    def checkpoint_format(self) -> str:
        return "gemm"

    def _implied(self, spec: QuantSpec) -> bool:
        return False

    def _read(self, parts: Parts) -> Tensor:
        """As kernels unpack it: scales take the dtype of the model first."""
        size = parts.codes.shape[1] // parts.scale.shape[1]
        return parts.scale.to(self.source.dtype).repeat_interleave(size, 1) * parts.steps

    def _unpack(self, module: Any) -> Tensor:
        from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

        size = module.in_features // len(module.scales)
        steps: Tensor = dequantize_gemm(
            module.qweight, module.qzeros, module.scales, module.bits, size
        ).T.int()
        return steps

    def _tensors(self, module: Any) -> dict[str, Tensor]:
        return {"qweight": module.qweight, "qzeros": module.qzeros}

    def _beside(self, columns: int) -> int:
        return 0

    def quantization(self) -> dict[str, Any]:
        outside = [
            n for n, m in self.built.named_modules() if isinstance(m, nn.Linear) and n not in self._planned
        ]
        return {
            "quant_method": self.name, "bits": self._layout["bits"], "group_size": self._layout["group_size"],
            "zero_point": True, "version": self.checkpoint_format, "modules_to_not_convert": outside, **self._skipped(),
        }  # fmt: skip
