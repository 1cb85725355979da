"""A takeaway, and the phrases that all of them are made of."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from statsmodels.stats.power import TTestIndPower

from qbench.report.metrics import base
from qbench.report.page.content import PageTakeaway, Verdict
from qbench.report.pairs import p_text
from qbench.report.power import detectable
from qbench.report.significance import SURE, Difference, Draws
from qbench.report.takeaways.evidence import Joint, Recipe

POWER = 0.8
UNDECIDED = "Not decided by these data"
_MOST = 1_000_000  # windows or seeds that are named; more is out of reach
_NAMED = 3


@dataclass(frozen=True)
class Takeaway:
    """An answer from the data, or what is missing for one.

    Attributes:
        id: Stable: made of what is asked and of the identity of the jobs that are asked about, not of other answers.
        sentence: The answer with its numbers.
        effect: Its size, with an interval.
        confidence: How sure it is, and on how much data.
        evidence: Fingerprints of all records that it depends on, sorted.
        claim: What a paper says, with which the sentence is compared; empty where none is.
        claim_source: Which paper, and where in it.
    """

    id: str
    question: str
    verdict: Verdict
    sentence: str
    effect: str
    confidence: str
    evidence: tuple[str, ...]
    claim: str = ""
    claim_source: str = ""


def page_takeaway(t: Takeaway) -> PageTakeaway:
    """As the report page shows it."""
    claim = f"{t.claim} ({t.claim_source})" if t.claim else ""
    return PageTakeaway(t.question, t.verdict, t.sentence, t.evidence, t.effect, t.confidence, claim)


def evidence_of(recipes: Iterable[Recipe]) -> tuple[str, ...]:
    return tuple(sorted({fingerprint for recipe in recipes for fingerprint in recipe.fingerprints}))


def percent(nats: float, sign: bool = False) -> str:
    """A difference of mean negative log-likelihoods as a change of perplexity."""
    if not math.isfinite(nats):
        return "?"
    if abs(nats) >= 7:
        return f"×{math.exp(max(min(nats, 700), -700)):.3g}"
    change = 100 * math.expm1(nats)
    text = f"{change:.1f}" if abs(change) < 100 else f"{change:.0f}"
    return f"{'+' if sign and change >= 0 else ''}{'0.0' if text == '-0.0' else text}%"


def interval(low: float, high: float) -> str:
    return f"95% interval {percent(low, sign=True)} to {percent(high, sign=True)}"


def listed(names: Sequence[str], most: int = _NAMED) -> str:
    """`a, b and c`; of many, the first and how many more."""
    if len(names) > most + 1:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def shown_p(p: float) -> str:
    """As tables show it, in a sentence."""
    text = p_text(p)
    return "p unknown" if not text else f"p < {text[1:]}" if text.startswith("<") else f"p = {text}"


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def shown_texts(metrics: Sequence[str]) -> list[str]:
    """Names of texts or tasks, with how they were taken where two have one name."""
    plain = [base(metric).partition("/")[2] for metric in metrics]
    full = [metric.partition("/")[2] for metric in metrics]
    return [one if plain.count(one) == 1 else long for one, long in zip(plain, full, strict=True)]


def judged_on(metrics: Sequence[str], n_items: int, draws: Iterable[Draws], together: bool = True) -> str:
    """On how much data: `on 6 texts (...), which count by their windows: 192; 5 seeds`.

    Args:
        together: Whether the texts' windows are one list.
    """
    names = shown_texts(metrics)
    seeds = shown_seeds(len(d.values) for d in draws if d.drawn)
    how = ", which count by their windows" if together and len(names) > 1 else ""
    return f"on {count(len(names), 'text')} ({', '.join(names)}){how}; {count(n_items, 'window')}, {seeds}"


def left_out(names: Sequence[str], joint: Joint) -> str:
    """The recipes that were not compared, as the end of a sentence; empty where all were."""
    left = [name for i, name in enumerate(names) if i not in joint.draws]
    return (
        f"; left out for other texts or windows, or a loss that is not finite: {listed(left)}" if left else ""
    )


def shown_seeds(counts: Iterable[int]) -> str:
    """Of the recipes that have any."""
    found = sorted(counts)
    if not found:
        return "nothing drawn by a seed"
    return count(found[0], "seed") if found[0] == found[-1] else f"{found[0]} to {found[-1]} seeds"


def more_data(found: Difference, pair: tuple[Draws, Draws], family: int = 1) -> str:
    """What would find a difference of this size, if it is true, 80 % of the time; of what there is too little."""
    alpha = SURE / max(family, 1)
    if not math.isfinite(found.effect) or found.effect == 0:
        return "no difference was seen, and no amount of data would make it matter"
    wanted: list[str] = []
    if (n := windows_needed(abs(found.effect), found.sd, alpha)) > found.n:
        wanted.append(
            f"about {n} windows ({found.n} now)" if n < _MOST else f"over a million windows ({found.n} now)"
        )
    now = min(len(side.values) for side in pair if side.drawn) if any(side.drawn for side in pair) else 0
    if now > 1 and (k := _seeds_needed(abs(found.effect), pair, alpha)) > now:
        wanted.append(
            f"about {k} seeds each ({now} now)" if k < _MOST else f"over a million seeds ({now} now)"
        )
    if not wanted:
        return "a little more data may decide it"
    return f"{' and '.join(wanted)} would show a difference of this size {POWER:.0%} of the time"


def windows_needed(effect: float, sd: float, alpha: float = SURE) -> int:
    """The smallest number of items with which a paired t-test finds `effect` at 80 % power; at most a million."""
    low, high = 4, _MOST
    if not math.isfinite(sd) or sd <= 0:
        return low
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if detectable(sd, middle, alpha, POWER) <= effect else (middle + 1, high)
    return low


def _seeds_needed(effect: float, pair: tuple[Draws, Draws], alpha: float) -> int:
    spreads = [side.values.mean(axis=1).var(ddof=1) for side in pair if len(side.values) > 1]
    sd = float(np.sqrt(np.mean(spreads)))
    if sd == 0:
        return 2
    size = effect / sd
    # The solver starts from large samples, where the t-distribution is the normal one; tiny effects have no solution there.
    if size < 1e-3:
        return _MOST
    low, high = 2, _MOST
    while low < high:
        middle = (low + high) // 2
        power = float(TTestIndPower().power(size, middle, alpha / 2, alternative="larger"))
        low, high = (low, middle) if power >= POWER else (middle + 1, high)
    return low
