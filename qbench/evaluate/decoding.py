"""Predictions made as generation makes them: token by token, through the cache of keys and values."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qbench.evaluate.logits import Batch
from qbench.models.decoding import go_on


def decoded(model: Any, windows: Tensor, batch_size: int) -> Iterator[Batch]:
    """Logits of windows, `(n_windows, seq_len)`, whose tokens are fed one by one."""
    for start in range(0, len(windows), batch_size):
        part = slice(start, min(start + batch_size, len(windows)))
        ids = windows[part].to(model.device)
        with torch.inference_mode():
            yield part, ids, torch.cat(list(_steps(model, ids)), dim=1)


def _steps(model: Any, ids: Tensor) -> Iterator[Tensor]:
    given: dict[str, Any] = {}
    for step in range(ids.shape[1]):
        out = model(ids[:, step : step + 1], use_cache=True, **given)
        given = go_on(out)
        yield out.logits
