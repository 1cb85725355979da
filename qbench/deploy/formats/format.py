"""What a format of checkpoints is: what it can hold, and how a quantized layer is written in it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qbench.algorithms.base import Algorithm
from qbench.deploy.layers import QuantizedLayer
from qbench.deploy.writer import Writer
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec

Logits = Callable[[Tensor], Tensor]  # of (batch, seq_len) tokens, (batch, seq_len, vocab) in float32


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        skeleton: The model without weights, as quantization works on it: experts unpacked, `Conv1D` as `nn.Linear`.
        dtype: Of what is not quantized, and of scales.
    """

    skeleton: Any
    algorithm: Algorithm
    scheme: Scheme
    dtype: torch.dtype


class Format(ABC):
    """One format; its methods are called in the order in which they stand here.

    Attributes:
        name: On the command line.
        title: For messages: the format, and what loads it.
        packages: That pack it, for the card; `loading`: how it is loaded.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    loading: ClassVar[str] = (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("<this folder>")\n'
        'tokenizer = AutoTokenizer.from_pretrained("<this folder>")\n```'
    )

    def __init__(self, source: Source) -> None:
        self.source = source

    @abstractmethod
    def check(self) -> None:
        """Refuse, before weights are loaded, what the format cannot hold.

        Raises:
            Unsuitable: Saying what cannot be held, and what can be exported in its place.
        """

    def check_tokenizer(self, tokenizer: Any) -> None:
        """As `check`, of the tokenizer that goes with the model.

        Raises:
            Unsuitable: As `check`.
        """

    @abstractmethod
    def block(
        self,
        writer: Writer,
        path: str,
        block: nn.Module,
        layers: Sequence[QuantizedLayer],
        fixed: Mapping[str, Tensor],
    ) -> None:
        """Write a finished block.

        Args:
            path: Of the block in the model; `layers` have names in the model.
            fixed: Grids of keys and values that calibration data decided, as `Finished.fixed`.

        Raises:
            ValueError: If a layer is not what the format holds, though its scheme is.
        """

    @abstractmethod
    def finish(self, writer: Writer, model: Any, tokenizer: Any) -> None:
        """Write what is outside of the blocks, the config and the tokenizer."""

    @abstractmethod
    def stored(self, layer: QuantizedLayer) -> Tensor:
        """The weight of a layer, `(out, in)`, as whoever loads the checkpoint computes it from what is stored."""

    @abstractmethod
    def stored_bits(self, layer: QuantizedLayer) -> float:
        """What the format takes for a layer's weight: codes, scales, zero-points; padding is not counted."""

    @abstractmethod
    def reader(self, folder: Path, attn: str | None) -> tuple[Logits | None, str]:
        """Load a checkpoint as its users do; or say why that cannot be done here.

        Args:
            attn: The attention implementation; `None` leaves it to the library.

        Raises:
            OSError: If the files do not load, or a weight is missing.
        """

    def engine(self, folder: Path) -> tuple[Logits | None, str]:
        """An engine that computes in a way of its own, and is compared as well; or why it is not to be had."""
        return None, ""

    def engine_input(self, layer: QuantizedLayer) -> QuantSpec:
        """How that engine rounds the input of a quantized layer.

        Raises:
            NotImplementedError: If there is no such engine.
        """
        raise NotImplementedError(f"{self.name} has no engine of its own")

    def as_read(self, spec: QuantSpec) -> QuantSpec | None:
        """The grid on which readers of the format quantize an input whose grid is `spec`; `None`: they do not."""
        return None

    @property
    def reads_kv(self) -> bool:
        """Whether readers of the format quantize keys and values, where it says so."""
        return False

    def notes(self) -> list[str]:
        """What whoever loads the checkpoint should know."""
        return []
