"""How far a mean may be off: bootstrap intervals over items, of many rows at once, and weights for resamples of any rule."""

import numpy as np
from scipy import stats

_LEVEL = 0.95
_RESAMPLES = 4999
_CELLS = 1 << 22  # of an array of resampled items, 32 MB
_SKEW_MATTERS = 1000  # items; with more, BCa and percentile intervals agree, and BCa's jackknife is slow


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of the 95 % intervals of the means of rows, each of shape `(n_rows,)`; NaN of a single item.

    All rows meet the same resamples of items, so that no row's interval depends on the others.
    """
    n, ends = values.shape[1], np.full((2, len(values)), np.nan)
    if n < 2:
        return ends[0], ends[1]
    with np.errstate(invalid="ignore"):  # rows with infinite items keep NaN
        constant = np.ptp(values, axis=1) <= 1e-12 * np.abs(values).max(axis=1)
    ends[:, constant] = values[constant].mean(axis=1)
    varied = ~constant & np.isfinite(values).all(axis=1)
    if varied.any():
        ends[:, varied] = _bootstrap(values[varied])
    return ends[0], ends[1]


def resample_weights(rng: np.random.Generator, size: int, n: int) -> np.ndarray:
    """What each of `size` things counts in each of `n` resamples: shape `(n, size)`, rows sum to 1.

    One thing fewer than there are is drawn, which makes the spread of a mean unbiased (Rao and Wu 1988): with as many as
    there are it is too small by (size - 1) / size, half of it for two draws.
    """
    if size < 2:
        return np.ones((n, size))
    return rng.multinomial(size - 1, np.full(size, 1 / size), n) / (size - 1)


def _bootstrap(values: np.ndarray) -> np.ndarray:
    n = values.shape[1]
    # BCa counts the resamples below the mean, and some tie with it. On a grid that leaves room for the sum of n, sums are
    # exact in whatever order a product of matrices takes them, and ties are ties whichever rows come along.
    exponent = np.frexp(np.abs(values).max(axis=1, keepdims=True))[1]
    grid = np.ldexp(1.0, exponent - 52 + n.bit_length())
    on_grid = np.rint(values / grid)

    def means(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        """Of all rows; how often each item is drawn is counted, so that it is a product of matrices."""
        places = np.atleast_2d(drawn)
        counted = len(places)
        flat = (places + n * np.arange(counted)[:, None]).ravel()
        counts = np.bincount(flat, minlength=n * counted).reshape(counted, n).astype(float)
        found = on_grid @ counts.T / places.shape[1]
        return found if drawn.ndim > 1 else found[:, 0]

    # Resamples spread as 1/n, not 1/(n - 1), and their tails are the normal's: widened to Student's (Hesterberg 2015).
    tail = stats.norm.sf(np.sqrt(n / (n - 1)) * stats.t.isf((1 - _LEVEL) / 2, n - 1))
    found = stats.bootstrap(
        (np.arange(n),),
        means,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, _CELLS // n),
        confidence_level=float(1 - 2 * tail),
        method="BCa" if n <= _SKEW_MATTERS else "percentile",
        rng=np.random.default_rng(0),
    )
    return np.stack(found.confidence_interval) * grid[:, 0]
