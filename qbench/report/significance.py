"""Is a difference more than luck? Paired tests and intervals, and which recipes tie with the best of a table.

Two things are drawn at random: the items of an evaluation (windows, documents) and the calibration samples (by the seed). A
difference counts only where it is sure on both grounds: over items (a paired t-test of the means over draws, or McNemar's
exact test where items are 0 or 1 and each side is one draw) and over draws (Welch's t-test of their means). The larger of
the two p-values is that of claiming both (an intersection-union test; Berger 1982). How far these tests can be trusted was
measured: docs/statistics.md.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from qbench.report.draws import Draws as Draws  # this is where others look for it
from qbench.report.draws import meet
from qbench.report.metrics import Kind
from qbench.report.resampling import interval

G = TypeVar("G", bound=Hashable)
K = TypeVar("K", bound=Hashable)
SURE = 0.05
MCNEMAR = "McNemar"  # the name of the test of documents that are right or wrong

_PAIRS = 500  # whose resampled means are in memory at once, 20 MB
_CELLS = 1 << 22  # of an array of items, 32 MB


@dataclass(frozen=True)
class Difference:
    """How much two recipes differ on the items that both have, and how sure that is.

    Attributes:
        effect: Mean of the first less the second, over draws and items, in the items' unit (nats for perplexity).
        low: Lower end of the effect's 95 % interval over items, draws as they are: a BCa bootstrap.
        high: Its upper end.
        p: Two-sided; of both grounds where there are draws. NaN where it cannot be known (a single item).
        n: How many items.
        sd: Standard deviation of the items' differences.
        test: By which the p-value was found.
    """

    effect: float
    low: float
    high: float
    p: float
    n: int
    sd: float
    test: str
    kind: Kind


@dataclass(frozen=True)
class Standing:
    """Where a recipe stands in its column.

    Attributes:
        best: Whether it has the best mean; the first of several that are equal.
        tie: Whether it is not the best, but not surely worse either.
        difference: To the best: this less the best; None of the best itself.
        p: Corrected for the whole table; None of the best itself.
        alpha: Below which p is sure.
        family: Of how many comparisons p is corrected for.
    """

    best: bool
    tie: bool
    difference: Difference | None
    p: float | None
    alpha: float
    family: int


def differences(pairs: Sequence[tuple[Draws, Draws]]) -> list[Difference]:
    """All differences, first less second.

    Raises:
        ValueError: If two share no items.
    """
    met = [meet(*pair) for pair in pairs]
    found: list[Difference | None] = [None] * len(met)
    by_n: dict[int, list[int]] = {}
    for i, (a, _) in enumerate(met):
        by_n.setdefault(len(a.items), []).append(i)
    for n, alike in by_n.items():
        step = max(1, min(_PAIRS, _CELLS // n))
        for part in (alike[i : i + step] for i in range(0, len(alike), step)):
            for i, difference in zip(part, _differences([met[j] for j in part]), strict=True):
                found[i] = difference
    return [difference for difference in found if difference is not None]


def _differences(pairs: Sequence[tuple[Draws, Draws]]) -> list[Difference]:
    """Of pairs that have equally many items."""
    delta = np.array([a.values.mean(axis=0) - b.values.mean(axis=0) for a, b in pairs])
    n, same = delta.shape[1], np.all(delta == 0, axis=1)
    effect = delta.mean(axis=1)
    with np.errstate(invalid="ignore"):  # an infinite loss has no spread
        sd = delta.std(axis=1, ddof=1) if n > 1 else np.full(len(pairs), np.nan)
    low, high = interval(delta)
    with np.errstate(all="ignore"):  # a constant difference has p = 0, a single item none
        p = 2 * stats.t.sf(np.abs(effect) / (sd / np.sqrt(n)), n - 1)
    over_draws = _over_draws(pairs)
    found = []
    for i, (a, b) in enumerate(pairs):
        zero_one = not a.loss and all(((x.values == 0) | (x.values == 1)).all() for x in (a, b))
        of_draws = len(a.values) > 1 or len(b.values) > 1
        test = "paired t"
        if zero_one and not of_draws:
            test, p[i] = MCNEMAR, _mcnemar(delta[i])
        elif of_draws:
            test += " and Welch over draws" if min(len(a.values), len(b.values)) > 1 else " and t over draws"
        sure = 1.0 if same[i] else float("nan") if n == 1 else float(np.fmax(p[i], over_draws[i]))
        what: Kind = "loss" if a.loss else "binary" if zero_one else "real"
        ends = float(low[i]), float(high[i])
        found.append(Difference(float(effect[i]), *ends, sure, n, float(sd[i]), test, what))
    return found


def _mcnemar(delta: np.ndarray) -> float:
    """Exact however many items differ: the binomial distribution is at hand."""
    table = [[0, int((delta > 0).sum())], [int((delta < 0).sum()), 0]]
    return float(mcnemar(table, exact=True).pvalue)


def _over_draws(pairs: Sequence[tuple[Draws, Draws]]) -> np.ndarray:
    """P-values of the draws' means; NaN where both sides are a single draw.

    A single draw beside several is either not drawn, a constant (a one-sample t-test), or drawn from a spread that only
    the other side shows (a t-test with the pooled one).
    """
    means = [[side.values.mean(axis=1) for side in pair] for pair in pairs]
    n = np.array([[len(m) for m in pair] for pair in means])
    mean = np.array([[m.mean() for m in pair] for pair in means])
    sd = np.array([[m.std(ddof=1) if len(m) > 1 else 0.0 for m in pair] for pair in means])
    pooled = np.array([any(len(s.values) == 1 and s.drawn for s in pair) for pair in pairs])
    # A constant: Welch's degrees of freedom are the other side's where this one's spread is 0, whatever its number.
    constant = np.where(n == 1, 2, n)
    with np.errstate(all="ignore"):
        (m1, m2), (s1, s2) = mean.T, sd.T
        shared = stats.ttest_ind_from_stats(m1, s1, n[:, 0], m2, s2, n[:, 1], equal_var=True).pvalue
        welch = stats.ttest_ind_from_stats(
            m1, s1, constant[:, 0], m2, s2, constant[:, 1], equal_var=False
        ).pvalue
    p = np.where(pooled, shared, welch)
    return np.where(n.max(axis=1) == 1, np.nan, np.where(m1 == m2, 1.0, p))


def holm(p: "Sequence[float] | np.ndarray | pd.Series[float]", family: int = 0) -> np.ndarray:
    """P-values corrected by Holm's step-down method; NaN stays NaN and does not count.

    Args:
        family: How many tests there are in all, if more than these; the others are taken not to reject.
    """
    # Not statsmodels' multipletests, which collects the whole process's garbage at every call (0.2 s and more).
    given = np.asarray(p, dtype=float)
    known = np.flatnonzero(~np.isnan(given))
    order = known[np.argsort(given[known], kind="stable")]
    factors = max(family, len(order)) - np.arange(len(order))
    corrected = given.copy()
    corrected[order] = np.minimum(1, np.maximum.accumulate(given[order] * factors))
    return corrected


def table_ties(
    groups: Mapping[G, Mapping[K, Draws]], lower: Mapping[G, bool], alpha: float = SURE
) -> dict[G, dict[K, Standing]]:
    """Where every recipe stands in each column of a table.

    The best is found in the data that it is tested on, so the tests count as all pairs of a column: whichever is best, its
    comparisons are among those. Correction is for the table.

    Raises:
        ValueError: If recipes of a column were not asked the same items.
    """
    family = sum(len(members) * (len(members) - 1) // 2 for members in groups.values())
    best = {g: _best(g, members, lower[g]) for g, members in groups.items()}
    others = [(g, k) for g, members in groups.items() for k in members if k != best[g]]
    found = differences([(groups[g][k], groups[g][best[g]]) for g, k in others])
    corrected = holm([d.p for d in found], family)
    beside = {place: (d, float(p)) for place, d, p in zip(others, found, corrected, strict=True)}
    standings: dict[G, dict[K, Standing]] = {}
    for g, members in groups.items():
        standings[g] = {}
        for k in members:
            d, p = beside.get((g, k), (None, None))
            tie = d is not None and p is not None and bool(np.isfinite(d.effect)) and not p < alpha
            standings[g][k] = Standing(d is None, tie, d, p, alpha, family)
    return standings


def _best(name: Hashable, members: Mapping[K, Draws], lower: bool) -> K:
    if len({draws.items for draws in members.values()}) > 1:
        counts = ", ".join(f"{k} {len(draws.items)}" for k, draws in members.items())
        raise ValueError(
            f"the recipes of {name} were not asked the same items ({counts}); compare one evaluation"
        )
    means = {k: float(draws.values.mean()) * (1 if lower else -1) for k, draws in members.items()}
    return min(means, key=lambda k: means[k] if np.isfinite(means[k]) else float("inf"))


def ties(values: Mapping[K, Draws], lower: bool, alpha: float = SURE) -> dict[K, Standing]:
    """Where every recipe stands in a table of one column."""
    return table_ties({"": values}, {"": lower}, alpha)[""]
