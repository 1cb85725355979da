"""Perplexity over the windows of a text, and what else their predictions tell."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.data.windows import Windows
from qbench.evaluate.divergence import agreement, divergence
from qbench.evaluate.logits import Batch
from qbench.evaluate.result import NOTHING, Evaluation, mean

_IGNORED = -100


@dataclass(frozen=True)
class Losses:
    """Means over each window's predictions that count, `(n_windows,)`, float64.

    Attributes:
        nll: Negative log-likelihood, nats.
        kl: Divergence from the reference, nats.
        agreement: Share of predictions whose likeliest token is the reference's.
    """

    nll: Tensor
    kl: Tensor | None = None
    agreement: Tensor | None = None


def window_losses(
    batches: Iterator[Batch], windows: Windows, reference: Callable[[slice, Tensor], Tensor] | None = None
) -> Losses:
    """What the logits of a model say of the windows.

    Args:
        batches: The logits, in the windows' order.
        reference: Gives another model's logits of a batch: which windows, and their tokens.
    """
    nll, kl, same = list[Tensor](), list[Tensor](), list[Tensor]()
    for part, ids, raw in batches:
        with torch.inference_mode():
            logits, scored = raw.float(), windows.scored[part].to(ids.device)
            position = torch.arange(ids.shape[1], device=ids.device)
            counts = position >= ids.shape[1] - 1 - scored[:, None]
            counts[:, -1] = False  # the last position predicts nothing
            # Marking what does not count spares a copy of the logits.
            targets = torch.cat((ids[:, 1:], ids[:, :1]), dim=1).masked_fill(~counts, _IGNORED)
            losses = F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=_IGNORED
            )
            nll.append((losses.view_as(ids).double().sum(1) / scored).cpu())
            if reference is not None:
                other = reference(part, ids).float()
                for found, measure in ((kl, divergence), (same, agreement)):
                    value = measure(other[:, :-1], logits[:, :-1]) * counts[:, :-1]
                    found.append((value.sum(1) / scored).cpu())
    return Losses(torch.cat(nll), *((torch.cat(kl), torch.cat(same)) if kl else ()))


def perplexity(name: str, losses: Losses, windows: Windows, metric: str = "ppl") -> Evaluation:
    """`exp` of the mean negative log-likelihood of a token, with its standard error, and bits per byte of text.

    Over windows of one length this is the mean of the windows' means, the protocol of GPTQ's repository. The standard
    error is that of the mean over windows, carried through `exp` to first order.

    Returns:
        `<metric>/<name>`, `bpb/<name>` (bits per byte, by which tokenizers can be compared), and where there is a
        reference `kl/<name>` and `agreement/<name>`; samples are the windows' means.

    Raises:
        FloatingPointError: If a window's NLL is not finite.
    """
    nll, weight = losses.nll, windows.scored.double()
    if not torch.isfinite(nll).all():
        raise FloatingPointError(
            f"{metric}/{name}: {int((~torch.isfinite(nll)).sum())} of {len(nll)} windows are NaN or inf"
        )
    value, stderr = _ratio(nll * weight, weight)
    ppl, key = math.exp(value), f"{metric}/{name}"
    samples = [{"metric": key, "item": i, "value": v} for i, v in enumerate(nll.tolist())]
    result = Evaluation({key: ppl, f"{key}_stderr": stderr * ppl}, samples)
    if metric == "ppl" and windows.n_bytes is not None:
        bits, error = _ratio(nll * weight / math.log(2), windows.n_bytes.double())
        result += Evaluation({f"bpb/{name}": bits, f"bpb/{name}_stderr": error}, [])
    for kind, found in (("kl", losses.kl), ("agreement", losses.agreement)):
        result += NOTHING if found is None else mean(f"{kind}/{name}", _rows(found))
    return result


def _rows(values: Tensor) -> list[dict[str, Any]]:
    return [{"item": i, "value": value} for i, value in enumerate(values.tolist())]


def _ratio(amounts: Tensor, weights: Tensor) -> tuple[float, float]:
    """`Σ amounts / Σ weights` and its standard error over windows, to first order (Cochran 1977, Section 2.11)."""
    ratio = float(amounts.sum() / weights.sum())
    rest = (amounts - ratio * weights) / weights.mean()
    return ratio, float(rest.std() / len(rest) ** 0.5)


def against_itself(name: str, evaluation: Evaluation) -> Evaluation:
    """What comparing the floating-point model with itself would say of a text: nothing changed."""
    items = [s["item"] for s in evaluation.samples if s["metric"] == f"ppl/{name}"]
    kl = mean(f"kl/{name}", [{"item": i, "value": 0.0} for i in items])
    return kl + mean(f"agreement/{name}", [{"item": i, "value": 1.0} for i in items])
