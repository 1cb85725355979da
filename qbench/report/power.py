"""Which differences a test would find: the smallest true one that it finds four times in five."""

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np
from scipy import optimize, stats
from statsmodels.stats.power import TTestPower

from qbench.report.significance import MCNEMAR, SURE, Difference, Standing

G = TypeVar("G", bound=Hashable)
K = TypeVar("K", bound=Hashable)


def detectable(sd: float, n: int, alpha: float = SURE, power: float = 0.8) -> float:
    """The smallest true mean difference that a paired t-test of `n` items finds with this power.

    NaN of fewer than four items.
    """
    if n < 4 or not np.isfinite(sd):
        return float("nan")
    most = 5 * stats.t.isf(alpha / 2, n - 1) / np.sqrt(n)

    # statsmodels' own two-sided power, and so its solver, is NaN or wrong where alpha is small, for the far tail's sake.
    def missing(size: float) -> float:
        return float(TTestPower().power(size, n, alpha / 2, alternative="larger")) - power

    return float(sd * optimize.brentq(missing, 0.0, most))


def detectable_rate(discordant: float, n: int, alpha: float = SURE, power: float = 0.8) -> float:
    """The smallest true difference of two rates that McNemar's exact test of `n` documents finds with this power.

    NaN where `n` documents cannot find any.

    Args:
        discordant: Share of the documents that one recipe answers rightly and the other wrongly; at least the difference.
    """

    def missing(effect: float) -> float:
        share = min(1.0, max(discordant, effect))
        counts = np.arange(n + 1)  # of documents on which they differ
        least = stats.binom.ppf(alpha / 2, counts, 0.5) - 1  # of them on the losing side, at most, to be sure
        least = np.where(2 * stats.binom.cdf(least + 1, counts, 0.5) < alpha, least + 1, least)
        losing = (1 - effect / share) / 2
        found = stats.binom.cdf(least, counts, losing) + stats.binom.sf(counts - least - 1, counts, losing)
        return float(stats.binom.pmf(counts, n, share) @ np.where(least >= 0, found, 0.0)) - power

    return float(optimize.brentq(missing, 1e-9, 1.0)) if n > 0 and missing(1.0) > 0 else float("nan")


def least(difference: Difference, alpha: float = SURE, power: float = 0.8) -> float:
    """The smallest true difference that this comparison finds with this power, by the test that it was made with."""
    n, sd = difference.n, difference.sd
    if difference.test == MCNEMAR:
        return detectable_rate(sd**2 * (n - 1) / n + difference.effect**2, n, alpha, power)
    return detectable(sd, n, alpha, power)


def table_detectable(standings: Mapping[G, Mapping[K, Standing]], power: float = 0.8) -> dict[G, float]:
    """For each column, the smallest true difference over items that the table finds with this power.

    Of a typical comparison with the best, the one with the median spread, at alpha over the family. NaN without others.
    """
    found = {}
    for g, members in standings.items():
        others = [(s.difference, s.alpha / s.family) for s in members.values() if s.difference]
        if not others:
            found[g] = float("nan")
            continue
        by_spread = sorted(others, key=lambda other: (not np.isfinite(other[0].sd), other[0].sd))
        typical, alpha = by_spread[len(by_spread) // 2]
        found[g] = least(typical, alpha, power)
    return found
