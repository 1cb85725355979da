"""Constraints to a choice, with its confidence, the runner-up, and what stands in the way where nothing fits.

The confidence is the share of bootstrap resamples (of windows, those of all recipes together, and of draws)
in which the same rule makes the same choice: it is how often this data, drawn again, would say the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from qbench.report.recommend.candidates import Candidate, Field
from qbench.report.resampling import resample_weights

Quantity = Literal["max_bytes", "max_ppl_increase", "max_latency"]
Preference = Literal["quality", "size", "speed"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
PREFERENCES: tuple[Preference, ...] = get_args(Preference)
RESAMPLES = 2000
_NONE = -1  # in place of a candidate's number: nothing fits


@dataclass(frozen=True)
class Limits:
    """What a recipe may cost: stored bytes, relative increase of perplexity, seconds of a step; `None`: anything."""

    max_bytes: float | None = None
    max_ppl_increase: float | None = None
    max_latency: float | None = None

    def of(self, quantity: Quantity) -> float | None:
        return {
            "max_bytes": self.max_bytes,
            "max_ppl_increase": self.max_ppl_increase,
            "max_latency": self.max_latency,
        }[quantity]

    def without(self, quantity: Quantity) -> "Limits":
        return replace(self, **{quantity: None})


@dataclass(frozen=True)
class Binding:
    """A constraint that stands in the way.

    Attributes:
        most: What it allows.
        needed: The least that it would have to allow, with the others as they are; `None` where it alone does not
            make the difference.
    """

    quantity: Quantity
    most: float
    needed: float | None


@dataclass(frozen=True, eq=False)
class Decision:
    """The choice.

    Attributes:
        meets: Whether the choice keeps to all limits; where nothing does, it is the nearest: whose largest relative
            excess over a limit is the least.
        share: Of the resamples in which the choice is the same, and keeps to the limits or does not as it does.
        shares: Of each of the candidates: of the resamples in which it is the choice, or the nearest.
        order: All candidates: how often each is the choice, then how near it comes to the limits, then as preferred.
        increase: 95 % interval of its increase of perplexity.
        surely_meets: Share of the resamples in which the choice keeps to the limit of perplexity.
        runner_up: Next by the same rule; `None` where no other meets the limits.
        reasons: Why each of the others lost.
        binding: Where nothing meets the limits: those in the way.
        preference: By which the choice was made.
    """

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    meets: bool
    share: float
    shares: tuple[float, ...]
    order: tuple[Candidate, ...]
    increase: tuple[float, float]
    surely_meets: float
    runner_up: Candidate | None
    reasons: tuple[tuple[Candidate, str], ...]
    binding: tuple[Binding, ...]
    preference: Preference


def usual_preference(limits: Limits, has_latency: bool) -> Preference:
    """With a limit of perplexity and nothing else, the fastest or smallest; otherwise the best that fits."""
    if limits.max_bytes is None and limits.max_latency is None and limits.max_ppl_increase is not None:
        return "speed" if has_latency else "size"
    return "quality"


def decide(field: Field, limits: Limits, preference: Preference | None = None, *, seed: int = 0) -> Decision:
    """Choose among recipes that were evaluated alike."""
    all_ = field.candidates
    by = preference or usual_preference(limits, all_[0].seconds is not None)
    costs = np.array([c.bytes for c in all_]), np.array([c.seconds or 0.0 for c in all_])
    point = np.array([c.increase for c in all_])
    choice = _choose(point[None], costs, limits, by)[0]
    meets = choice != _NONE
    if not meets:
        choice = _nearest(point[None], costs, limits, by)[0]
    drawn = _resampled(field, np.random.default_rng(seed))
    fitting = _choose(drawn, costs, limits, by)
    picked = np.where(fitting == _NONE, _nearest(drawn, costs, limits, by), fitting)
    # A resample in which something fits says otherwise where nothing does, whatever it would choose.
    same = (picked == choice) & ((fitting != _NONE) == meets)
    most = np.inf if limits.max_ppl_increase is None else limits.max_ppl_increase
    rest = [i for i in range(len(all_)) if i != choice]
    second = _choose(point[None, rest], (costs[0][rest], costs[1][rest]), limits, by)[0]
    shares = np.array([(picked == i).mean() for i in range(len(all_))])
    return Decision(
        candidates=all_,
        chosen=all_[choice],
        meets=bool(meets),
        share=float(same.mean()),
        shares=tuple(shares.tolist()),
        order=tuple(all_[i] for i in _order(shares, point, costs, limits, by)),
        increase=all_[choice].interval,
        surely_meets=float((drawn[:, choice] <= most).mean()),
        runner_up=all_[rest[second]] if second != _NONE else None,
        reasons=tuple(
            (all_[i], _reason(all_[i], all_[choice], drawn[:, [i, choice]], limits, by)) for i in rest
        ),
        binding=() if meets else _binding(point, costs, limits),
        preference=by,
    )


def _resampled(field: Field, rng: np.random.Generator) -> np.ndarray:
    """Increases of perplexity of all candidates, `(RESAMPLES, n_candidates)`; windows are drawn for all alike."""
    weights = [resample_weights(rng, text.shape[1], RESAMPLES) for text in field.floating.change]
    found = np.empty((RESAMPLES, len(field.candidates)))
    for i, candidate in enumerate(field.candidates):
        draws = resample_weights(rng, len(candidate.change[0]), RESAMPLES)
        texts = [((w @ text.T) * draws).sum(1) for w, text in zip(weights, candidate.change, strict=True)]
        found[:, i] = np.expm1(np.mean(texts, axis=0))
    return found


Costs = tuple[np.ndarray, np.ndarray]


def _excess(increase: np.ndarray, costs: Costs, limits: Limits) -> np.ndarray:
    """By how much each candidate exceeds each limit, relative to it; the largest of the three, at most 0 if it fits."""
    worst = np.full(increase.shape, -np.inf)
    for quantity, values in zip(QUANTITIES, (costs[0], increase, costs[1]), strict=True):
        if (most := limits.of(quantity)) is not None:
            worst = np.maximum(worst, (values - most) / max(abs(most), 1e-9))
    return worst


_ORDER: dict[Preference, tuple[Preference, Preference]] = {
    "quality": ("quality", "size"),
    "size": ("size", "quality"),
    "speed": ("speed", "quality"),
}


def _sorted(increase: np.ndarray, costs: Costs, by: Preference, *first: np.ndarray) -> np.ndarray:
    """Each row's candidates by `first`, then by what is preferred, then by order."""
    n = increase.shape[1]
    keys: dict[Preference, np.ndarray] = {
        "quality": increase,
        "size": np.broadcast_to(costs[0], increase.shape),
        "speed": np.broadcast_to(costs[1], increase.shape),
    }
    major, minor = _ORDER[by]
    place = np.broadcast_to(np.arange(n), increase.shape)
    return np.lexsort((place, keys[minor], keys[major], *first[::-1]))


