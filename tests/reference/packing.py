"""GPTQ's and AWQ's packed integers, read by what is written of the layouts: AutoGPTQ's `qlinear_cuda`, AutoAWQ's `gemm`."""

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbours each 4 bits of a word are, the lowest first


def stream(words: Tensor, bits: int) -> Tensor:
    """The codes of a stream of bits, lowest first, which runs down each column of int32 words `(n, columns)`.

    Codes of 3 bits go on in the next word where one ends.
    """
    places = torch.arange(32)[None, :, None]
    ones = ((words.long()[:, None] >> places) & 1).flatten(0, 1).unflatten(0, (-1, bits))
    return (ones << torch.arange(bits)[None, :, None]).sum(1)


def gptq(tensors: dict[str, Tensor], bits: int, less_one: bool) -> tuple[Tensor, Tensor]:
    """Codes `(out, in)` and zero-points `(out, n_groups)`."""
    return stream(tensors["qweight"], bits).T, stream(tensors["qzeros"].T, bits) + less_one


def awq(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Codes `(out, in)` and zero-points `(out, n_groups)`."""

    def ordered(words: Tensor) -> Tensor:
        found = stream(words.T, 4).unflatten(0, (-1, 8))
        return found[:, torch.tensor(AWQ_ORDER).argsort()].flatten(0, 1)

    return ordered(tensors["qweight"]), ordered(tensors["qzeros"])
