"""Which calibration set? The one whose worst case over evaluation texts is the least bad (minimax regret).

The regret of a set on a text is how far its perplexity is above that of the best set there. How sure the choice is:
windows are drawn again, the same ones for all sets, and seeds within each set; the share of such resamples in which the
set is chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from qbench.report.resampling import resample_weights
from qbench.report.significance import Draws, differences
from qbench.report.takeaways.answer import (
    POWER,
    UNDECIDED,
    Takeaway,
    evidence_of,
    interval,
    judged_on,
    left_out,
    listed,
    percent,
    shown_texts,
)
from qbench.report.takeaways.evidence import Evidence, Joint, Recipe, digest
from qbench.report.takeaways.naming import named

_Key = tuple[str, str, str, str, str, str]
_RESAMPLES = 2000
_SURE = 0.95
_POSSIBLE = 0.05  # share of resamples from which a set cannot be excluded


@dataclass(frozen=True, eq=False)
class SetGroup:
    """Recipes that differ in the text of their calibration set alone, on the same evaluation texts.

    Attributes:
        recipes: All of them, also those that lack a text.
        sets: Names of those that are compared.
        draws: Of those that are compared, over all texts.
    """

    key: _Key
    recipes: tuple[Recipe, ...]
    compared: tuple[Recipe, ...]
    sets: tuple[str, ...]
    joint: Joint
    draws: tuple[Draws, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(shown_texts(self.joint.metrics))

    @property
    def starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.joint.sizes)])

    def on(self, place: int, text: int) -> Draws:
        """A set's items of one text."""
        start, end = self.starts[text : text + 2]
        draws = self.draws[place]
        return Draws(draws.items[start:end], draws.values[:, start:end], draws.drawn, draws.loss)


def set_groups(evidence: Evidence) -> list[SetGroup]:
    """Wherever two sets or more are judged on two texts or more."""
    found: dict[_Key, list[Recipe]] = {}
    for recipe in evidence.recipes:
        if recipe.calib:
            key = (recipe.model, recipe.algo, recipe.scheme, recipe.base, recipe.algorithm, recipe.amount)
            found.setdefault(key, []).append(recipe)
    groups = []
    for key, recipes in found.items():
        joint = evidence.joint(recipes)
        if len(joint.draws) > 1 and len(joint.metrics) > 1:
            compared = tuple(recipes[i] for i in joint.draws)
            names = tuple(named(compared, ("calib",)))
            groups.append(SetGroup(key, tuple(recipes), compared, names, joint, tuple(joint.draws.values())))
    return groups


def resampled(groups: Sequence[SetGroup], n: int = _RESAMPLES) -> list[np.ndarray]:
    """Mean losses `(n, sets, texts)` of each group in resamples; groups on the same windows meet the same windows."""
    rng = np.random.default_rng(0)
    windows = [resample_weights(rng, size, n) for size in groups[0].joint.sizes]
    found = []
    for group in groups:
        seeds = [resample_weights(rng, len(draws.values), n) for draws in group.draws]
        losses = np.empty((n, len(group.sets), len(windows)))
        for i, weights in enumerate(seeds):
            for j, of_text in enumerate(windows):
                losses[:, i, j] = ((of_text @ group.on(i, j).values.T) * weights).sum(axis=1)
        found.append(losses)
    return found


def observed(group: SetGroup) -> np.ndarray:
    """Mean losses, `(sets, texts)`."""
    texts = range(len(group.texts))
    return np.array([[group.on(i, j).values.mean() for j in texts] for i in range(len(group.sets))])


def regrets(losses: np.ndarray) -> np.ndarray:
    """Beyond the best set of each text, in nats; sets are the last axis but one."""
    return np.asarray(losses - losses.min(axis=-2, keepdims=True))


def calibration(evidence: Evidence) -> list[Takeaway]:
    """An answer for each model, algorithm and scheme."""
    return [_answer(group) for group in set_groups(evidence)]


