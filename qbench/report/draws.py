"""What a recipe scored on each item of an evaluation, one draw of calibration samples at a time."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from qbench.report.metrics import kind


@dataclass(frozen=True, eq=False)
class Draws:
    """The items of one metric of one recipe.

    Attributes:
        items: Their ids, sorted.
        values: Shape `(n_draws, n_items)`; a draw is a calibration seed.
        drawn: Whether there is a draw at all: a recipe without calibration data has one row, and no luck in it.
        loss: Whether values are negative log-likelihoods.
    """

    items: tuple[str, ...]
    values: np.ndarray
    drawn: bool = True
    loss: bool = False

    @classmethod
    def of(cls, frame: pd.DataFrame, metric: str = "") -> "Draws":
        """From columns draw (missing of a recipe without calibration data), item, value.

        Raises:
            ValueError: If there are no rows, or draws differ in their items, or one has an item twice.
        """
        draw, item = (frame[name].to_numpy().astype(str) for name in ("draw", "item"))
        items, place = np.unique(item, return_inverse=True)
        draws, row = np.unique(draw, return_inverse=True)
        cells = row * len(items) + place
        if not len(frame) or len(cells) != len(draws) * len(items) or len(np.unique(cells)) != len(cells):
            raise ValueError(
                f"{metric or 'a metric'} has {len(frame)} values of {len(draws)} draws and {len(items)} items, "
                "one of each is needed; keep jobs of one recipe and one evaluation"
            )
        values = np.empty(len(cells))
        values[cells] = frame["value"].to_numpy(dtype=float)
        drawn, loss = bool(frame["draw"].notna().any()), bool(metric) and kind(metric) == "loss"
        return cls(tuple(items.tolist()), values.reshape(len(draws), -1), drawn, loss)


def meet(a: Draws, b: Draws) -> tuple[Draws, Draws]:
    """Both with the items that they share.

    Raises:
        ValueError: If there are none.
    """
    if a.items == b.items:
        return a, b
    items, of_a, of_b = np.intersect1d(a.items, b.items, return_indices=True)
    if not len(items):
        raise ValueError(
            f"the recipes share none of their {len(a.items)} and {len(b.items)} items (such as {a.items[0]!r} and "
            f"{b.items[0]!r}); compare jobs of one evaluation"
        )
    ids = tuple(items.tolist())
    return Draws(ids, a.values[:, of_a], a.drawn, a.loss), Draws(ids, b.values[:, of_b], b.drawn, b.loss)
