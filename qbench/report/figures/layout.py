"""What the figures share: columns checked, axes scaled, legends below, names cut to the room there is."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.typing import FillStyleType

from qbench.report.figures.style import DASHED, INK, SIZE

LINE_HEIGHT = SIZE * 1.4 / 72  # inches
FOCUS = 8  # curves that can be told apart in one figure; others are grey
HANDLE = 0.5  # inches: a legend's handle, the space behind it, and that between columns
GREY = "#8c8c8c"  # readable on white and on black


def checked(frame: pd.DataFrame, needed: Sequence[str], finite: Sequence[str]) -> pd.DataFrame:
    """The rows whose values can be drawn: those of the columns `finite`.

    Raises:
        ValueError: If a column is missing.
    """
    if missing := [name for name in needed if name not in frame]:
        raise ValueError(f"the figure needs the columns {', '.join(needed)}; {', '.join(missing)} is missing")
    known = np.isfinite(frame[list(finite)].to_numpy(float)).all(axis=1)
    return frame.loc[known].reset_index(drop=True)


def text_width(text: str) -> float:
    """Of one line, in inches."""
    width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=SIZE), ismath=False)
    return float(width) / 72


def shorten(text: str, inches: float) -> str:
    """Cut the middle out of a text that is wider than the room."""
    if text_width(text) <= inches:
        return text
    for kept in range(len(text) - 1, 1, -1):
        cut = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
        if text_width(cut) <= inches:
            return cut
    return "…"


def is_wide(values: Iterable[float]) -> bool:
    """Whether positive values span more than a decade."""
    finite = np.array([v for v in values if np.isfinite(v)], dtype=float)
    return bool(len(finite) and finite.min() > 0 and finite.max() / finite.min() > 10)


def set_scale(axes: Axes, which: str, values: Iterable[float], n_ticks: int = 5) -> bool:
    """Logarithmic where values span more than a decade, with plain numbers at the ticks; returns whether it is."""
    axis: Axis = axes.xaxis if which == "x" else axes.yaxis
    finite = np.array([v for v in values if np.isfinite(v)], dtype=float)
    set_kind: Callable[[str], Any] = axes.set_xscale if which == "x" else axes.set_yscale
    if not is_wide(finite):
        axis.set_major_locator(MaxNLocator(n_ticks, min_n_ticks=2))
        axis.set_major_formatter(FuncFormatter(_plain))
        return False
    set_kind("log")
    decades = float(np.log10(finite.max() / finite.min()))
    subs = (1.0, 2.0, 5.0) if decades < 1.5 else (1.0, 3.0) if decades < 2.5 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=max(n_ticks, 3) if decades > 2.5 else 12))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_locator(LogLocator(subs=range(2, 10)) if decades < 5 else NullLocator())
    axis.set_minor_formatter(NullFormatter())
    return True


def _plain(value: float, _: int | None = None) -> str:
    """A tick's number: no offset, no more digits than it has."""
    if value and not 1e-4 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.3e}".split("e")
        digits = mantissa.rstrip("0").rstrip(".")
        return f"{digits}e{int(exponent)}".replace("-", "−")
    return f"{value:.6g}".replace("-", "−")


def legend_below(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """Add a legend under the axes, in as many columns as fit, and the height that it takes to the figure."""
    if not handles:
        return
    width, height = figure.get_size_inches()
    shown = [shorten(label, width - HANDLE - 0.1) for label in labels]
    widths = [text_width(label) + HANDLE for label in shown]
    fitting = [n for n in range(2, len(shown) + 1) if _taken(widths, n) <= width - 0.1]
    columns = max(fitting, default=1)
    rows = -(-len(shown) // columns)
    figure.set_size_inches(width, height + rows * LINE_HEIGHT + 0.1)
    figure.legend(
        handles, shown, loc="outside lower center", ncols=-(-len(shown) // rows), handlelength=2.2,
        handletextpad=0.5, columnspacing=1.0, labelspacing=0.3, borderpad=0.2,
    )  # fmt: skip


def _taken(widths: Sequence[float], n: int) -> float:
    """Width of a legend of n columns, which are as wide as their widest entries."""
    return float(sum(max(part) for part in np.array_split(np.array(widths), n)))


def marker_handle(marker: str, colour: str, fill: FillStyleType) -> Line2D:
    """For a legend."""
    return Line2D(
        [], [], marker=marker, color=colour, linestyle="none", fillstyle=fill, markerfacecoloralt="none",
        markeredgewidth=0.9,
    )  # fmt: skip


def reference(axes: Axes, fp: float | None) -> tuple[list[Artist], list[str]]:
    """Draw the floating-point model's level, where it is known; returns what the legend needs."""
    if fp is None:
        return [], []
    line = axes.axhline(fp, color=INK, linestyle=DASHED, linewidth=0.8, zorder=1)
    return [line], [f"floating point, {fp:.4g}"]


def nothing(axes: Axes) -> None:
    """Say that there is nothing to show, where all values are missing."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", va="center")


def error_bars(values: pd.Series, low: pd.Series, high: pd.Series) -> np.ndarray:
    """Lengths down and up, shape `(2, n)`; 0 where a bound is missing."""
    down = (values - low.astype(float)).clip(lower=0).fillna(0)
    up = (high.astype(float) - values).clip(lower=0).fillna(0)
    return np.stack([down.to_numpy(float), up.to_numpy(float)])


def focus(names: Sequence[str], scores: dict[str, float], n: int = FOCUS) -> list[str]:
    """The `n` names with the lowest scores, in their own order; NaN is last."""
    order = sorted(names, key=lambda name: (np.isnan(scores[name]), scores[name], name))
    return [name for name in names if name in order[:n]]