def _answer(group: SetGroup) -> Takeaway:
    losses = observed(group)
    regret = regrets(losses)
    worst = regret.max(axis=1)
    of_resamples = regrets(resampled([group])[0]).max(axis=2)
    shares = np.bincount(of_resamples.argmin(axis=1), minlength=len(worst)) / len(of_resamples)
    best = int(worst.argmin())
    # The rival is what chance puts first most often, which need not be the second.
    likely = sorted(range(len(worst)), key=lambda i: (-shares[i], worst[i]))
    rival = next(i for i in likely if i != best)
    sure = bool(shares[best] >= _SURE)
    cases = _cases(group, losses, regret)
    names = group.sets
    text = f"{names[best]} has the least worst case, {cases[best][0]}; that of {names[rival]} is {cases[rival][0]}"
    if not sure:
        others = [names[i] for i in likely if i != best and shares[i] >= _POSSIBLE]
        needed = times_more(worst[rival] - worst[best], of_resamples[:, rival] - of_resamples[:, best])
        text = f"{UNDECIDED}: {text}; {listed(others or [names[rival]])} cannot be excluded, and {needed}"
    model, algo, scheme, *rest = group.key
    by_worst = sorted(range(len(names)), key=lambda i: (worst[i], i))
    chosen = ", ".join(f"{names[i]} {shares[i]:.0%}" for i in likely if shares[i] >= 0.005)
    return Takeaway(
        f"calibration/{model}/{algo}/{scheme}/{digest(*rest)}",
        f"On which text should {algo} {scheme} of {model} be calibrated ({group.recipes[0].shown_amount})?",
        "answered" if sure else "undecided",
        f"{text}.",
        "worst regret "
        + ", ".join(f"{names[i]} {cases[i][1]}" for i in by_worst)
        + "; mean regret "
        + ", ".join(f"{names[i]} {percent(float(regret[i].mean()))}" for i in by_worst),
        f"chosen in {len(of_resamples)} resamples of windows and seeds: {chosen}; "
        + judged_on(group.joint.metrics, sum(group.joint.sizes), group.draws, together=False)
        + (
            ""
            if all(len(d.values) > 1 for d in group.draws)
            else "; the luck of a single draw is not in this"
        )
        + left_out(named(group.recipes, ("calib",)), group.joint),
        evidence_of(group.recipes),
    )


def _cases(group: SetGroup, losses: np.ndarray, regret: np.ndarray) -> list[tuple[str, str]]:
    """Each set's worst case in words, and as an effect with the interval of that one difference."""
    texts = [int(text) for text in regret.argmax(axis=1)]
    least = [int(losses[:, text].argmin()) for text in texts]
    pairs = [
        (group.on(i, text), group.on(best, text))
        for i, (text, best) in enumerate(zip(texts, least, strict=True))
    ]
    found = []
    for i, d in enumerate(differences(pairs)):
        name, size = group.texts[texts[i]], percent(float(regret[i, texts[i]]))
        if least[i] == i:
            found.append(("none: it is the best on every text", "none"))
        else:
            words = f"{size} behind {group.sets[least[i]]} on {name}"
            found.append((words, f"{size} ({name}; {interval(d.low, d.high)})"))
    return found


def times_more(difference: float, resamples: np.ndarray) -> str:
    """How much more data would tell two things apart, by how their difference varies over resamples."""
    wanted = float(stats.norm.isf(0.025) + stats.norm.isf(1 - POWER))
    if difference <= 0:
        return "no amount of data would tell equal ones apart"
    times = (wanted * float(resamples.std(ddof=1)) / difference) ** 2
    shown = f"{times:.0f}" if times >= 10 else f"{times:.1f}"
    more = (
        f"about {shown} times"
        if 1.05 <= times < 1000
        else "a little more than"
        if times < 1.05
        else "over 1000 times"
    )
    return f"{more} as many windows and seeds would tell these two apart"
