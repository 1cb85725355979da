"""What is timed, and what times it: a backend opens a subject as an engine, or says why it cannot."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qbench.deploy.layers import QuantizedLayer
from qbench.deploy.operators import Bits
from qbench.quant.scheme import Scheme


@dataclass(frozen=True, eq=False)
class Recipe:
    """A quantized model.

    Attributes:
        model: With fake-quantized weights; an engine makes a copy of what it changes.
        layers: Those that are quantized, each with its grid.
    """

    model: Any
    layers: Sequence[QuantizedLayer]
    scheme: Scheme


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to be timed, in the forms that there are of it; `None` where there is no such form.

    Attributes:
        vocab: Tokens are drawn below it.
        floating: Loads the floating-point model, or a checkpoint, in a dtype.
        folder: The checkpoint as engines load it.
        gguf: The file that llama.cpp loads.
    """

    title: str
    vocab: int
    floating: Callable[[torch.dtype], Any] | None = None
    recipe: Recipe | None = None
    folder: Path | None = None
    gguf: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Run:
    """One generation, in seconds.

    Attributes:
        first: Until the first new token of every sequence is known.
        rest: For all tokens after it.
    """

    first: float
    rest: float


class Engine(ABC):
    """A model in memory that generates."""

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Of what it holds of the model: weights, scales and zero-points."""

    @property
    @abstractmethod
    def bits(self) -> Bits | None:
        """The widths that it computes with, for the roofline; `None` where they are not known."""

    @abstractmethod
    def run(self, prompts: Tensor, new_tokens: int) -> Run:
        """Read `prompts`, `(batch, length)`, and make `new_tokens` of each greedily, whatever they are."""

    def close(self) -> None:
        """Let go of what is kept outside Python."""


class Backend(ABC):
    """A way to run models.

    Attributes:
        name: On the command line.
        runs_recipe: Whether it runs the quantized model, and not the one it was made of.
        about: What it computes with.
    """

    name: ClassVar[str]
    runs_recipe: ClassVar[bool]
    about: ClassVar[str]

    @abstractmethod
    def why_not(self, subject: Subject) -> str:
        """Why it cannot run the subject, and what to do; empty if it can."""

    def remark(self, subject: Subject) -> str:
        """How what is timed departs from the recipe; empty where it does not."""
        return ""

    @abstractmethod
    def open(self, subject: Subject) -> Engine:
        """Load the subject; `why_not` was asked before."""


def no_recipe(subject: Subject, takes: str) -> str:
    """Why a backend of codes has nothing to run, where that is so."""
    if subject.recipe is None or not any(layer.spec for layer in subject.recipe.layers):
        return f"it runs {takes}, and {subject.title} is given without; name the recipe, by fingerprint or labels"
    return ""
