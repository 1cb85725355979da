"""Matrices as coloured cells with their numbers: calibration sets by evaluation texts, correlations."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from qbench.report.figures.layout import LINE_HEIGHT, shorten, text_width
from qbench.report.figures.style import COLUMN, INK, canvas, settle, styled

_LABELS = 0.32  # of the width: at most this for the rows' names
_BAR = 0.55  # inches: the colour bar with its numbers and title


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Ratio of the luminances of two colours in 0 to 1, as WCAG 2 defines it: 1 to 21."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def ink_on(colour: tuple[float, ...]) -> str:
    """Black or white, whichever is easier to read on a colour: one of them has a contrast of at least 4.58."""
    return max(
        ("#000000", "#ffffff"), key=lambda ink: contrast((float(ink == "#ffffff"),) * 3, tuple(colour))
    )


@styled()
def heat_map(
    values: pd.DataFrame,
    changes: pd.DataFrame | None = None,
    marks: pd.DataFrame | None = None,
    *,
    rows: str = "calibration set",
    columns: str = "evaluation text",
    shade: str = "",
    width: float = COLUMN,
) -> Figure:
    """Values by row and column; each cell has its value, its change and a mark, as far as there is room.

    Cells are coloured by their change, or by their value where no changes are given; a missing one is hatched.

    Args:
        values: Names of rows and columns are its index and columns.
        changes: Relative, of the same shape: 0.05 is shown as `+5.0%`.
        marks: Of the same shape: text behind the value, such as `*` where a difference is sure; NaN is none.
        shade: What the colour bar shows.
    """
    values = values.astype(float)
    coloured = values if changes is None else changes.astype(float)
    full = _texts(values, changes, marks)
    texts = [full, full.replace("%", "", regex=True), _texts(values, None, marks), _texts(None, None, marks)]
    light = colormaps["Blues"](np.linspace(0.0, 0.9, 128))
    as_text = _number if changes is None else _percent
    shade = shade or ("value" if changes is None else "relative change")
    return _grid(
        coloured, texts, _limits(coloured), LinearSegmentedColormap.from_list("blues", light), (rows, columns, shade),
        as_text, width,
    )  # fmt: skip


@styled()
def correlation_map(
    values: pd.DataFrame,
    marks: pd.DataFrame | None = None,
    *,
    shade: str = "Spearman's rank correlation",
    width: float = COLUMN,
) -> Figure:
    """Correlations from -1 to 1, such as Spearman's between data sets; a missing one is hatched.

    Args:
        marks: As in `heat_map`.
    """
    values = values.astype(float)
    shown = values.map(lambda v: f"{v:.2f}".replace("-", "−"))
    texts = [_marked(shown, marks), _texts(None, None, marks)]
    return _grid(values, texts, Normalize(-1.0, 1.0), colormaps["PuOr_r"], ("", "", shade), _number, width)


def _limits(values: pd.DataFrame) -> Normalize:
    """From the least to the greatest, but no further than Tukey's outer fences: one wild value would whiten the others."""
    finite = values.to_numpy()[np.isfinite(values.to_numpy())]
    if not len(finite):
        return Normalize(0.0, 1.0)
    first, third = np.quantile(finite, (0.25, 0.75))
    reach = 3 * (third - first) or np.inf
    low, high = max(finite.min(), first - reach), min(finite.max(), third + reach)
    return Normalize(float(low), float(high) if high > low else float(low) + 1.0)


def _texts(
    values: pd.DataFrame | None, changes: pd.DataFrame | None, marks: pd.DataFrame | None
) -> pd.DataFrame:
    """What stands in the cells."""
    if values is None:
        return pd.DataFrame() if marks is None else marks.fillna("").astype(str)
    found = _marked(values.map(_number), marks)
    return found if changes is None else found + "\n" + changes.astype(float).map(_percent)


def _marked(shown: pd.DataFrame, marks: pd.DataFrame | None) -> pd.DataFrame:
    return shown if marks is None else shown + marks.fillna("").astype(str)


def _number(value: float) -> str:
    text = f"{value:.3g}" if abs(value) < 100 or abs(value) >= 1e5 else f"{value:.0f}"
    return text.replace("e+0", "e").replace("e+", "e").replace("-", "−")


def _percent(value: float) -> str:
    if abs(value) < 5e-5:
        return "0%"
    text = f"{100 * value:+.1f}" if abs(value) < 1 else f"{100 * value:+.0f}"
    return (text if len(text) < 7 else f"{100 * value:+.1e}").replace("-", "−").replace("e+0", "e") + "%"