def _order(shares: np.ndarray, point: np.ndarray, costs: Costs, limits: Limits, by: Preference) -> list[int]:
    beyond = np.maximum(_excess(point[None], costs, limits), 0)
    return _sorted(point[None], costs, by, -shares[None], beyond)[0].tolist()


def _choose(increase: np.ndarray, costs: Costs, limits: Limits, by: Preference) -> np.ndarray:
    """The best candidate of each row that fits; equal ones are told apart by what the preference does not name."""
    fits = _excess(increase, costs, limits) <= 0
    first = _sorted(increase, costs, by, ~fits)[:, 0]
    return np.where(fits[np.arange(len(first)), first], first, _NONE)


def _nearest(increase: np.ndarray, costs: Costs, limits: Limits, by: Preference) -> np.ndarray:
    return _sorted(increase, costs, by, _excess(increase, costs, limits))[:, 0]


def _binding(increase: np.ndarray, costs: Costs, limits: Limits) -> tuple[Binding, ...]:
    """The limits whose loosening alone would let something fit, and by how much; all of them where none does alone."""
    values = dict(zip(QUANTITIES, (costs[0], increase, costs[1]), strict=True))
    found, set_ = [], []
    for quantity in QUANTITIES:
        if (most := limits.of(quantity)) is None:
            continue
        others = _excess(increase, costs, limits.without(quantity)) <= 0
        needed = float(values[quantity][others].min()) if others.any() else None
        set_.append(Binding(quantity, most, needed))
        if needed is not None:
            found.append(set_[-1])
    return tuple(found or set_)


_WORDS: dict[Quantity, Callable[[float], str]] = {
    "max_bytes": lambda value: f"{value / 1e6:.4g} MB",
    "max_ppl_increase": lambda value: f"{value:+.1%}" if value < 10 else f"×{1 + value:.3g}",
    "max_latency": lambda value: f"{1000 * value:.3g} ms",
}
_TOO_MUCH: dict[Quantity, str] = {
    "max_bytes": "too large",
    "max_ppl_increase": "perplexity too high",
    "max_latency": "too slow",
}


def in_words(quantity: Quantity, value: float) -> str:
    """A cost with its unit; of perplexity, the change."""
    return _WORDS[quantity](value)


def _reason(mine: Candidate, best: Candidate, drawn: np.ndarray, limits: Limits, by: Preference) -> str:
    """Why a candidate lost against the choice; `drawn` has both in its columns."""
    over = [
        _TOO_MUCH[quantity]
        for quantity, value in zip(QUANTITIES, (mine.bytes, mine.increase, mine.seconds or 0.0), strict=True)
        if (most := limits.of(quantity)) is not None and value > most
    ]
    if over:
        return ", ".join(over)
    if by == "size" and mine.bytes > best.bytes:
        return "larger"
    if by == "speed" and (mine.seconds or 0.0) > (best.seconds or 0.0):
        return "slower"
    if (drawn[:, 0] == drawn[:, 1]).all():
        return "no better, larger" if mine.bytes > best.bytes else "the same"
    return f"worse in {(drawn[:, 0] > drawn[:, 1]).mean():.0%} of resamples"
