"""How far a model's predictions are from those of the floating-point model: the KL divergence of each token's, and
whether the likeliest token is the same.

The divergence is zero where nothing changed, never negative, and of second order in a small change; the difference of
two perplexities is of first order, so that at high precision it is mostly the luck of the text.
"""

from torch import Tensor, cat

_ELEMENTS = 1 << 24  # of the logits that are held in float64 at a time


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """`KL(reference ‖ model)` of each prediction in nats, float64; both are logits, `(..., vocab)`."""
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    rows = max(1, _ELEMENTS // vocab)
    pairs = zip(reference.reshape(-1, vocab).split(rows), logits.reshape(-1, vocab).split(rows), strict=True)
    parts = []
    for p, q in pairs:
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return cat(parts).view(shape)


def agreement(reference: Tensor, logits: Tensor) -> Tensor:
    """1 where both predict the same token first, else 0, float64; both are logits, `(..., vocab)`."""
    return (reference.argmax(-1) == logits.argmax(-1)).double()
