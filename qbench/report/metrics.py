"""What a metric's name says: which way is better, what its items are, how a difference is shown."""

import math
from typing import Literal

Kind = Literal["loss", "binary", "real"]

_LOSSES = ("ppl", "decode_ppl", "bpb")
# lm-eval's metrics of which less is better are among these.
_LOWER = {
    *_LOSSES, "kl", "flips", "right_to_wrong", "drop", "truncated", "unjudged", "perplexity", "word_perplexity",
    "byte_perplexity", "bits_per_byte", "likelihood_diff", "pct_stereotype", "brier_score", "ter", "wer", "cer",
}  # fmt: skip
# Rates of items that are so or not; what is in neither is any number.
_BINARY = (
    "acc", "exact_match", "em", "pass@", "agreement", "flips", "right_to_wrong", "wrong_to_right", "pct_stereotype",
    "contains", "truncated", "unjudged",
)  # fmt: skip
# Of costs, the ones of which more is better.
_RATES = ("per_s", "per_second", "throughput", "speedup", "roofline_share")


def base(metric: str) -> str:
    """The name without the protocol: `ppl/docs [512 x 32]` -> `ppl/docs`."""
    return metric.partition(" [")[0]


def is_cost(metric: str) -> bool:
    """Whether it is what a job or a model costs; what is measured on data has the data's name behind a slash."""
    return "/" not in base(metric)


def is_measured_rate(metric: str) -> bool:
    """Whether it is a rate at which a recipe ran on a machine: the most telling of what `qbench bench` measures."""
    return metric.startswith(("decode_tokens_per_s@", "prefill_tokens_per_s@"))


def lower_is_better(metric: str) -> bool:
    """Losses, damage and costs; accuracies and other scores of tasks are better when higher."""
    if is_cost(metric):
        return not base(metric).partition("@")[0].endswith(_RATES)  # behind it: where it was measured
    return _family(metric) in _LOWER


def kind(metric: str) -> Kind:
    """What the items are: a mean negative log-likelihood, 0 or 1, or any number.

    It is what the name promises: an accuracy's items may still be fractions, as where a task gives part of a mark.
    """
    if is_cost(metric):
        return "real"
    family = _family(metric)
    if family in _LOSSES:
        return "loss"
    return "binary" if family.partition("_")[0] in _BINARY or family.startswith(_BINARY) else "real"


def is_perplexity(metric: str) -> bool:
    return _family(metric) in ("ppl", "decode_ppl")


def shown_effect(metric: str, effect: float) -> str:
    """A difference as text: relative for perplexities, of whose logarithm it is; in points for rates of items."""
    if not math.isfinite(effect):
        return ""
    if is_perplexity(metric):
        return f"{math.expm1(effect):+.1%}" if effect < 7 else f"×{math.exp(min(effect, 700)):.3g}"
    if kind(metric) == "binary":
        return f"{effect * 100:+.1f} points"
    return f"{effect:+.3g}"


def _family(metric: str) -> str:
    return base(metric).partition("/")[0]
