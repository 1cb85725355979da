"""One test of a claim, and the pairs of recipes that most of them are about."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from qbench.quant.scheme import BLOCK_FORMATS
from qbench.quant.spec import FORMAT_BITS
from qbench.report.labels import matches
from qbench.report.metrics import lower_is_better, shown_effect
from qbench.report.significance import SURE, Difference, Draws, differences, holm
from qbench.report.takeaways.evidence import Evidence, Recipe

Settings = Mapping[str, Sequence[str]]
Side = tuple[Recipe, ...]  # a recipe, or a recipe and that beside which its harm is measured


@dataclass(frozen=True, eq=False)
class Trial:
    """One test of a claim.

    Attributes:
        context: What was compared, and where.
        speaks: 1 for the claim, -1 against it, 0 for neither.
        effect: As text, with its interval.
        size: What trials are ordered by; negative is in favour.
        p: Corrected for the claim's tests.
        items: How many windows, documents or recipes.
        seeds: Of the recipes that have any.
        needed: How much more data would decide, where it is not told from the difference.
        family: Of how many tests p is corrected for.
        difference: What was tested, of which `pair`; `None` where it is no mean difference.
    """

    context: str
    speaks: int
    effect: str
    size: float
    p: float
    items: int
    seeds: tuple[int, ...] = ()
    difference: Difference | None = None
    pair: tuple[Draws, Draws] | None = None
    needed: str = ""
    family: int = 1


# What a claim's test gives: its trials, and every recipe on which they may depend, also those that gave none.
Trials = tuple[list[Trial], list[Recipe]]


def tested(
    evidence: Evidence,
    contests: Sequence[tuple[Side, Side]],
    families: Sequence[str],
    told: Callable[[Recipe, Recipe], str],
) -> list[Trial]:
    """The first side of each against the second, on all metrics of a family that all have; p is not corrected yet."""
    cases = []
    for one, other in contests:
        recipes = [*one, *other]
        for family in families:
            joint = evidence.joint(recipes, family)
            if len(joint.draws) == len(recipes):
                draws = [joint.draws[i] for i in range(len(recipes))]
                pair = _harm(draws[: len(one)]), _harm(draws[len(one) :])
                cases.append((one, other, joint.metrics[0], pair))
    results = differences([case[3] for case in cases])
    return [
        _trial(told(one[0], other[0]), metric, d, pair)
        for (one, other, metric, pair), d in zip(cases, results, strict=True)
    ]


def _harm(side: Sequence[Draws]) -> Draws:
    """A recipe's items, less those of what it is beside where there is such."""
    if len(side) == 1:
        return side[0]
    mine, beside = side
    return Draws(mine.items, mine.values - beside.values.mean(axis=0), mine.drawn, mine.loss)


def _trial(context: str, metric: str, d: Difference, pair: tuple[Draws, Draws]) -> Trial:
    effect, low, high = (shown_effect(metric, x) for x in (d.effect, d.low, d.high))
    seeds = tuple(len(side.values) for side in pair if side.drawn)
    return Trial(
        context if metric.startswith("ppl/") else f"{context}, tasks",
        0,
        f"{effect} (95% interval {low} to {high})",
        d.effect if lower_is_better(metric) else -d.effect,
        d.p,
        d.n,
        seeds,
        d,
        pair,
    )


def contestants(contests: Sequence[tuple[Side, Side]]) -> list[Recipe]:
    """Every recipe of these contests."""
    return [recipe for one, other in contests for recipe in (*one, *other)]


def corrected(trials: Sequence[Trial]) -> list[Trial]:
    """With p by Holm's method, and what each speaks for by it."""
    p = [float(one) for one in holm([trial.p for trial in trials])]
    return [
        replace(trial, p=one, family=len(trials), speaks=(-1 if trial.size > 0 else 1) if one < SURE else 0)
        for trial, one in zip(trials, p, strict=True)
    ]


def comparable(one: Recipe, other: Recipe) -> bool:
    """Whether model and calibration set are the same; a recipe without data may stand beside any set."""
    alike = one.calibration == other.calibration or "null" in (one.calibration, other.calibration)
    return alike and (one.model, one.base) == (other.model, other.base)


def place(one: Recipe, other: Recipe) -> str:
    """Model and calibration set that two share."""
    calib = one.calib or other.calib
    return f"{one.model}{f' calibrated on {calib}' if calib else ''}"


def of_schemes(scheme: str, patterns: Sequence[str]) -> bool:
    """Whether a scheme is among those that a claim is about.

    But for the pattern `*`, these have integer grids that are the same in all layers, and quantize the KV cache only if
    the pattern says so.
    """
    head, *words = scheme.partition("[")[0].split("-")
    formats = {f"{tensor}{name}" for tensor in "wa" for name in (*FORMAT_BITS, *BLOCK_FORMATS)}
    plain = "[" not in scheme and formats.isdisjoint(words)
    return any(
        pattern == "*" or (plain and ("kv" in head) <= ("kv" in pattern) and matches(scheme, [pattern]))
        for pattern in patterns
    )


def same_variant(schemes: tuple[str, str], patterns: tuple[str, str]) -> bool:
    """Whether two schemes are equal but for what the patterns say, where both end in `*`."""
    if not all(pattern.endswith("*") for pattern in patterns):
        return True
    rests = [scheme[len(pattern) - 1 :] for scheme, pattern in zip(schemes, patterns, strict=True)]
    return rests[0] == rests[1]
