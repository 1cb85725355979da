"""What papers claim, and whether these records bear it out.

The claims are data (`qbench/published/claims.toml`): each names its paper, says in our words what it states, which test it
is put to, and the study whose jobs would test it.
"""

import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from qbench.report.page.content import Verdict
from qbench.report.takeaways import tasks, trials
from qbench.report.takeaways.answer import (
    UNDECIDED,
    Takeaway,
    count,
    evidence_of,
    more_data,
    shown_p,
    shown_seeds,
)
from qbench.report.takeaways.evidence import Evidence, Recipe
from qbench.report.takeaways.trial import Settings, Trial, Trials

# By kind: the test, and the settings that it needs.
KINDS: Mapping[str, tuple[Callable[[Evidence, Settings], Trials], frozenset[str]]] = {
    "better": (trials.better, frozenset({"algo", "than", "schemes", "metrics"})),
    "order": (trials.order, frozenset({"less", "less_beside", "more", "more_beside", "algos", "metrics"})),
    "lossless": (trials.lossless, frozenset({"algo", "schemes", "margin"})),
    "calibration_spread": (trials.calibration_spread, frozenset({"algo", "than", "schemes"})),
    "closest_calibration": (trials.closest_calibration, frozenset({"algos", "schemes", "expect"})),
    "correlation": (tasks.correlation, frozenset()),
}
_KEYS = {"id", "paper", "arxiv", "place", "question", "statement", "study", "published", "test"}


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Attributes:
        place: Where the paper states it.
        statement: In our words.
        study: Whose jobs would test it: `qbench -m +sweep=<study>`.
        published: Tables of the published numbers that carry it, as `source :: table`.
        kind: Of the test; one of `KINDS`.
        settings: Of the test; each a list of texts.
    """

    id: str
    paper: str
    arxiv: str
    place: str
    question: str
    statement: str
    study: str
    published: tuple[str, ...]
    kind: str
    settings: Settings

    @property
    def source(self) -> str:
        return f"{self.paper}, arXiv:{self.arxiv}, {self.place}"


def read_claims(text: str) -> list[Claim]:
    """Claims of a TOML file's text.

    Raises:
        ValueError: If a key is missing or unknown, a kind is unknown, its settings are not what it needs, or an id is used
            twice.
    """
    claims = [_claim(about) for about in tomllib.loads(text).get("claim", [])]
    ids = [claim.id for claim in claims]
    if twice := sorted({one for one in ids if ids.count(one) > 1}):
        raise ValueError(f"claims {', '.join(twice)} are stated more than once; give each its own id")
    return claims


def shipped_claims() -> list[Claim]:
    """The claims that come with the package."""
    return read_claims(files("qbench.published").joinpath("claims.toml").read_text(encoding="utf-8"))


def _claim(about: dict[str, Any]) -> Claim:
    name = about.get("id", "without an id")
    if set(about) != _KEYS:
        raise ValueError(
            f"claim {name} has keys {', '.join(sorted(about))}; {', '.join(sorted(_KEYS))} are needed"
        )
    test = dict(about["test"])
    kind = str(test.pop("kind", ""))
    if kind not in KINDS:
        raise ValueError(f"claim {name} has test kind {kind!r}; there are {', '.join(KINDS)}")
    if set(test) != (needed := KINDS[kind][1]):
        raise ValueError(
            f"claim {name} sets {', '.join(sorted(test)) or 'nothing'} for {kind}; {', '.join(sorted(needed))} are needed"
        )
    settings = {
        key: [str(v) for v in (value if isinstance(value, list) else [value])] for key, value in test.items()
    }
    plain = {key: about[key] for key in _KEYS - {"test", "published"}}
    return Claim(**plain, published=tuple(about["published"]), kind=kind, settings=settings)


def judged_claims(evidence: Evidence, claims: Sequence[Claim]) -> list[Takeaway]:
    """A verdict on each claim for which there is a trial."""
    found = []
    for claim in claims:
        tests, considered = KINDS[claim.kind][0](evidence, claim.settings)
        if tests:
            found.append(_judged(claim, tests, considered))
    return found


def untested(takeaways: Sequence[Takeaway], claims: Sequence[Claim]) -> list[Claim]:
    """Claims on which there is no verdict, for want of records."""
    judged = {takeaway.id for takeaway in takeaways}
    return [claim for claim in claims if f"claim/{claim.id}" not in judged]


def _judged(claim: Claim, tests: Sequence[Trial], considered: Sequence[Recipe]) -> Takeaway:
    counts = {speaks: sum(t.speaks == speaks for t in tests) for speaks in (1, 0, -1)}
    verdict: Verdict = "undecided"
    if counts[1] and not counts[-1]:
        verdict = "supported"
    elif counts[-1] and not counts[1]:
        verdict = "contradicted"
    return Takeaway(
        f"claim/{claim.id}",
        claim.question,
        verdict,
        _sentence(verdict, counts, tests),
        _effect(tests),
        _confidence(claim, tests),
        evidence_of(considered),
        claim.statement,
        claim.source,
    )


def _confidence(claim: Claim, tests: Sequence[Trial]) -> str:
    """How the tests were corrected, and on how much data each is."""
    text = f"corrected for the claim's {count(len(tests), 'test')}"
    if claim.kind == "closest_calibration":
        text = "corrected for the claim's tests of all sets"
    elif claim.kind == "correlation":
        text += (
            "; recipes of one model are not independent, so that p is too small, and two models have to agree"
        )
    items = sorted({trial.items for trial in tests})
    unit = "recipe" if claim.kind == "correlation" else "window" if _of_texts(claim) else "item"
    n = count(items[0], unit) if len(items) == 1 else f"{items[0]} to {items[-1]} {unit}s"
    return f"{text}; {n} each, {shown_seeds(k for trial in tests for k in trial.seeds)}"


def _of_texts(claim: Claim) -> bool:
    return all(family.startswith("ppl") for family in claim.settings.get("metrics", ["ppl/"]))


def _sentence(verdict: Verdict, counts: Mapping[int, int], tests: Sequence[Trial]) -> str:
    tally = f"it surely holds in {counts[1]} of {count(len(tests), 'comparison')} and surely fails in {counts[-1]}"
    if verdict in ("supported", "contradicted"):
        clearest = _clearest(tests, 1 if verdict == "supported" else -1)
        return f"Here {tally}; most clearly {clearest.context}: {_shown(clearest)}."
    if counts[1]:
        one, other = _clearest(tests, 1), _clearest(tests, -1)
        sides = f"for it, {one.context}: {_shown(one)}; against it, {other.context}: {_shown(other)}"
        return f"{UNDECIDED}: {tally}; {sides}."
    by_size = sorted(tests, key=lambda t: t.size)
    if len(tests) == 1:
        return f"{UNDECIDED}: {by_size[0].context}: {_shown(by_size[0])}.{_needed(tests)}"
    ends = [f"{t.context}: {t.effect}" for t in (by_size[0], by_size[-1])]
    return f"{UNDECIDED}: {tally}; most in favour, {ends[0]}; least, {ends[1]}.{_needed(tests)}"


def _clearest(tests: Sequence[Trial], speaks: int) -> Trial:
    """Of the sure ones on a side, that of the largest effect."""
    return min((t for t in tests if t.speaks == speaks), key=lambda t: t.size * speaks)


def _shown(trial: Trial) -> str:
    return trial.effect if math.isnan(trial.p) else f"{trial.effect}, {shown_p(trial.p)}"


def _needed(tests: Sequence[Trial]) -> str:
    """What would decide the comparison that comes nearest to being decided."""
    known = [t for t in tests if not math.isnan(t.p) and (t.needed or t.difference)]
    if not known:
        return ""
    nearest = min(known, key=lambda t: t.p)
    text = nearest.needed
    if nearest.difference is not None and nearest.pair is not None:
        text = more_data(nearest.difference, nearest.pair, nearest.family)
    return (
        f" Nearest to a decision is {nearest.context}: {text}."
        if len(tests) > 1
        else f" {text[0].upper()}{text[1:]}."
    )


def _effect(tests: Sequence[Trial]) -> str:
    """The comparisons at the ends, and the median one of an odd number that has one unit."""
    by_size = sorted(tests, key=lambda t: t.size)
    if len(tests) == 1:
        return by_size[0].effect
    ends = [f"{t.effect} ({t.context})" for t in (by_size[0], by_size[-1])]
    has_middle = len(tests) % 2 == 1 and len({"points" in t.effect for t in tests}) == 1
    middle = f"median {by_size[len(tests) // 2].effect}; " if has_middle else ""
    return f"{middle}most in favour {ends[0]}; least {ends[1]}"
