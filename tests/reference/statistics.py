"""Other ways to test and bound a mean difference, written plainly: what qbench's own is compared with."""

import numpy as np
from scipy import stats


def bootstrap_interval(values: np.ndarray, method: str, widened: bool, n_resamples: int = 1999) -> np.ndarray:
    """Both ends, shape `(2, n_rows)`, of the rows' means; every resample is made."""
    n = values.shape[1]
    tail = 0.025
    if widened:
        tail = float(stats.norm.sf(np.sqrt(n / (n - 1)) * stats.t.isf(tail, n - 1)))
    found = stats.bootstrap(
        (values,),
        np.mean,
        axis=1,
        vectorized=True,
        method=method,
        n_resamples=n_resamples,
        confidence_level=1 - 2 * tail,
        batch=max(1, 2**22 // values.size),
        rng=np.random.default_rng(0),
    )
    return np.stack(found.confidence_interval)


def bootstrap_p(values: np.ndarray, rng: np.random.Generator, n_resamples: int = 1999) -> np.ndarray:
    """Twice the smaller share of resampled means on either side of zero."""
    n = values.shape[1]
    means = values @ rng.multinomial(n, np.full(n, 1 / n), size=n_resamples).T
    below, above = ((means <= 0).sum(axis=1), (means >= 0).sum(axis=1))
    return np.minimum(1, 2 * (np.minimum(below, above) + 1) / (n_resamples + 1))


def sign_flip_p(values: np.ndarray, rng: np.random.Generator, n_resamples: int = 1999) -> np.ndarray:
    """How often the mean is as large when each item's sign is tossed for."""
    signs = rng.choice([-1.0, 1.0], size=(values.shape[1], n_resamples))
    as_large = np.abs(values @ signs) >= np.abs(values.sum(axis=1))[:, None] * (1 - 1e-12)
    return (as_large.sum(axis=1) + 1) / (n_resamples + 1)
