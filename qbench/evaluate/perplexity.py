"""Perplexity over the consecutive windows of a text."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.evaluate.divergence import divergence
from qbench.evaluate.result import Evaluation

_IGNORED = -100


def windows_of(tokens: Tensor, seq_len: int, most: int | None = None) -> Tensor:
    """Consecutive windows without overlap, `(n_windows, seq_len)`; a shorter last one is dropped.

    Where there are more than `most`, that many are taken, evenly spread: the first ones would be about one subject.
    """
    n_windows = len(tokens) // seq_len
    windows = tokens[: n_windows * seq_len].view(n_windows, seq_len)
    if most is None or most >= n_windows:
        return windows
    return windows[torch.linspace(0, n_windows - 1, most).round().long()]


def window_nll(model: Any, windows: Tensor, batch_size: int) -> Tensor:
    """Mean negative log-likelihood (nats) of each window's tokens after its first, `(n_windows,)`, float64."""
    return window_losses(model, windows, batch_size)[0]


def window_losses(
    model: Any, windows: Tensor, batch_size: int, reference: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Means over each window's tokens after its first, `(n_windows,)`, float64, in nats.

    The negative log-likelihood, and the divergence from `reference`, what another model predicts on these windows.
    """
    seq_len = windows.shape[1]
    nll, kl = [], []
    with torch.inference_mode():
        for start in range(0, len(windows), batch_size):
            ids = windows[start : start + batch_size].to(model.device)
            logits = model(ids, use_cache=False).logits.float()
            if reference is not None:
                other = reference[start : start + batch_size, :-1].to(model.device)
                kl.append(divergence(other, logits[:, :-1]).mean(1).cpu())
            # The last position predicts nothing. Marking it to be ignored spares a copy of the logits.
            targets = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], _IGNORED)), dim=1)
            losses = F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=_IGNORED
            )
            nll.append((losses.view_as(ids).double().sum(1) / (seq_len - 1)).cpu())
    return torch.cat(nll), torch.cat(kl) if kl else None


def check_length(name: str, tokens: Tensor, seq_len: int) -> None:
    """Refuse a text of fewer than two windows, which has no standard error."""
    if len(tokens) < 2 * seq_len:
        raise ValueError(
            f"{name} has {len(tokens)} tokens, fewer than two windows of {seq_len}; lower eval.seq_len"
        )


def perplexity(
    model: Any,
    name: str,
    tokens: Tensor,
    *,
    seq_len: int,
    max_windows: int | None = None,
    batch_size: int = 4,
    reference: Tensor | None = None,
) -> Evaluation:
    """`exp` of the mean window NLL, the protocol of the GPTQ repository, with its standard error.

    The standard error is that of the mean over windows, carried through `exp` to first order.

    Args:
        reference: What the floating-point model predicts on these windows (`reference_logits`): adds `kl/<name>`.

    Raises:
        ValueError: If the text is shorter than two windows.
        FloatingPointError: If a window's NLL is not finite.
    """
    check_length(name, tokens, seq_len)
    nll, kl = window_losses(model, windows_of(tokens, seq_len, max_windows), batch_size, reference)
    if not torch.isfinite(nll).all():
        raise FloatingPointError(
            f"ppl/{name}: {int((~torch.isfinite(nll)).sum())} of {len(nll)} windows are NaN or inf"
        )
    ppl = math.exp(float(nll.mean()))
    stderr = float(nll.std() / len(nll) ** 0.5) * ppl
    key = f"ppl/{name}"
    samples = [{"metric": key, "item": i, "value": value} for i, value in enumerate(nll.tolist())]
    result = Evaluation({key: ppl, f"{key}_stderr": stderr}, samples)
    return result if kl is None else result + _mean(f"kl/{name}", kl)


def _mean(key: str, values: Tensor) -> Evaluation:
    stderr = float(values.std() / len(values) ** 0.5)
    samples = [{"metric": key, "item": i, "value": value} for i, value in enumerate(values.tolist())]
    return Evaluation({key: float(values.mean()), f"{key}_stderr": stderr}, samples)
