"""Does calibration text occur in the evaluation text? Then a recipe has seen what it is judged by."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

# As long a run as Lee et al. (arXiv:2107.06499, Section 4.2) call a duplicate: in long texts shorter ones are set phrases.
RUN = 50
SHORTEST = 10  # tokens of a text that is looked for as a whole: shorter ones are answers and set phrases

Signature = Mapping[int, np.ndarray]


def signature(texts: Iterable[Tensor]) -> Signature:
    """What `overlap` looks for: by length, sorted hashes of runs of tokens.

    Of a text of `RUN` tokens or more, all its runs. Of a shorter one the whole, but for its first and last token, which may
    be other ones in the middle of a text.
    """
    by_length: dict[int, list[Tensor]] = {}
    found: list[np.ndarray] = []
    for text in texts:
        if len(text) >= RUN:
            found.append(_hashes(text[None], RUN)[0])
        elif len(text) >= SHORTEST + 2:
            by_length.setdefault(len(text) - 2, []).append(text[1:-1])
    whole = {length: _hashes(torch.stack(some), length)[:, 0] for length, some in by_length.items()}
    return {n: np.unique(h) for n, h in whole.items()} | (
        {RUN: np.unique(np.concatenate(found))} if found else {}
    )


def overlap(calibration: Tensor, evaluation: Signature) -> float:
    """The share of calibration samples, `(n_samples, seq_len)`, in which something of `evaluation` occurs.

    Runs are compared by 64-bit hashes: of a billion pairs of different ones, one is taken for equal in ten billion cases.
    """
    found = np.zeros(len(calibration), bool)
    for length, seen in evaluation.items():
        found |= np.isin(_hashes(calibration, length), seen).any(1)
    return float(found.mean())


def _hashes(tokens: Tensor, run: int) -> np.ndarray:
    """A hash of each run of each row, `(n_rows, seq_len − run + 1)`, by one multiplication and addition a token."""
    ids = tokens.to(torch.int64).numpy().astype(np.uint64) + np.uint64(1)
    n = ids.shape[1] - run + 1
    if n < 1:
        return np.empty((len(ids), 0), np.uint64)
    found = np.zeros((len(ids), n), np.uint64)
    for offset in range(run):
        found = found * np.uint64(0x9E3779B97F4A7C15) + ids[:, offset : offset + n]
    return found
