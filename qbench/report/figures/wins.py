"""Who wins against whom, and how often it is decided."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from qbench.report.figures.layout import LINE_HEIGHT, checked, legend_below, nothing, shorten, text_width
from qbench.report.figures.style import COLOURS, COLUMN, INK, canvas, settle, styled

_PAIRS = ["row", "column", "won", "tied", "lost"]
_WON, _LOST = COLOURS[0], COLOURS[4]


@styled()
def wins_matrix(frame: pd.DataFrame, *, width: float = COLUMN) -> Figure:
    """Rows against columns: a bar with the shares won, tied and lost, above it the numbers won and lost.

    Who wins most, less what is lost, is at the top. Numbers are left out where there is no room for them; the figure is
    wider where its columns would be narrower than a line of text.

    Args:
        frame: Columns row and column (algorithms), won, tied, lost (numbers of comparisons, from the row's side; won and
            lost are those that are significant). Pairs that are missing stay empty.
    """
    pairs = checked(frame, _PAIRS, ["won", "tied", "lost"])
    pairs = pairs[pairs[["won", "tied", "lost"]].sum(axis=1) > 0].astype({"row": str, "column": str})
    names = _order(frame, pairs)
    shown = [shorten(name, min(0.3 * width, 1.2)) for name in names]
    beside = max(map(text_width, shown), default=0.0) + 0.2
    width = max(width, beside + len(names) * LINE_HEIGHT)
    room = (width - beside) / max(1, len(names))
    numbers = {
        (row, column): f"{won:.0f}–{lost:.0f}"
        for row, column, won, lost in pairs[["row", "column", "won", "lost"]].itertuples(index=False)
    }
    has_numbers = all(text_width(text) + 0.06 <= room for text in numbers.values())
    tall = 2 * LINE_HEIGHT + 0.06 if has_numbers else max(0.16, min(room, 0.22))
    upright = max(map(text_width, shown), default=0) + 0.06 > room
    above = max(map(text_width, shown), default=0) if upright else LINE_HEIGHT
    figure = canvas(width, max(1.0, len(names) * tall + above + 0.2))
    axes = figure.add_subplot()
    if not len(names):
        nothing(axes)
        return settle(figure)
    _bars(axes, pairs, names, has_numbers)
    for (row, column), text in numbers.items() if has_numbers else ():
        at = names.index(column) + 0.5, names.index(row) + 0.34
        axes.text(*at, text, ha="center", va="center", in_layout=False)
    _frame(axes, shown, upright)
    legend_below(figure, _key(), ["won", "not decided", "lost"])
    return settle(figure)


def _order(frame: pd.DataFrame, pairs: pd.DataFrame) -> list[str]:
    names = sorted({*frame["row"].astype(str), *frame["column"].astype(str)})
    net = (pairs["won"] - pairs["lost"]).groupby(pairs["row"].astype(str)).sum()
    total = pairs[["won", "tied", "lost"]].sum(axis=1).groupby(pairs["row"].astype(str)).sum()
    share = (net / total).to_dict()
    return sorted(names, key=lambda name: (-share.get(name, -2.0), name))


def _bars(axes: Axes, pairs: pd.DataFrame, names: list[str], are_low: bool) -> None:
    """Won from the left, lost at the right; tied is what is left between, empty but for its outline."""
    top, height, width = (0.66, 0.22, 0.84) if are_low else (0.15, 0.7, 0.84)
    counts = pairs[["won", "tied", "lost"]].to_numpy(float)
    won, _, lost = width * counts.T / counts.sum(axis=1)
    left = np.array([names.index(name) for name in pairs["column"]], dtype=float) + (1 - width) / 2
    upper = np.array([names.index(name) for name in pairs["row"]], dtype=float) + top
    shapes = {
        "won": [Rectangle((x, y), w, height) for x, y, w in zip(left, upper, won, strict=True)],
        "lost": [Rectangle((x + width - w, y), w, height) for x, y, w in zip(left, upper, lost, strict=True)],
        "outline": [Rectangle((x, y), width, height) for x, y in zip(left, upper, strict=True)],
    }
    axes.add_collection(PatchCollection(shapes["won"], facecolor=_WON, linewidth=0))
    axes.add_collection(
        PatchCollection(shapes["lost"], facecolor=_LOST, edgecolor=INK, hatch="/////", linewidth=0)
    )
    axes.add_collection(PatchCollection(shapes["outline"], facecolor="none", edgecolor=INK, linewidth=0.4))


def _frame(axes: Axes, names: list[str], upright: bool) -> None:
    n = len(names)
    same = [Rectangle((i, i), 1, 1) for i in range(n)]
    axes.add_collection(PatchCollection(same, facecolor=INK, alpha=0.1, linewidth=0))
    axes.set_xlim(0, n)
    axes.set_ylim(n, 0)
    places = [i + 0.5 for i in range(n)]
    axes.set_xticks(places, names, rotation=90 if upright else 0)
    axes.set_yticks(places, names)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.set_xticks(range(n + 1), minor=True)
    axes.set_yticks(range(n + 1), minor=True)
    axes.tick_params(which="minor", length=0)
    axes.grid(which="minor")
    axes.spines[:].set_visible(False)


def _key() -> list[Rectangle]:
    return [
        Rectangle((0, 0), 1, 1, facecolor=_WON, linewidth=0),
        Rectangle((0, 0), 1, 1, facecolor="none", edgecolor=INK, linewidth=0.4),
        Rectangle((0, 0), 1, 1, facecolor=_LOST, edgecolor=INK, hatch="/////", linewidth=0),
    ]
