"""What is left of a model's abilities, task by task."""

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.projections.polar import PolarAxes

from qbench.report.figures.layout import (
    FOCUS,
    GREY,
    checked,
    focus,
    legend_below,
    nothing,
    shorten,
)
from qbench.report.figures.style import COLUMN, DASHED, INK, Look, canvas, look_at, settle, styled

MOST = 1.1  # the radar's edge: a quantized model that is better than the original is so by chance


_MOST_LEVEL = 16  # tasks


@styled()
def retention_radar(frame: pd.DataFrame, *, width: float = COLUMN) -> Figure:
    """A polygon for each scheme over tasks; the dashed ring is the floating-point model.

    The eight schemes with the highest mean stand out of the others; a polygon is open where a task is missing.

    Args:
        frame: Columns scheme, task, retention (what is above 1.1 is drawn at 1.1); one row of each scheme
            and task.

    Raises:
        ValueError: If a scheme has a task twice.
    """
    checked(frame, ["scheme", "task", "retention"], ["retention"])
    if (twice := frame.duplicated(["scheme", "task"])).any():
        scheme, task = frame.loc[twice, ["scheme", "task"]].iloc[0]
        raise ValueError(f"{scheme} has {task} twice; name schemes and tasks by all that tells them apart")
    table = frame.pivot(index="scheme", columns="task", values="retention")
    table = table.reindex(index=frame["scheme"].unique(), columns=frame["task"].unique())
    table = table.astype(float).where(np.isfinite(table.astype(float)))
    side = min(0.72 * width if table.shape[1] <= _MOST_LEVEL else width, 4.2)
    figure = canvas(width, side)
    if table.notna().sum().sum() == 0:
        nothing(figure.add_subplot())
        return settle(figure)
    axes = figure.add_subplot(projection="polar")
    assert isinstance(axes, PolarAxes)
    means = table.mean(axis=1)
    schemes = [str(s) for s in table.index]
    shown = focus(schemes, dict(zip(schemes, -means.to_numpy(), strict=True)), FOCUS)
    angles = np.arange(table.shape[1]) * 2 * np.pi / table.shape[1]
    handles: list[Artist] = []
    labels: list[str] = []
    for scheme, values in zip(schemes, table.to_numpy(), strict=True):
        if scheme not in shown:
            _polygon(axes, angles, values, Look(GREY, "", "-"), 0.6)
            continue
        handles.append(_polygon(axes, angles, values, look_at(shown.index(scheme)), 1.2))
        known = int(np.isfinite(values).sum())
        missing = f", {known} of {len(values)} tasks" if known < len(values) else ""
        labels.append(
            f"{scheme} (mean {np.nanmean(values):.2f}{missing})" if known else f"{scheme} (no values)"
        )
    if len(schemes) > len(shown):
        handles.append(Line2D([], [], color=GREY, linewidth=0.6))
        labels.append(f"{len(schemes) - len(shown)} others, lower in the mean")
    _rings(axes, angles, [str(task) for task in table.columns], width)
    legend_below(figure, handles, labels)
    # Round axes shrink as their surroundings grow: the first arrangement is not the last.
    figure.draw_without_rendering()
    return settle(figure)


def _polygon(axes: PolarAxes, angles: np.ndarray, values: np.ndarray, style: Look, width: float) -> Line2D:
    """Draw one scheme."""
    closed = np.minimum(np.append(values, values[0]), MOST)
    axes.plot(
        np.append(angles, angles[0]), closed, color=style.colour, linestyle=style.line, marker=style.marker,
        markersize=3.5, linewidth=width, clip_on=False, zorder=3 if style.marker else 2,
    )  # fmt: skip
    return Line2D([], [], color=style.colour, linestyle=style.line, marker=style.marker, markersize=3.5)


def _rings(axes: PolarAxes, angles: np.ndarray, tasks: list[str], width: float) -> None:
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    axes.set_ylim(0, MOST)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], ["", "0.5", "", "1"])
    between = np.pi / max(len(tasks), 2)
    axes.set_rlabel_position(float(np.degrees(between)))
    axes.spines["polar"].set_visible(False)
    around = np.linspace(0, 2 * np.pi, 200)
    axes.plot(around, np.ones(200), color=INK, linestyle=DASHED, linewidth=0.8, zorder=1)
    axes.set_xticks(angles, [""] * len(angles))
    for task, angle in zip(tasks, angles, strict=True):
        _name(axes, shorten(task, 0.24 * width), float(angle), len(tasks) > _MOST_LEVEL)


def _name(axes: PolarAxes, text: str, angle: float, along: bool) -> None:
    """Write a task's name outside the rings: level, or along its axis where there are many."""
    right, up = np.sin(angle), np.cos(angle)
    if along:
        turn = 90 - np.degrees(angle)
        axes.text(
            angle, MOST + 0.07, text, ha="left" if right > -1e-9 else "right", va="center", rotation_mode="anchor",
            rotation=turn if right > -1e-9 else turn + 180,
        )  # fmt: skip
        return
    across = "left" if right > 0.05 else "right" if right < -0.05 else "center"
    upright = "bottom" if up > 0.7 else "top" if up < -0.7 else "center"
    axes.text(angle, MOST + 0.07, text, ha=across, va=upright)
