"""Which algorithm for a scheme, and do combinations of two pay?

Recipes are compared where model, scheme and calibration set are the same; those without calibration data join every set's
comparison. All texts count together, by their windows: their items are one list.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qbench.report.page.content import Verdict
from qbench.report.significance import SURE, Draws, Standing, differences, holm, ties
from qbench.report.takeaways.answer import (
    UNDECIDED,
    Takeaway,
    count,
    evidence_of,
    interval,
    judged_on,
    left_out,
    listed,
    more_data,
    percent,
    shown_p,
)
from qbench.report.takeaways.evidence import Evidence, Joint, Recipe, digest
from qbench.report.takeaways.naming import named

# Combinations whose parts their name does not tell.
_PARTS = {"llmc_best_practice_w2": ("awq", "omniquant"), "llmc_best_practice_w4a4": ("quarot", "gptq")}


@dataclass(frozen=True, eq=False)
class Context:
    """Recipes of one model, scheme and calibration set; those without data too.

    Attributes:
        calib: Label of the set; empty where no recipe has one.
    """

    model: str
    scheme: str
    calib: str
    rest: tuple[str, ...]
    recipes: tuple[Recipe, ...]

    @property
    def place(self) -> str:
        """What stands in an id."""
        return f"{self.model}/{self.scheme}/{self.calib or 'no-data'}/{digest(*self.rest)}"

    @property
    def shown(self) -> str:
        amount = next((r.shown_amount for r in self.recipes if r.calib), "")
        data = (
            f"calibrated on {self.calib}{f' ({amount})' if amount else ''}" if self.calib else "without data"
        )
        return f"{self.scheme} of {self.model}, {data}"


def contexts(evidence: Evidence) -> list[Context]:
    """Of each model and scheme: one without calibration data, and one for each set; floating point is in none."""
    schemes: dict[tuple[str, str, str], list[Recipe]] = {}
    for recipe in evidence.recipes:
        if not recipe.is_float:
            schemes.setdefault((recipe.model, recipe.scheme, recipe.base), []).append(recipe)
    found = []
    for (model, scheme, base), recipes in schemes.items():
        free = [r for r in recipes if not r.calib]
        sets: dict[tuple[str, str], list[Recipe]] = {("", "null"): []}
        for recipe in recipes:
            if recipe.calib:
                sets.setdefault((recipe.calib, recipe.calibration), []).append(recipe)
        for (calib, identity), mine in sets.items():
            if together := (*mine, *free):
                found.append(Context(model, scheme, calib, (base, identity), together))
    return found


def algorithms(evidence: Evidence) -> list[Takeaway]:
    """The best algorithm of each context that has two."""
    found = []
    for context in contexts(evidence):
        joint = evidence.joint(context.recipes)
        if len(joint.draws) > 1:
            found.append(_best(context, joint))
    return found


def _best(context: Context, joint: Joint) -> Takeaway:
    names = named(context.recipes, ("algo",))
    standings = ties(joint.draws, lower=True)
    order = sorted(standings, key=lambda i: (not standings[i].best, joint.draws[i].values.mean(), i))
    best = order[0]
    tied = [i for i in order[1:] if standings[i].tie]
    worse = [names[i] for i in order[1:] if i not in tied]
    second = (tied or order[1:])[0]  # the nearest in the mean may be surely worse, and another tie
    nearest = standings[second]
    surely = f"; {listed(worse)} surely worse" if worse else ""
    ahead = f"{names[best]} has the lowest perplexity, {_behind(nearest)} below that of {names[second]}"
    if not tied:
        text = f"{ahead}, and surely lower than that of {_all(len(order) - 1)}."
    else:
        needed = _needed(joint, nearest, best, second)
        text = (
            f"{UNDECIDED}: {ahead}, but {listed([names[i] for i in tied])} may be as good{surely}. {needed}"
        )
    return Takeaway(
        f"algorithm/{context.place}",
        f"Which algorithm for {context.shown}?",
        "undecided" if tied else "answered",
        text,
        "; ".join(_effects(standings, names, order)),
        f"{_surest(standings, order[1:], names)}, corrected for {count(nearest.family, 'pair')}; "
        + judged_on(joint.metrics, len(joint.draws[best].items), joint.draws.values())
        + left_out(names, joint),
        evidence_of(context.recipes),
    )


def _all(others: int) -> str:
    return "the other" if others == 1 else "both others" if others == 2 else f"all {others} others"


def _behind(standing: Standing) -> str:
    """How far the best is below another, in percent of that other."""
    return percent(-standing.difference.effect).lstrip("-") if standing.difference else ""


def _needed(joint: Joint, nearest: Standing, best: int, second: int) -> str:
    assert nearest.difference is not None
    pair = (joint.draws[best], joint.draws[second])
    text = more_data(nearest.difference, pair, nearest.family)
    return f"{text[0].upper()}{text[1:]}."


def _effects(standings: dict[int, Standing], names: Sequence[str], order: Sequence[int]) -> list[str]:
    """To the runner-up, what ties, and rounding to nearest."""
    shown = [order[1], *(i for i in order[2:] if standings[i].tie or names[i].split(" ")[0] == "rtn")]
    found = []
    for i in shown:
        if (d := standings[i].difference) is not None:
            found.append(f"{names[i]} {percent(d.effect, sign=True)} ({interval(d.low, d.high)})")
    return [f"perplexity beside {names[order[0]]}: {', '.join(found)}"]


def _surest(standings: dict[int, Standing], others: Sequence[int], names: Sequence[str]) -> str:
    found = [f"{names[i]} {shown_p(p)}" for i in others if (p := standings[i].p) is not None]
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def parts_of(algo: str, known: Sequence[str]) -> tuple[str, ...]:
    """The two algorithms that a combination is made of, if both are known; empty otherwise."""
    words = algo.split("_")
    splits = [("_".join(words[:i]), "_".join(words[i:])) for i in range(1, len(words))]
    for parts in [_PARTS[algo]] if algo in _PARTS else splits:
        if set(parts) <= set(known):
            return parts
    return ()


def combinations(evidence: Evidence) -> list[Takeaway]:
    """Each combination beside its parts, wherever both are in its context."""
    found = []
    for context in contexts(evidence):
        known = [recipe.algo for recipe in context.recipes]
        for algo in dict.fromkeys(known):
            if (parts := parts_of(algo, known)) and context.calib:
                mine = [r for r in context.recipes if r.algo in (algo, *parts)]
                joint = evidence.joint(mine)
                if {mine[i].algo for i in joint.draws} == {algo, *parts}:
                    found.append(_combination(context, mine, joint, algo))
    return found


def _combination(context: Context, recipes: Sequence[Recipe], joint: Joint, algo: str) -> Takeaway:
    names = named(recipes, ("algo",))
    means = {i: float(draws.values.mean()) for i, draws in joint.draws.items()}
    whole = min((i for i in means if recipes[i].algo == algo), key=lambda i: means[i])
    parts = sorted((i for i in means if recipes[i].algo != algo), key=lambda i: means[i])
    pairs: list[tuple[Draws, Draws]] = [(joint.draws[whole], joint.draws[i]) for i in parts]
    results = differences(pairs)
    p = holm([d.p for d in results])
    sure = [float(one) < SURE for one in p]
    first = results[0]
    pays, harms = all(sure) and first.effect < 0, sure[0] and first.effect > 0
    verdict: Verdict = "answered" if pays or harms else "undecided"
    beside = f"{names[whole]} has {percent(abs(first.effect) * np.sign(first.effect)).lstrip('-')} "
    beside += f"{'lower' if first.effect < 0 else 'higher'} perplexity than {names[parts[0]]}, the better of its parts"
    if pays:
        text = f"Yes: {beside}, and it is surely better than {'both' if len(parts) == 2 else 'all of them'}."
    elif harms:
        text = f"No: {beside}, which is sure."
    else:
        place = next((k for k, one in enumerate(sure) if not one), 0)
        text = f"{UNDECIDED}: {beside}; that it is no different cannot be excluded"
        text = text if place == 0 else f"{UNDECIDED}: {beside}, but {names[parts[place]]} may be as good"
        text = f"{text}. {more_data(results[place], pairs[place], len(parts)).capitalize()}."
    effects = [
        f"{names[i]} {percent(d.effect, sign=True)} ({interval(d.low, d.high)})"
        for i, d in zip(parts, results, strict=True)
    ]
    return Takeaway(
        f"combination/{algo}/{context.place}",
        f"Does {algo} pay beside its parts, for {context.shown}?",
        verdict,
        text,
        f"perplexity of {names[whole]} beside {', '.join(effects)}",
        f"{', '.join(f'{names[i]} {shown_p(float(one))}' for i, one in zip(parts, p, strict=True))}, corrected for "
        f"{len(parts)} comparisons; "
        + judged_on(joint.metrics, first.n, joint.draws.values())
        + left_out(names, joint),
        evidence_of(recipes),
    )
