"""Calibration text that the floating-point model makes itself, so that no data is needed (arXiv:2305.17888, Section 3.1).

Each sample begins with a random token, as the paper's; what follows is drawn from the model's own distribution. The
paper takes the likeliest token for the first few places; where the first token is random already, that narrows the
samples for no gain, and is left out.
"""

from typing import Any

import torch
from torch import Tensor

from qbench.models.decoding import go_on

_TOGETHER = 16  # samples; fixed, since another number would draw other ones


def sampled(model: Any, n_samples: int, seq_len: int, seed: int) -> Tensor:
    """Tokens that `model` makes, `(n_samples, seq_len)`, on the CPU; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(model.config.vocab_size, (n_samples, 1), generator=generator)
    with torch.inference_mode():
        return torch.cat([_continued(model, part, seq_len, generator) for part in first.split(_TOGETHER)])


def _continued(model: Any, ids: Tensor, seq_len: int, generator: torch.Generator) -> Tensor:
    given: dict[str, Any] = {}
    while ids.shape[1] < seq_len:
        out = model(ids[:, -1:].to(model.device), use_cache=True, **given)
        given = go_on(out)
        probabilities = out.logits[:, -1].float().cpu().softmax(-1)
        ids = torch.cat((ids, torch.multinomial(probabilities, 1, generator=generator)), dim=1)
    return ids
