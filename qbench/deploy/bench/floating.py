"""transformers in floating point: the model as it was before quantization, which everything is compared with."""

from typing import ClassVar

import torch

from qbench.deploy.bench.backend import Backend, Engine, Subject, no_recipe
from qbench.deploy.bench.generation import Generator, in_float32
from qbench.deploy.operators import Bits


class Floating(Backend):
    """The floating-point model in one dtype."""

    runs_recipe = False
    dtype: ClassVar[torch.dtype]

    def why_not(self, subject: Subject) -> str:
        if subject.floating is None:
            return (
                f"it runs models in transformers' layout, and {subject.title} is none; name one with model="
            )
        return ""

    def open(self, subject: Subject) -> Engine:
        assert subject.floating is not None, "why_not was asked"
        return Generator(subject.floating(self.dtype).to(subject.device), bits(self.dtype), subject.device)


class Float32(Floating):
    name = "transformers-fp32"
    about = "transformers in float32"
    dtype = torch.float32


class BFloat16(Floating):
    name = "transformers-bf16"
    about = "transformers in bfloat16"
    dtype = torch.bfloat16


class Dequantized(Backend):
    """The quantized weights as real numbers: what a checkpoint costs where it is unpacked when it is loaded."""

    name = "transformers-dequantized"
    runs_recipe = True
    about = "transformers in float32, quantized weights unpacked beforehand"

    def why_not(self, subject: Subject) -> str:
        if (why := no_recipe(subject, "quantized weights")) or subject.recipe is None:
            return why
        scheme = subject.recipe.scheme
        if scheme.activations or scheme.kv is not None or scheme.bmm is not None:
            return f"{scheme} also rounds what is multiplied with weights, which is only simulated here, and slowly"
        return ""

    def open(self, subject: Subject) -> Engine:
        assert subject.recipe is not None, "why_not was asked"
        model = in_float32(subject.recipe.model, {}).to(subject.device)
        return Generator(model, bits(torch.float32), subject.device)


def bits(dtype: torch.dtype) -> Bits:
    """Everything in one dtype."""
    width = 8.0 * dtype.itemsize
    return Bits(width, width, width, head=width, floating=width)
