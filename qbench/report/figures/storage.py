"""Models of different sizes at equal storage: is a large one in few bits better than a small one in many?"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.typing import LineStyleType

from qbench.report.figures.layout import (
    HANDLE,
    checked,
    error_bars,
    legend_below,
    marker_handle,
    nothing,
    set_scale,
    shorten,
)
from qbench.report.figures.style import COLUMN, INK, LINES, MARKERS, canvas, look_at, settle, styled

_STORED = ["model", "scheme", "bytes", "value", "low", "high"]


@styled()
def equal_storage(
    points: pd.DataFrame, value: str, *, names: Sequence[str] = (), width: float = COLUMN
) -> Figure:
    """Quality against stored bytes: a line for each model over its schemes.

    Args:
        points: Columns model, scheme, bytes, value, low and high (NaN where unknown).
        value: What the vertical axis shows.
        names: All models of the report, for looks that are the same in all its figures.
    """
    rows = checked(points, _STORED, ["bytes", "value"]).sort_values("bytes", kind="stable")
    height = 0.55 * width if width > COLUMN else 0.85 * width
    figure = canvas(width, height)
    axes = figure.add_subplot()
    unit, factor = ("GB", 1e9) if rows["bytes"].max() >= 1e9 else ("MB", 1e6)
    axes.set_xlabel(f"stored size, {unit}")
    axes.set_ylabel(shorten(value, 0.7 * height))
    if rows.empty:
        nothing(axes)
        return settle(figure)
    rows["size"] = rows["bytes"] / factor
    models = sorted({*names, *rows["model"]})
    schemes = list(dict.fromkeys(points["scheme"]))
    shapes = {scheme: MARKERS[i % len(MARKERS)] for i, scheme in enumerate(schemes)}
    handles: list[Artist] = []
    labels: list[str] = []
    axes.margins(0.06, 0.08)
    for model, mine in rows.groupby("model", sort=True):
        at = models.index(model)
        colour, line = look_at(at).colour, LINES[at % len(LINES)]
        _model(axes, mine, colour, line, shapes)
        handles.append(Line2D([], [], color=colour, linestyle=line))
        labels.append(shorten(str(model), 0.5 * width - HANDLE - 0.05 if len(models) > 8 else width))
    for scheme in (s for s in schemes if s in set(rows["scheme"])):
        handles.append(marker_handle(shapes[scheme], INK, "none"))
        labels.append(str(scheme))
    set_scale(axes, "x", rows["size"])
    set_scale(axes, "y", rows["value"])
    legend_below(figure, handles, labels)
    return settle(figure)


def _model(axes: Axes, mine: pd.DataFrame, colour: str, line: LineStyleType, shapes: dict[str, str]) -> None:
    """Draw one model's line, with a marker for each scheme."""
    axes.plot(mine["size"], mine["value"], color=colour, linestyle=line, zorder=2)
    bars = error_bars(mine["value"], mine["low"], mine["high"])
    if bars.any():
        axes.errorbar(
            mine["size"], mine["value"], bars, fmt="none", ecolor=colour, elinewidth=0.7, capsize=1.5
        )
    for size, y, scheme in zip(mine["size"], mine["value"], mine["scheme"], strict=True):
        axes.plot([size], [y], shapes[scheme], color=colour, zorder=3)
