"""How much of the spread of results is due to the algorithm, the scheme, the calibration set, the model, the seed?"""

import warnings
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.formula.api import ols

from qbench.report.metrics import is_perplexity

FACTORS = ("algo", "scheme", "calib", "model", "seed")

_MOST_CELLS = 120  # of an interaction: fitting takes the cube of it
_COLUMNS = ["term", "df", "sum_sq", "share", "F", "p", "note"]
_Term = tuple[str, ...]


def decompose(frame: pd.DataFrame, factors: Sequence[str] = FACTORS, value: str = "value") -> pd.DataFrame:
    """Type II analysis of variance of one metric, with two-way interactions as far as the design has them.

    Each term is tested beside all others that do not contain it. In an unbalanced design a part of the spread belongs to no
    single term: the row `shared` (below zero where factors hide one another). No calibration data is a level of its own.
    Perplexities, told by the column `metric`, are decomposed as logarithms.

    Returns:
        One row for each term, then `shared` and `residual`: term (`algo`, `algo:calib`), df, sum_sq, share (of the sum of
        squares about the mean), F, p, note (why a term was left out, or what hides it).

    Raises:
        ValueError: If columns are missing, metrics mixed, values not finite or all equal, or no factor varies.
    """
    data = _checked(frame, factors, value)
    varied = [factor for factor in factors if data[factor].nunique() > 1]
    if not varied:
        raise ValueError(
            f"none of {', '.join(factors)} varies in {len(data)} rows; decompose records of a sweep"
        )
    left_out: dict[_Term, str] = {
        (factor,): f"one level: {data[factor].iloc[0]}" for factor in factors if factor not in varied
    }
    fits = _Fits(data)
    terms: list[_Term] = [(factor,) for factor in varied]
    for pair in combinations(varied, 2):
        if (n := int(data.groupby(list(pair)).ngroups)) > _MOST_CELLS:
            left_out[pair] = f"{n} combinations, more than are fitted"
            continue
        (_, df), (_, more) = fits(terms), fits([*terms, pair])
        if more == df:
            left_out[pair] = "does not vary beside the factors"
        elif more < 1:
            left_out[pair] = "would leave nothing for the residual"
        else:
            terms.append(pair)
    rows = _tested(terms, fits)
    rows += [{"term": ":".join(term), "note": note} for term, note in left_out.items()]
    (rest, df), total = fits(terms), fits([])[0]
    shared = total - rest - sum(row.get("sum_sq", 0.0) for row in rows)
    # An orthogonal design shares nothing but the rounding of sums of squares.
    rows.append({"term": "shared", "sum_sq": shared if abs(shared) > 1e-9 * total else 0.0})
    rows.append({"term": "residual", "df": df, "sum_sq": rest if df else 0.0})
    found = pd.DataFrame(rows, columns=_COLUMNS).fillna({"note": ""})
    return found.assign(share=found["sum_sq"] / total)


def _checked(frame: pd.DataFrame, factors: Sequence[str], value: str) -> pd.DataFrame:
    """Factors as text and the value, as `y`."""
    if missing := [name for name in (*factors, value) if name not in frame]:
        raise ValueError(
            f"the frame has no {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}"
        )
    y = frame[value].astype(float)
    if "metric" in frame:
        names = list(frame["metric"].unique())
        if len(names) > 1:
            raise ValueError(
                f"{len(names)} metrics ({', '.join(map(str, names[:3]))}) are mixed; decompose one at a time"
            )
        y = y.transform(np.log) if names and is_perplexity(names[0]) else y
    if not (finite := np.isfinite(y)).all():
        raise ValueError(f"{(~finite).sum()} of {len(y)} values are not finite; leave those rows out")
    if y.nunique() < 2:
        raise ValueError(f"{len(y)} values are all equal; there is nothing to decompose")
    levels = {
        factor: frame[factor].astype(object).where(frame[factor].notna(), "none").astype(str)
        for factor in factors
    }
    return pd.DataFrame(levels | {"y": y})


class _Fits:
    """Residual sum of squares and degrees of freedom of a model of these terms; each is fitted once.

    Degrees of freedom are of the design's rank, so that levels which imply one another (no calibration data, and the
    algorithm that needs none) are not counted twice.
    """

    def __init__(self, data: pd.DataFrame) -> None:
        self._data = data
        self._known: dict[frozenset[_Term], tuple[float, int]] = {}

    def __call__(self, terms: Sequence[_Term]) -> tuple[float, int]:
        key = frozenset(terms)
        if key not in self._known:
            formula = " + ".join(":".join(f'C(Q("{name}"))' for name in term) for term in terms)
            with warnings.catch_warnings():  # parameters are not read, so that a deficient rank is no harm
                warnings.filterwarnings("ignore", message=".*rank-deficient")
                fit = ols(f"y ~ {formula or '1'}", self._data).fit()
            self._known[key] = float(fit.ssr), int(fit.df_resid)
        return self._known[key]


def _tested(terms: Sequence[_Term], fits: _Fits) -> list[dict[str, Any]]:
    rest, df_rest = fits(terms)
    rows = []
    for term in terms:
        others = [other for other in terms if not set(term) <= set(other)]
        (without, df_without), (with_, df_with) = fits(others), fits([*others, term])
        df, sum_sq = df_without - df_with, without - with_
        row: dict[str, Any] = {"term": ":".join(term), "df": df}
        if df == 0:
            row["note"] = "told by the other factors"
        else:
            row["sum_sq"] = sum_sq
        if df and df_rest:
            f = (sum_sq / df) / (rest / df_rest) if rest else float("inf")
            row |= {"F": f, "p": float(stats.f.sf(f, df, df_rest))}
        rows.append(row)
    return rows
