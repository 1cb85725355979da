"""Does calibration text occur in the evaluation text? Then a recipe has seen what it is judged by."""

import numpy as np
import torch
from torch import Tensor

# As long a run as Lee et al. (arXiv:2107.06499, Section 4.2) call a duplicate: shorter ones are set phrases.
RUN = 50


def overlap(calibration: Tensor, evaluation: Tensor, run: int = RUN) -> float:
    """The share of calibration samples, `(n_samples, seq_len)`, that share a run of tokens with `evaluation`, `(n,)`.

    Runs are compared by 64-bit hashes: of a billion pairs, one is taken for equal by mistake in some ten.
    """
    seen = _hashes(evaluation[None], run)[0]
    return float(np.isin(_hashes(calibration, run), seen).any(1).mean()) if seen.size else 0.0


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
