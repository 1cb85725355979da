"""Which scheme for how many bytes? The Pareto front of honest size against perplexity, and what each step of it buys.

All recipes of a model take part, floating point too; all texts count together, by their windows. The best of a size is
found in the data that it is tested on, so the tests count as all pairs of recipes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from qbench.report.significance import SURE, Difference, Draws, differences, holm
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


@dataclass(frozen=True, eq=False)
class Step:
    """A member of the front.

    Attributes:
        mine: Its place among the recipes.
        smaller: The place of the front's next smaller member; `None` of the smallest.
        gain: Beside that; `None` of the smallest.
        p: Of the gain, corrected.
        ties: Recipes of about the same size that are not surely worse.
    """

    mine: int
    smaller: int | None
    gain: Difference | None
    p: float
    ties: tuple[int, ...]


def budget(evidence: Evidence) -> list[Takeaway]:
    """An answer for each model with recipes of two sizes."""
    models: dict[tuple[str, str], list[Recipe]] = {}
    for recipe in evidence.recipes:
        if recipe.megabytes is not None:
            models.setdefault((recipe.model, recipe.base), []).append(recipe)
    found = []
    for (model, base), recipes in models.items():
        joint = evidence.joint(recipes)
        if len({_size(recipes[i]) for i in joint.draws}) > 1:
            found.append(_answer(model, base, recipes, joint))
    return found


def _size(recipe: Recipe) -> float:
    """In MB, to three digits: what differs less is the same budget."""
    return float(f"{recipe.megabytes or 0:.3g}")


def front(sizes: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Places of those that no smaller or equal one is as good as, from small to large."""
    found: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (sizes[i], losses[i], i)):
        if np.isfinite(losses[i]) and (not found or losses[i] < losses[found[-1]]):
            found.append(i)
    return found


def _steps(recipes: Sequence[Recipe], joint: Joint) -> list[Step]:
    places = list(joint.draws)
    sizes = {i: _size(recipes[i]) for i in places}
    means = [float(joint.draws[i].values.mean()) for i in places]
    members = [places[k] for k in front([sizes[i] for i in places], means)]
    alike = {m: [i for i in places if i != m and sizes[i] == sizes[m]] for m in members}
    tests = [(m, s) for s, m in pairwise(members)]
    tests += [(m, i) for m in members for i in alike[m]]
    pairs: list[tuple[Draws, Draws]] = [(joint.draws[a], joint.draws[b]) for a, b in tests]
    results = differences(pairs)
    corrected = holm([d.p for d in results], len(places) * (len(places) - 1) // 2)
    found = {test: (d, float(p)) for test, d, p in zip(tests, results, corrected, strict=True)}
    steps = []
    for smaller, mine in zip([None, *members], members, strict=False):
        gain, p = found[mine, smaller] if smaller is not None else (None, float("nan"))
        steps.append(
            Step(mine, smaller, gain, p, tuple(i for i in alike[mine] if not found[mine, i][1] < SURE))
        )
    return steps


def _answer(model: str, base: str, recipes: Sequence[Recipe], joint: Joint) -> Takeaway:
    names = named(recipes, ("algo", "scheme", "calib"))
    steps = _steps(recipes, joint)
    family = len(joint.draws) * (len(joint.draws) - 1) // 2
    open_ = [s for s in steps if s.gain is not None and not s.p < SURE]
    rivals = {
        s.mine: {recipes[i].scheme for i in s.ties if recipes[i].scheme != recipes[s.mine].scheme}
        for s in steps
    }
    sure = not open_ and not any(rivals.values())
    text = " ".join(_told(step, recipes, joint, names) for step in steps)
    if not sure:
        doubts = [f"what the bytes of {names[s.mine]} buy" for s in open_]
        doubts += [
            f"{' or '.join(sorted(other))} at the size of {names[m]}" for m, other in rivals.items() if other
        ]
        doubtful = {s.mine for s in open_} | {m for m, other in rivals.items() if other}
        text = f"{UNDECIDED} in {len(doubtful)} of {len(steps)} steps ({listed(doubts)}). {text}"
    gains = [(s, s.smaller, s.gain) for s in steps if s.gain is not None and s.smaller is not None]
    effects = [
        f"{names[s.mine]} beside {names[smaller]} {percent(d.effect, sign=True)} ({interval(d.low, d.high)})"
        for s, smaller, d in gains
    ]
    tests = ", ".join(f"{names[s.mine]} {shown_p(s.p)}" for s, *_ in gains)
    return Takeaway(
        f"budget/{model}/{digest(base)}",
        f"Which scheme for how many bytes, of {model}?",
        "answered" if sure else "undecided",
        text,
        "perplexity: " + "; ".join(effects) if effects else "one size is the best of all",
        f"{tests or 'no step to test'}, corrected for {count(family, 'pair')}; "
        + judged_on(joint.metrics, sum(joint.sizes), joint.draws.values())
        + left_out(names, joint),
        evidence_of(recipes),
    )


def _told(step: Step, recipes: Sequence[Recipe], joint: Joint, names: Sequence[str]) -> str:
    """A step of the front as a sentence or two."""
    perplexity = float(np.exp(joint.draws[step.mine].values.mean()))
    text = f"From {_size(recipes[step.mine]):g} MB: {names[step.mine]}, perplexity {perplexity:.4g}"
    if step.ties:
        text += f" (not surely worse at that size: {listed([names[i] for i in step.ties])})"
    if step.gain is None or step.smaller is None:
        return f"{text}."
    extra = (recipes[step.mine].megabytes or 0) - (recipes[step.smaller].megabytes or 0)
    text += f"; the {extra:.3g} MB more buy {percent(step.gain.effect).lstrip('-')} lower perplexity"
    if step.p < SURE:
        return f"{text}, which is sure."
    family = len(joint.draws) * (len(joint.draws) - 1) // 2
    needed = more_data(step.gain, (joint.draws[step.mine], joint.draws[step.smaller]), family)
    return f"{text}, which may be luck: {needed}."
