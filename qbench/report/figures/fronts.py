"""What quality costs: Pareto fronts against size, latency or calibration."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.typing import FillStyleType

from qbench.report.figures.labels import along, place
from qbench.report.figures.layout import (
    GREY,
    HANDLE,
    checked,
    error_bars,
    legend_below,
    marker_handle,
    nothing,
    reference,
    set_scale,
    shorten,
)
from qbench.report.figures.style import (
    COLUMN,
    INK,
    Look,
    canvas,
    look,
    settle,
    styled,
)

_POINTS = ["label", "scheme", "x", "y", "y_low", "y_high", "significant"]
_MOST_NAMED = 12  # algorithms; of more, those that have no part in the front go without a name


def on_front(x: pd.Series, y: pd.Series, lower_is_better: bool) -> pd.Series:
    """Whether no other point is at least as good in both and better in one; points that tie in both share their fate."""
    cost = (y if lower_is_better else -y).to_numpy(float)
    size = x.to_numpy(float)
    as_good = (size[:, None] <= size) & (cost[:, None] <= cost)
    better = (size[:, None] < size) | (cost[:, None] < cost)
    return pd.Series(~(as_good & better).any(axis=0), index=x.index)


@styled()
def pareto(
    points: pd.DataFrame,
    x: str,
    y: str,
    *,
    lower_is_better: bool = True,
    fp: float | None = None,
    names: Sequence[str] = (),
    width: float = COLUMN,
) -> Figure:
    """Quality against cost: the front as a step line with its members labelled, what is dominated hollow.

    Args:
        points: Columns label (the algorithm), scheme, x, y, y_low and y_high (NaN where unknown), significant (whether a
            point's place on the front is sure).
        x, y: What the axes show, with units.
        lower_is_better: Of y; less of x is always better.
        fp: The floating-point model's y.
        names: All algorithms of the report, for looks that are the same in all its figures.
    """
    rows = checked(points, _POINTS, ["x", "y"])
    height = 0.55 * width if width > COLUMN else 0.85 * width
    figure = canvas(width, height)
    axes = figure.add_subplot()
    axes.set_xlabel(shorten(x, 0.8 * width))
    axes.set_ylabel(shorten(y, 0.7 * height))
    if rows.empty:
        nothing(axes)
        return settle(figure)
    member = on_front(rows["x"], rows["y"], lower_is_better)
    looks = {name: look(name, [*names, *rows["label"]]) for name in dict.fromkeys(rows["label"])}
    axes.margins(0.12, 0.14)
    has_bars = _draw_points(axes, rows, member, looks)
    set_scale(axes, "x", rows["x"])
    set_scale(axes, "y", [*rows["y"], *([] if fp is None else [fp])])
    front = _front_line(axes, rows[member])
    handles, labels = _key(rows, member, looks, has_bars, width)
    level, level_label = reference(axes, fp)
    legend_below(figure, [*handles, *level], [*labels, *level_label])
    settle(figure)
    _label_front(axes, rows, member, front, fp)
    return figure


def _label_front(
    axes: Axes, rows: pd.DataFrame, member: pd.Series, front: np.ndarray, fp: float | None
) -> None:
    """Name the front's members; one that finds no room, in a dense cluster, stays without a name."""
    width = axes.figure.bbox.width / axes.figure.dpi
    texts = [shorten(text, 0.45 * width) for text in _titles(rows)[member]]
    at = axes.transData.transform(rows[["x", "y"]].to_numpy(float))
    lines = [axes.transData.transform(front)]
    room = axes.bbox
    for (x, y), ends in zip(at, rows[["y_low", "y_high"]].to_numpy(float), strict=True):
        # A bound may be missing, or have no place on a logarithmic axis.
        known = [
            axes.transData.transform((1.0, end))[1]
            for end in ends
            if end > 0 or axes.get_yscale() == "linear"
        ]
        lines.append(
            np.array([(x, np.clip(end, room.y0, room.y1)) for end in (*known, y) if np.isfinite(end)])
        )
    if fp is not None:
        lines.append(axes.get_yaxis_transform().transform([(0.0, fp), (1.0, fp)]))
    occupied = np.concatenate([_covered(at), *map(along, lines)])
    place(axes, at[member.to_numpy()], texts, occupied)


def _draw_points(axes: Axes, rows: pd.DataFrame, member: pd.Series, looks: dict[str, Look]) -> bool:
    """Full where a place on the front is sure, half where not, hollow where dominated; whether any has an interval."""
    bars = error_bars(rows["y"], rows["y_low"], rows["y_high"])
    for i, (x, y) in enumerate(rows[["x", "y"]].to_numpy(float)):
        mine, best = looks[rows["label"][i]], bool(member[i])
        colour = mine.colour if best else GREY
        fill: FillStyleType = "none" if not best else "full" if rows["significant"][i] else "left"
        if bars[:, i].any():
            ends = bars[:, i].reshape(2, 1)
            axes.errorbar(x, y, ends, fmt="none", ecolor=colour, elinewidth=0.7, capsize=1.5, zorder=2)
        axes.plot(
            [x], [y], mine.marker, color=colour, fillstyle=fill, markerfacecoloralt="none", markeredgewidth=0.9,
            zorder=4 if best else 3,
        )  # fmt: skip
    return bool(bars.any())


def _front_line(axes: Axes, front: pd.DataFrame) -> np.ndarray:
    """Draw what can be had for at most x, up to the right edge; returns its corners in data units."""
    best = front.drop_duplicates("x").sort_values("x")
    left, right = axes.get_xlim()
    xs = np.append(np.repeat(best["x"].to_numpy(float), 2)[1:], right)
    ys = np.repeat(best["y"].to_numpy(float), 2)
    axes.plot(xs, ys, color=INK, linewidth=0.9, alpha=0.55, zorder=2)
    axes.set_xlim(left, right)
    return np.stack([xs, ys], axis=1)


def _covered(at: np.ndarray) -> np.ndarray:
    """Pixels of markers: their middles and four places around."""
    around = np.array([(0, 0), (3, 3), (3, -3), (-3, 3), (-3, -3)])
    return (at[:, None] + around).reshape(-1, 2)


def _titles(rows: pd.DataFrame) -> pd.Series:
    """What tells the points apart: algorithm, scheme, or both."""
    label, scheme = rows["label"].astype(str), rows["scheme"].fillna("").astype(str)
    if scheme.nunique() == 1:
        return label
    return scheme if label.nunique() == 1 else (label + " " + scheme).str.strip()


def _key(
    rows: pd.DataFrame,
    member: pd.Series,
    looks: dict[str, Look],
    has_bars: bool,
    width: float,
) -> tuple[list[Artist], list[str]]:
    """What markers and lines mean: the algorithms, then what is special."""
    best = set(rows["label"][member])
    named = [name for name in looks if name in best or len(looks) <= _MOST_NAMED]
    handles: list[Artist] = []
    for name in named:
        mine = looks[name]
        handles.append(
            marker_handle(mine.marker, *((mine.colour, "full") if name in best else (GREY, "none")))
        )
    # Two columns, where the names would make a long one.
    room = 0.5 * width - HANDLE - 0.05 if len(named) > 8 else width
    labels = [shorten(name, room) for name in named]
    unsure = bool((member & ~rows["significant"].astype(bool)).any())
    if unsure:
        handles.append(marker_handle("o", INK, "left"))
        labels.append("front, not sure")
    if not member.all():
        handles.append(marker_handle("o", GREY, "none"))
        unnamed = len(looks) - len(named)
        labels.append(f"dominated, {unnamed} more" if unnamed else "dominated")
    handles.append(Line2D([], [], color=INK, linewidth=0.9, alpha=0.55))
    labels.append("front")
    if has_bars:
        handles.append(Line2D([], [], color=GREY, linestyle="none", marker="|", markersize=8))
        labels.append("95 % interval")
    return handles, labels
