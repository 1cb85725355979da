"""The tests that a paper's claim can be put to: each gives one trial for every context in which the records allow it.

A trial speaks for the claim, against it, or for neither. Tests are corrected by Holm's method inside a claim, never over
several: a claim's verdict does not change with the records of another.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from qbench.report.labels import matches
from qbench.report.significance import SURE, Difference, Draws, differences, holm
from qbench.report.takeaways.answer import interval, percent
from qbench.report.takeaways.calibration import SetGroup, observed, resampled, set_groups, times_more
from qbench.report.takeaways.evidence import Evidence, Recipe
from qbench.report.takeaways.trial import (
    Settings,
    Trial,
    Trials,
    comparable,
    contestants,
    corrected,
    of_schemes,
    place,
    same_variant,
    tested,
)


def better(evidence: Evidence, wanted: Settings) -> Trials:
    """`algo` against `than`, where model, scheme and calibration set are the same; a set joins what needs none.

    Settings: `algo`, `than`, `schemes`, `metrics` (families: `ppl/`, `acc/`).
    """
    mine = [r for r in evidence.recipes if of_schemes(r.scheme, wanted["schemes"])]
    ones = [r for r in mine if matches(r.algo, wanted["algo"])]
    others = [r for r in mine if matches(r.algo, wanted["than"])]
    pairs = [((a,), (b,)) for a, b in product(ones, others) if a.scheme == b.scheme and comparable(a, b)]
    found = tested(evidence, pairs, wanted["metrics"], _algorithms)
    return corrected(found), contestants(pairs)


def _algorithms(a: Recipe, b: Recipe) -> str:
    return f"{a.algo} against {b.algo}, {a.scheme} of {place(a, b)}"


def order(evidence: Evidence, wanted: Settings) -> Trials:
    """Schemes `less` do less harm than schemes `more`, where model, algorithm and calibration set are the same.

    Harm is loss in nats (or points of a task), beside that of another scheme where one is given: what 4 bits for activations
    add to 4 bits for weights, say. Where both patterns end in `*`, it stands for the same: schemes differ in bits alone.

    Settings: `less`, `more` (patterns), `less_beside`, `more_beside` (patterns, empty for none), matched place by place;
    `algos`, `metrics`.
    """
    mine = [r for r in evidence.recipes if matches(r.algo, wanted["algos"]) and not r.is_float]
    contests = []
    keys = ("less", "less_beside", "more", "more_beside")
    for less, less_beside, more, more_beside in zip(*(wanted[key] for key in keys), strict=True):
        for a, b in product(mine, mine):
            if not (of_schemes(a.scheme, [less]) and of_schemes(b.scheme, [more]) and comparable(a, b)):
                continue
            if not same_variant((a.scheme, b.scheme), (less, more)):
                continue
            sides = [(a, *_beside(evidence, a, less_beside)), (b, *_beside(evidence, b, more_beside))]
            complete = [len(s) == 1 + bool(p) for s, p in zip(sides, (less_beside, more_beside), strict=True)]
            if a.algorithm == b.algorithm and all(complete):
                contests.append((sides[0], sides[1]))
    return corrected(tested(evidence, contests, wanted["metrics"], _schemes)), contestants(contests)


def _schemes(a: Recipe, b: Recipe) -> str:
    return f"{a.scheme} against {b.scheme}, {a.algo} of {place(a, b)}"


def _beside(evidence: Evidence, recipe: Recipe, pattern: str) -> tuple[Recipe, ...]:
    """The one recipe of that scheme, of the same algorithm or in floating point; empty where there is none."""
    for other in evidence.recipes if pattern else ():
        alike = other.is_float or (other.algo, other.algorithm) == (recipe.algo, recipe.algorithm)
        if alike and of_schemes(other.scheme, [pattern]) and comparable(recipe, other):
            return (other,)
    return ()


def lossless(evidence: Evidence, wanted: Settings) -> Trials:
    """Perplexity surely less than `margin` above floating point's (two one-sided tests; only the margin above matters).

    Settings: `algo`, `schemes`, `margin` (a share, as text).
    """
    floats = [r for r in evidence.recipes if r.is_float]
    patterns = wanted["schemes"]
    mine = [r for r in evidence.recipes if matches(r.algo, wanted["algo"]) and of_schemes(r.scheme, patterns)]
    pairs = [((a,), (b,)) for a, b in product(mine, floats) if (a.model, a.base) == (b.model, b.base)]
    limit = float(np.log1p(float(wanted["margin"][0])))
    seen = tested(evidence, pairs, ["ppl/"], lambda a, b: f"{a.algo} {a.scheme} of {place(a, b)}")
    beyond = [(replace(t.pair[0], values=t.pair[0].values - limit), t.pair[1]) for t in seen if t.pair]
    found = [
        replace(trial, size=d.effect, p=d.p, difference=d, pair=pair)
        for trial, d, pair in zip(seen, differences(beyond), beyond, strict=True)
    ]
    return corrected(found), contestants(pairs)


def calibration_spread(evidence: Evidence, wanted: Settings) -> Trials:
    """Perplexity varies less over the calibration sets of `algo` than over those of `than`.

    How much it varies is the range over sets, in the mean over texts. Windows and seeds are drawn again as for the choice
    of a set.

    Settings: `algo`, `than`, `schemes`.
    """
    considered = _calibrated(evidence, [*wanted["algo"], *wanted["than"]], wanted["schemes"])
    groups = [g for g in set_groups(evidence) if g.recipes[0] in considered]
    ones = [g for g in groups if matches(g.recipes[0].algo, wanted["algo"])]
    others = [g for g in groups if matches(g.recipes[0].algo, wanted["than"])]
    found = []
    for a, b in product(ones, others):
        one, other = a.recipes[0], b.recipes[0]
        if one.scheme == other.scheme and one.base == other.base and _alike(a, b):
            found.append(_spread(a, b, f"{one.algo} against {other.algo}, {one.scheme} of {one.model}"))
    return corrected(found), considered


def _calibrated(evidence: Evidence, algos: Sequence[str], schemes: Sequence[str]) -> list[Recipe]:
    return [
        r for r in evidence.recipes if r.calib and matches(r.algo, algos) and of_schemes(r.scheme, schemes)
    ]


def _alike(a: SetGroup, b: SetGroup) -> bool:
    """Whether two groups are of the same calibration sets, and on the same windows."""
    sets = [[recipe.calibration for recipe in group.compared] for group in (a, b)]
    return sets[0] == sets[1] and a.draws[0].items == b.draws[0].items


def _spread(a: SetGroup, b: SetGroup, context: str) -> Trial:
    ranges = [float(_range(observed(group))) for group in (a, b)]
    seen, both = ranges[0] - ranges[1], resampled([a, b])
    change = _range(both[0]) - _range(both[1])
    low, high = np.quantile(change, [0.025, 0.975])
    above = (1 + int((change >= 0).sum())) / (1 + len(change))
    below = (1 + int((change <= 0).sum())) / (1 + len(change))
    text = f"range over sets {percent(ranges[0])} against {percent(ranges[1])} "
    text += f"(95% interval of the difference {100 * low:+.1f} to {100 * high:+.1f} points)"
    seeds = tuple(len(draws.values) for group in (a, b) for draws in group.draws)
    p = min(1.0, 2 * min(above, below))
    return Trial(context, 0, text, seen, p, sum(a.joint.sizes), seeds, needed=times_more(abs(seen), change))


def _range(losses: np.ndarray) -> np.ndarray:
    return np.asarray(np.ptp(losses, axis=-2).mean(axis=-1))


def closest_calibration(evidence: Evidence, wanted: Settings) -> Trials:
    """A text's own calibration set is the best for it (`expect` `best`), or not always (`beaten`).

    Best: surely better than each other set. Beaten: surely worse than one.

    Settings: `algos`, `schemes`, `expect`.
    """
    cases: list[tuple[SetGroup, int, list[str], slice]] = []
    tests: list[tuple[Draws, Draws]] = []
    considered = _calibrated(evidence, wanted["algos"], wanted["schemes"])
    for group in set_groups(evidence):
        if group.recipes[0] not in considered:
            continue
        for text, metric in enumerate(group.joint.metrics):
            own = [i for i, r in enumerate(group.compared) if metric.partition(" [")[0] == f"ppl/{r.calib}"]
            others = [i for i in range(len(group.sets)) if i not in own]
            for i in own[:1] if others else []:
                start = len(tests)
                tests += [(group.on(i, text), group.on(j, text)) for j in others]
                cases.append((group, text, [group.sets[j] for j in others], slice(start, len(tests))))
    results = differences(tests) if tests else []
    p = holm([d.p for d in results])
    sign = 1 if wanted["expect"] == ["best"] else -1
    found = [_own(g, t, names, tests[part], results[part], p[part], sign) for g, t, names, part in cases]
    return [replace(trial, family=len(tests)) for trial in found], considered


def _own(
    group: SetGroup,
    text: int,
    names: Sequence[str],
    tests: Sequence[tuple[Draws, Draws]],
    results: Sequence[Difference],
    p: np.ndarray,
    sign: int,
) -> Trial:
    wins = [bool(q < SURE and d.effect < 0) for d, q in zip(results, p, strict=True)]
    losses = [bool(q < SURE and d.effect > 0) for d, q in zip(results, p, strict=True)]
    nearest = max(range(len(results)), key=lambda i: results[i].effect)
    d = results[nearest]
    first, name = group.recipes[0], group.texts[text]
    effect = f"own set beside {names[nearest]} {percent(d.effect, sign=True)} ({interval(d.low, d.high)}), "
    effect += f"surely better than {sum(wins)} of {len(wins)} others, surely worse than {sum(losses)}"
    speaks = sign if all(wins) else -sign if any(losses) else 0
    seeds = tuple(len(draws.values) for draws in group.draws)
    context = f"the text {name}, {first.algo} {first.scheme} of {first.model}"
    return Trial(context, speaks, effect, sign * d.effect, float(p[nearest]), d.n, seeds, d, tests[nearest])
