"""Labels beside points: where they cover neither each other nor, as far as there is room, what is drawn."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from qbench.report.figures.style import INK

_DISTANCES = (4, 8, 14, 22, 32, 44, 58, 74)  # points between a marker's middle and a label's edge
_ANGLES = np.arange(16) * np.pi / 8
_LINK = 12  # points: from this distance a thin line leads to the label
_STEP = 3.0  # pixels between the places of a line that a label should not cover


def along(corners: np.ndarray) -> np.ndarray:
    """Places along a line through corners, shape `(n, 2)`, in pixels."""
    pieces = [
        np.linspace(start, end, max(2, int(np.hypot(*(end - start)) / _STEP)))
        for start, end in pairwise(corners)
    ]
    return np.concatenate(pieces) if pieces else np.empty((0, 2))


def place(axes: Axes, points: np.ndarray, texts: Sequence[str], occupied: np.ndarray) -> list[Annotation]:
    """Label points; one that finds no room stays without a label.

    Expects that the figure is settled.

    Args:
        points: In pixels, shape `(n, 2)`.
        occupied: Places that labels should not cover, in pixels, shape `(m, 2)`.
    """
    canvas = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    unit = axes.figure.dpi / 72
    whole = np.array(
        [axes.figure.bbox.width, axes.figure.bbox.height]
    )  # pixels change with the file's resolution
    room = axes.get_window_extent(renderer)
    placed: list[Annotation] = []
    boxes: list[Bbox] = []
    for point, text in zip(points, texts, strict=True):
        label = axes.annotate(
            text, tuple(point / whole), xycoords="figure fraction", xytext=(0.0, 0.0), textcoords="offset points",
            ha="center", va="center", annotation_clip=False, in_layout=False,
        )  # fmt: skip
        extent = label.get_window_extent(renderer)
        found = _best(point, (extent.width, extent.height), unit, room, boxes, occupied)
        if found is None:
            label.remove()
            continue
        offset, distance = found
        label.set_position((offset[0] / unit, offset[1] / unit))
        box = label.get_window_extent(renderer)
        boxes.append(box)
        placed.append(label)
        if distance >= _LINK:
            end = np.clip(point, box.min, box.max)
            occupied = np.concatenate([occupied, along(np.stack([point, end]))])
            _link(axes, point / whole, end / whole)
    return placed


def _best(
    point: np.ndarray,
    size: tuple[float, float],
    unit: float,
    room: Bbox,
    taken: Sequence[Bbox],
    occupied: np.ndarray,
) -> tuple[np.ndarray, float] | None:
    """Offset of the label's middle in pixels, and its distance in points; the near ones that cover little are best."""
    best, least = None, np.inf
    half = np.array(size) / 2
    for distance in _DISTANCES:
        for angle in _ANGLES:
            direction = np.array([np.cos(angle), np.sin(angle)])
            offset = direction * (distance * unit + half)
            box = Bbox([point + offset - half, point + offset + half]).padded(1.0 * unit)
            if not (room.x0 <= box.x0 and room.y0 <= box.y0 and box.x1 <= room.x1 and box.y1 <= room.y1):
                continue
            if any(box.overlaps(other) for other in taken):
                continue
            link = along(np.stack([point, np.clip(point, box.min, box.max)]))
            crossed = sum(other.count_contains(link) for other in taken)
            cost = distance + 5 * box.count_contains(occupied) + 20 * crossed
            if cost < least:
                best, least = (offset, float(distance)), cost
    return best


def _link(axes: Axes, start: np.ndarray, end: np.ndarray) -> None:
    axes.annotate(
        "", tuple(start), xycoords="figure fraction", xytext=tuple(end), textcoords="figure fraction", in_layout=False,
        annotation_clip=False,
        arrowprops={"arrowstyle": "-", "lw": 0.4, "color": INK, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3},
    )  # fmt: skip
