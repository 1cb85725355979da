"""Do data sets agree on which recipe is better, and does perplexity tell how tasks will fare?"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from qbench.report.significance import holm


class Spearman(NamedTuple):
    """Square frames, columns by columns: rank correlation, p (corrected by Holm's method), how many rows both have."""

    rho: pd.DataFrame
    p: pd.DataFrame
    n: pd.DataFrame


def spearman(wide: pd.DataFrame) -> Spearman:
    """Rank correlation of every two columns (data sets) over the rows (recipes) that both have.

    NaN where there are fewer than three such rows or a column is constant on them. P-values of fewer than ten rows are those
    of a permutation test, exact up to seven.
    """
    names, found = list(wide.columns), {}
    for a, b in combinations(names, 2):
        both = wide[[a, b]].astype(float).dropna()
        found[a, b] = (*_rank_correlation(both[a].to_numpy(), both[b].to_numpy()), len(both))
    corrected = holm([p for _, p, _ in found.values()])
    counts = wide.notna().sum()
    rho, p, n = (pd.DataFrame(diagonal, names, names) for diagonal in (np.nan, np.nan, 0))
    for name in names:
        rho.loc[name, name], n.loc[name, name] = 1.0, int(counts[name])
    for ((a, b), (r, _, rows)), sure in zip(found.items(), corrected, strict=True):
        for i, j in ((a, b), (b, a)):
            rho.loc[i, j], p.loc[i, j], n.loc[i, j] = r, sure, rows
    return Spearman(rho, p, n)


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
        return float("nan"), float("nan")
    found = stats.spearmanr(x, y)
    if len(x) >= 10:
        return float(found.statistic), float(found.pvalue)
    ranks_of_y = (
        stats.rankdata(y) - (len(y) + 1) / 2
    )  # the correlation, but for factors that no order changes
    exact = stats.permutation_test(
        (stats.rankdata(x),),
        lambda ranks, axis: (ranks * ranks_of_y).sum(axis=axis),
        permutation_type="pairings",
        vectorized=True,
        n_resamples=9999,
        rng=np.random.default_rng(0),
    )
    return float(found.statistic), float(exact.pvalue)


def pearson(wide: pd.DataFrame, x: str, ys: Sequence[str]) -> pd.DataFrame:
    """Linear correlation of a column (the logarithm of perplexity, say) with others (tasks).

    Returns:
        One row for each of `ys`: y, r, low, high (Fisher's 95 % interval), p (corrected by Holm's method over `ys`), n. NaN
        where there are fewer than four rows that have both, or one is constant.
    """
    rows = []
    for y in ys:
        both = wide[[x, y]].astype(float).dropna()
        row = {"y": y, "r": np.nan, "low": np.nan, "high": np.nan, "p": np.nan, "n": len(both)}
        if len(both) >= 4 and all(np.ptp(both[name]) for name in (x, y)):
            found = stats.pearsonr(both[x], both[y])
            low, high = found.confidence_interval(0.95)
            row |= {
                "r": float(found.statistic),
                "low": float(low),
                "high": float(high),
                "p": float(found.pvalue),
            }
        rows.append(row)
    table = pd.DataFrame(rows, columns=["y", "r", "low", "high", "p", "n"])
    return table.assign(p=holm(table["p"]))
