"""Few windows tell the worst recipes, more windows tell the best ones apart: which recipes go on, in what order.

Successive halving (Jamieson & Talwalkar 2016), but a recipe that may be the choice is never dropped for its rank alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qbench.report.recommend.candidates import Candidate, Field
from qbench.report.recommend.decision import Decision, Limits, Preference, decide

_KEPT = 3  # one in so many goes on, two at least
_MAY_BE = 0.01  # share of resamples in which a recipe is the choice, from which it goes on whatever its rank


@dataclass(frozen=True, eq=False)
class Dropped:
    """A recipe that was not judged on the last windows.

    Attributes:
        n_windows: On which it was judged.
        reason: Why it lost there.
    """

    candidate: Candidate
    n_windows: int
    reason: str


@dataclass(frozen=True, eq=False)
class Settled:
    """The decision on the most windows, and what was dropped on the way there."""

    found: Field
    decision: Decision
    dropped: tuple[Dropped, ...]

    @property
    def left_out(self) -> tuple[str, ...]:
        """Recipes that were compared on no windows."""
        gone = {one.candidate.title for one in self.dropped}
        return tuple(title for title in self.found.left_out if title not in gone)


def kept(decision: Decision) -> list[Candidate]:
    """The recipes that are worth more windows, best first; the floating-point model is read in any case."""
    shares = dict(zip(map(id, decision.candidates), decision.shares, strict=True))
    ranked = [c for c in decision.order if not c.recipe.is_float]
    most = max(2, math.ceil(len(ranked) / _KEPT))
    return [c for place, c in enumerate(ranked) if place < most or shares[id(c)] >= _MAY_BE]


def settle(fields: Sequence[Field], limits: Limits, preference: Preference | None = None) -> Settled:
    """Decide on the most recipes, then on more windows for as long as those that go on were all read on them.

    Other jobs with more windows decide nothing where they lack a recipe that may be the choice.

    Args:
        fields: The first is that with the most recipes.
    """
    found = fields[0]
    gone: list[Dropped] = []
    while True:
        decision = decide(found, limits, preference)
        wanted = {_key(c) for c in kept(decision)}
        further = [
            f for f in fields if f.n_windows > found.n_windows and wanted <= {_key(c) for c in f.candidates}
        ]
        if not further:
            return Settled(found, decision, tuple(gone))
        following = max(further, key=lambda f: (len(f.candidates), f.n_windows))
        gone += dropped(found, decision, following)
        found = following


def dropped(found: Field, decision: Decision, following: Field) -> list[Dropped]:
    """What was judged before and is not among what follows, best first."""
    there = {_key(c) for c in following.candidates}
    reasons = {id(c): reason for c, reason in decision.reasons}
    return [
        Dropped(c, found.n_windows, reasons.get(id(c), "not measured further"))
        for c in decision.order
        if _key(c) not in there
    ]


def _key(candidate: Candidate) -> tuple[object, ...]:
    return candidate.recipe.labels, candidate.recipe.across