@dataclass(frozen=True)
class _Plan:
    """What there is room for, in inches."""

    names: list[str]
    heads: list[str]
    upright: bool
    texts: pd.DataFrame
    width: float
    cells: float  # height of all rows
    height: float


def _plan(shape: pd.DataFrame, texts: list[pd.DataFrame], titles: tuple[str, str], width: float) -> _Plan:
    """Choose the first of the texts that fits into all cells, none if none does."""
    n_rows, n_columns = shape.shape
    names = [shorten(str(name), _LABELS * width) for name in shape.index]
    beside = max(map(text_width, names), default=0.0) + (LINE_HEIGHT if titles[0] else 0) + 0.15
    width = max(width, beside + n_columns * LINE_HEIGHT)
    room = (width - beside) / max(1, n_columns)
    chosen = next((t for t in texts if t.size and _widest(t) + 0.04 <= room), pd.DataFrame())
    lines = 1 + max((str(text).count("\n") for text in chosen.to_numpy().ravel()), default=0)
    cells = n_rows * max(lines * LINE_HEIGHT + 0.08, min(room, 0.3), LINE_HEIGHT)
    heads = [str(name) for name in shape.columns]
    upright = max(map(text_width, heads), default=0.0) + 0.04 > room
    heads = [shorten(head, 1.0 if upright else room) for head in heads]
    above = max(map(text_width, heads), default=0.0) if upright else LINE_HEIGHT
    height = cells + above + (LINE_HEIGHT if titles[1] else 0) + _BAR + 0.1
    return _Plan(names, heads, upright, chosen, width, cells, height)


def _grid(
    coloured: pd.DataFrame,
    texts: list[pd.DataFrame],
    limits: Normalize,
    colours: Colormap,
    titles: tuple[str, str, str],
    as_text: Callable[[float], str],
    width: float,
) -> Figure:
    """Cells of one size, names at the left and above, the colour bar below."""
    if not coloured.size:
        raise ValueError("the figure needs a row and a column at least; the frame is empty")
    plan = _plan(coloured, texts, titles[:2], width)
    figure = canvas(plan.width, plan.height)
    axes = figure.add_subplot()
    _cells(axes, coloured, plan.texts, limits, colours)
    axes.set_xticks(np.arange(len(plan.heads)) + 0.5, plan.heads, rotation=90 if plan.upright else 0)
    axes.set_yticks(np.arange(len(plan.names)) + 0.5, plan.names)
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(shorten(titles[1], 0.6 * plan.width))
    axes.set_ylabel(titles[0] if text_width(titles[0]) <= plan.cells else "")
    axes.spines[:].set_visible(False)
    beyond = (limits.inverse(0.0) > coloured.min().min(), limits.inverse(1.0) < coloured.max().max())
    ends = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    bar = figure.colorbar(
        ScalarMappable(limits, colours), ax=axes, location="bottom", aspect=30, pad=0.02, extend=ends[beyond]
    )
    assert bar.solids is not None
    bar.solids.set_edgecolor("face")
    bar.outline.set_linewidth(0.4)
    bar.ax.xaxis.set_major_locator(MaxNLocator(4))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: as_text(value)))
    bar.set_label(shorten(titles[2], 0.6 * plan.width))
    return settle(figure)


def _widest(texts: pd.DataFrame) -> float:
    return max(text_width(line) for text in texts.to_numpy().ravel() for line in str(text).split("\n"))


def _cells(
    axes: Axes, coloured: pd.DataFrame, texts: pd.DataFrame, limits: Normalize, colours: Colormap
) -> None:
    numbers = coloured.to_numpy(float)
    known = np.isfinite(numbers)
    shades = colours(limits(numbers))
    squares, gaps = ([Rectangle((c, r), 1, 1) for r, c in np.argwhere(of)] for of in (known, ~known))
    axes.add_collection(PatchCollection(squares, facecolor=shades[known], edgecolor=INK, linewidth=0.2))
    axes.add_collection(
        PatchCollection(gaps, facecolor="none", edgecolor=INK, hatch="////", linewidth=0, alpha=0.5)
    )
    for row, column in np.argwhere(known) if texts.size else ():
        text, ink = str(texts.iat[row, column]), ink_on(tuple(shades[row, column]))
        axes.text(
            column + 0.5,
            row + 0.5,
            text,
            ha="center",
            va="center",
            color=ink,
            linespacing=1.1,
            in_layout=False,
        )
    axes.set_xlim(0, numbers.shape[1])
    axes.set_ylim(numbers.shape[0], 0)
