"""Quality against bits, and how sensitive the parts of a model are."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from qbench.report.figures.layout import (
    GREY,
    LINE_HEIGHT,
    checked,
    focus,
    is_wide,
    legend_below,
    nothing,
    reference,
    set_scale,
    shorten,
    text_width,
)
from qbench.report.figures.style import COLUMN, INK, Look, canvas, look, look_at, settle, styled

_CURVES = ["algo", "bits", "value", "low", "high"]
_UNITS = ["unit", "bits", "kl", "kl_stderr"]
_MOST_NAMED = 40  # units; more go along x, where only blocks are named


@styled()
def bits_curves(
    frame: pd.DataFrame,
    value: str,
    *,
    lower_is_better: bool = True,
    fp: float | None = None,
    names: Sequence[str] = (),
    width: float = COLUMN,
) -> Figure:
    """A metric against bits, a curve with a band for each algorithm; the best eight stand out of the others.

    Args:
        frame: Columns algo, bits, value, low and high (NaN where unknown).
        value: What the vertical axis shows.
        fp: The floating-point model's value.
        names: All algorithms of the report, for looks that are the same in all its figures.
    """
    rows = checked(frame, _CURVES, ["bits", "value"]).sort_values("bits", kind="stable")
    height = 0.5 * width if width > COLUMN else 0.78 * width
    figure = canvas(width, height)
    axes = figure.add_subplot(xlabel="bits a weight", ylabel=shorten(value, 0.7 * height))
    if rows.empty:
        nothing(axes)
        return settle(figure)
    axes.margins(0.05, 0.08)
    drawn = list(dict.fromkeys(rows["algo"]))
    ranks = rows.groupby("bits")["value"].rank(ascending=lower_is_better)
    shown = focus(drawn, {algo: float(ranks[rows["algo"] == algo].mean()) for algo in drawn})
    handles: list[Artist] = []
    for algo, mine in rows.groupby("algo", sort=False):
        if algo in shown:
            handles.append(_curve(axes, mine, look(str(algo), [*names, *drawn])))
        else:
            axes.plot(mine["bits"], mine["value"], color=GREY, linewidth=0.6, alpha=0.7, zorder=1)
    labels = list(shown)
    if len(drawn) > len(shown):
        handles.append(Line2D([], [], color=GREY, linewidth=0.6, alpha=0.7))
        labels.append(f"{len(drawn) - len(shown)} others, worse in the mean rank")
    level, level_label = reference(axes, fp)
    set_scale(axes, "y", [*rows["value"], *([] if fp is None else [fp])])
    _name_bits(axes, np.unique(rows["bits"].to_numpy(float)), width)
    legend_below(figure, [*handles, *level], [*labels, *level_label])
    return settle(figure)


def _name_bits(axes: Axes, bits: np.ndarray, width: float) -> None:
    """Put ticks where there are values, if their numbers have room."""
    names = [f"{b:.3g}" for b in bits]
    room = 0.75 * width * np.diff(bits).min(initial=np.inf) / max(np.ptp(bits), 1e-9)
    if max(map(text_width, names)) + 0.05 < room:
        axes.set_xticks(list(bits), names)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))


def _curve(axes: Axes, mine: pd.DataFrame, style: Look) -> Line2D:
    """Draw one curve and its band."""
    known = mine[["low", "high"]].notna().all(axis=1)
    if known.any():
        axes.fill_between(
            mine["bits"], mine["low"].where(known), mine["high"].where(known), color=style.colour, alpha=0.18,
            linewidth=0, zorder=1,
        )  # fmt: skip
    (line,) = axes.plot(
        mine["bits"], mine["value"], color=style.colour, linestyle=style.line, marker=style.marker, markersize=4.5,
        zorder=3,
    )  # fmt: skip
    return Line2D([], [], color=line.get_color(), linestyle=style.line, marker=style.marker, markersize=4.5)


@styled()
def layer_sensitivity(
    frame: pd.DataFrame, value: str = "KL, nats a token", *, width: float = COLUMN
) -> Figure:
    """How much quantizing each unit alone changes what the model says, with standard errors, for each width.

    Up to 40 units are listed; more go along the horizontal axis, where the first unit of a block bears its name.

    Args:
        frame: Columns unit (`block.layer`, in the model's order), bits, kl, kl_stderr (NaN where unknown).
    """
    rows = checked(frame, _UNITS, ["bits", "kl"])
    units = list(dict.fromkeys(frame["unit"].astype(str)))
    down = len(units) <= _MOST_NAMED
    height = max(1.2, len(units) * LINE_HEIGHT + 0.5) if down else max(0.4 * width, 2.2)
    figure = canvas(width, height)
    axes = figure.add_subplot()
    if rows.empty:
        nothing(axes)
        return settle(figure)
    widths = sorted(rows["bits"].unique())
    positive = rows["kl"][rows["kl"] > 0]
    log = is_wide(positive)
    floor = float(positive.min()) / 1.6 if log else -np.inf
    handles: list[Artist] = []
    for i, bits in enumerate(widths):
        mine = rows[rows["bits"] == bits]
        shift = (i - (len(widths) - 1) / 2) * min(0.25, 0.7 / len(widths))
        places = np.array([units.index(str(u)) for u in mine["unit"]]) + shift
        handles.append(_dots(axes, mine, places, look_at(i), down, floor))
    set_scale(axes, "x" if down else "y", positive if log else rows["kl"])
    _name_units(axes, units, down, width)
    _name_axes(axes, units, down, value, (width, height))
    labels = [f"{bits:g} bits" for bits in widths]
    if log and (rows["kl"] <= 0).any():
        handles.append(
            Line2D([], [], color=INK, linestyle="none", marker="o", fillstyle="none", markersize=4.0)
        )
        labels.append("0 or less")
    legend_below(figure, handles, labels)
    return settle(figure)


def _dots(
    axes: Axes, mine: pd.DataFrame, places: np.ndarray, style: Look, down: bool, floor: float
) -> Line2D:
    """Draw one width; a value that a logarithm has no place for stands hollow at the edge."""
    kl = mine["kl"].to_numpy(float)
    error = np.nan_to_num(mine["kl_stderr"].to_numpy(float))
    inside = kl > 0 if np.isfinite(floor) else np.full(len(kl), True)
    error = np.stack([np.minimum(error, np.maximum(kl - floor, 0)) if np.isfinite(floor) else error, error])
    at = np.where(inside, kl, floor)
    error = np.where(inside, error, 0.0)
    xs, ys = (at, places) if down else (places, at)
    across, up = (error, None) if down else (None, error)
    axes.errorbar(xs, ys, up, across, fmt="none", ecolor=style.colour, elinewidth=0.7, zorder=2)
    size = 4.0 if down else 3.0
    axes.plot(xs[inside], ys[inside], style.marker, color=style.colour, markersize=size, zorder=3)
    axes.plot(xs[~inside], ys[~inside], style.marker, color=style.colour, markersize=size, fillstyle="none")
    return Line2D([], [], color=style.colour, linestyle="none", marker=style.marker, markersize=4.0)


def _name_axes(axes: Axes, units: Sequence[str], down: bool, value: str, size: tuple[float, float]) -> None:
    if down:
        axes.set_xlabel(shorten(value, 0.62 * size[0]))
        return
    axes.set_ylabel(shorten(value, 0.65 * size[1]))
    axes.set_xlabel("block" if all("." in unit for unit in units) else "unit")


def _name_units(axes: Axes, units: Sequence[str], down: bool, width: float) -> None:
    axes.grid(axis="y" if down else "x")
    if down:
        axes.set_yticks(range(len(units)), [shorten(unit, 0.38 * width) for unit in units])
        axes.set_ylim(len(units) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        return
    blocks = [unit.partition(".")[0] for unit in units]
    first = [i for i in range(len(units)) if i == 0 or blocks[i] != blocks[i - 1]]
    widest = max(text_width(block) for block in blocks)
    room = max(1, int((width - 0.8) / (min(widest, 0.5) + 0.12)))
    chosen = first[:: -(-len(first) // room)]
    axes.set_xticks(chosen, [shorten(blocks[i], 0.5) for i in chosen])
    axes.set_xlim(-1, len(units))
