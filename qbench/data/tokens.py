"""Text to tokens: calibration samples and evaluation windows."""

import difflib
import hashlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qbench.data.corpora import Text, known, load_text, versioned


@dataclass(frozen=True)
class CalibrationSet:
    """Seeded random windows of a corpus's calibration split (the recipe of GPTQ's wikitext2).

    Attributes:
        name: The corpus, or `random` for uniform token ids (a control).
        n_samples, seq_len: How many windows, of how many tokens.
        propagate_error: Calibrate a block on the output of the quantized blocks before it.
        batch_size: Samples run together; no part of a job's identity.
    """

    name: str
    n_samples: int = 128
    seq_len: int = 2048
    propagate_error: bool = True
    seed: int = 0
    batch_size: int = 2

    def __post_init__(self) -> None:
        if self.name not in (choices := [*known(), "random"]):
            near = difflib.get_close_matches(self.name, choices, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"calib.name is {self.name!r}; {hint}there are {', '.join(choices)}")
        for key in ("n_samples", "seq_len", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"calib.{key} is {getattr(self, key)}, it must be at least 1")

    def identity(self) -> dict[str, Any]:
        """What can change a number."""
        return {k: v for k, v in asdict(self).items() if k != "batch_size"} | {"name": versioned(self.name)}

    def check(self, tokenizer: Any, root: Path | None = None) -> None:
        """Refuse a text that is too short, without drawing the windows.

        Raises:
            ValueError, FileNotFoundError: Saying what was found and what to lower.
        """
        if self.name != "random":
            self._row(tokenizer, root)

    def tokens(self, tokenizer: Any, root: Path | None = None) -> Tensor:
        """`(n_samples, seq_len)` tokens; the same for the same fields, tokenizer and text.

        Raises:
            ValueError: If the corpus is shorter than one window.
        """
        generator = torch.Generator().manual_seed(self.seed)
        if self.name == "random":
            return torch.randint(len(tokenizer), (self.n_samples, self.seq_len), generator=generator)
        row = self._row(tokenizer, root)
        starts = torch.randint(len(row) - self.seq_len, (self.n_samples,), generator=generator)
        return torch.stack([row[start : start + self.seq_len] for start in starts.tolist()])

    def _row(self, tokenizer: Any, root: Path | None) -> Tensor:
        row = tokenize(load_text(self.name, "calibration", root), tokenizer)
        if len(row) < self.n_samples + self.seq_len:
            raise ValueError(
                f"calibration set {self.name!r} has {len(row)} tokens, which does not make {self.n_samples} different "
                f"windows of {self.seq_len}; lower calib.n_samples or calib.seq_len"
            )
        return row


@lru_cache(maxsize=32)
def tokenize(text: Text, tokenizer: Any) -> Tensor:
    """The whole text in one call of the tokenizer, special tokens as it puts them; `(n_tokens,)`."""
    return tokenizer(text.text, return_tensors="pt", verbose=False).input_ids[0]


def sha256(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()
