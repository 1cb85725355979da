"""One look for all figures, and their files.

Colours are those of Okabe and Ito ("Color Universal Design", 2008) without yellow, which is too light for lines, and black,
which is the ink. Every colour comes with a marker and a line style, so that figures can be read in black-and-white print.
"""

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.typing import LineStyleType

COLUMN, FULL = 3.4, 7.0  # inches: one column of a page, and both
SIZE = 8.0  # points: all text
INK = "#1a1b1c"  # text, axes and references; nothing else has this colour, so that a page can replace it
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h")
LINES: tuple[LineStyleType, ...] = (
    "-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1.2)), (0, (8, 2, 2, 2)), (0, (3, 1, 1, 1, 1, 1)),
)  # fmt: skip
DASHED: LineStyleType = (0, (4, 3))  # of references

_PLACES = len(COLOURS) * len(MARKERS)
# Their order is their look: adding a name in the middle would change those behind it.
_KNOWN = (
    "rtn", "gptq", "awq", "omniquant", "smoothquant", "quarot_gptq", "hqq", "spinquant_gptq", "tesseraq", "autoround",
    "quip", "spqr", "llm_int8", "osplus", "quarot", "spinquant", "awq_gptq", "smoothquant_gptq", "awq_omniquant",
    "awq_tesseraq", "slimllm", "slimllm_plus", "easyquant", "zeroquant", "zeroquant_lkd", "owq", "quik", "dgq", "mse",
    "adadim", "normtweaking", "lora", "llmc_best_practice_w2", "llmc_best_practice_w3", "llmc_best_practice_w4",
    "llmc_best_practice_w4a4", "llmc_best_practice_w8a8",
)  # fmt: skip

_RC: dict[str, Any] = {
    "font.size": SIZE, "axes.labelsize": SIZE, "axes.titlesize": SIZE, "legend.fontsize": SIZE,
    "xtick.labelsize": SIZE, "ytick.labelsize": SIZE, "figure.titlesize": SIZE,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "hatch.color": INK, "grid.color": INK, "grid.alpha": 0.15,
    "axes.linewidth": 0.6, "grid.linewidth": 0.5, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4, "ytick.minor.width": 0.4, "xtick.major.size": 3, "ytick.major.size": 3,
    "xtick.minor.size": 1.5, "ytick.minor.size": 1.5, "hatch.linewidth": 0.5, "lines.linewidth": 1.2,
    "lines.markersize": 5.5, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "svg.fonttype": "none", "svg.hashsalt": "qbench", "pdf.fonttype": 42, "text.parse_math": False,
    "figure.constrained_layout.h_pad": 0.03, "figure.constrained_layout.w_pad": 0.03,
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    colour: str
    marker: str
    line: LineStyleType


def look_at(place: int) -> Look:
    """The look of one place in a list.

    Six in a row have different colours, markers and lines; 36 different pairs of colour and line, 72 of colour and marker.
    """
    n, place = len(COLOURS), place % _PLACES
    around = place // n
    return Look(
        COLOURS[place % n],
        MARKERS[(place + around // 2) % len(MARKERS)],
        LINES[(place + around) % len(LINES)],
    )


def look(name: str, names: Sequence[str]) -> Look:
    """An algorithm's look, the same in all figures.

    Args:
        names: All algorithms of the report. Those that come with qbench have a place of their own; others take those behind
            in alphabetical order.
    """
    if name == "fp":
        return Look(INK, "d", DASHED)
    if name in _KNOWN:
        return look_at(_KNOWN.index(name))
    others = sorted({*names, name} - {*_KNOWN, "fp"})
    # From the next whole round on, so that the first six of the others differ in colour, marker and line.
    start = -(-len(_KNOWN) // len(COLOURS)) * len(COLOURS)
    return look_at(start + others.index(name) % (_PLACES - start))


@contextmanager
def styled() -> Iterator[None]:
    """Draw with this look, whatever a matplotlibrc of the user says; settings are as before afterwards."""
    with matplotlib.style.context(["default", _RC]):
        yield


def canvas(width: float, height: float) -> Figure:
    """An empty figure, in inches, that arranges its parts."""
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def settle(figure: Figure) -> Figure:
    """Arrange the parts once and for all, so that every drawing of the figure is the same."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem` with .svg, .pdf and .png added: equal figures give equal bytes."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    unnamed: dict[str, dict[str, Any]] = {
        "svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None},
    }  # fmt: skip
    paths = []
    with styled():
        for suffix, metadata in unnamed.items():
            path = stem.with_name(f"{stem.name}.{suffix}")
            figure.savefig(path, format=suffix, metadata=metadata, dpi=200)
            paths.append(path)
    return paths


def inline_svg(figure: Figure, title: str, prefix: str) -> str:
    """An `<svg>` element for an HTML page: transparent, and its ink is the page's text colour.

    Args:
        title: What the figure shows, for those who do not see it.
        prefix: Begins all ids; must be unique within the page.
    """
    buffer = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with styled():
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    # Within a page, a rule for `*` would reach everything.
    svg = svg.replace("<style", "<style", 1).replace(">*{", f">#{prefix} *{{")
    described = f'<svg id="{prefix}" role="img" aria-labelledby="{prefix}-title" style="max-width: 100%; height: auto"'
    svg = svg.replace("<svg", described, 1)
    end = svg.index(">") + 1
    return f'{svg[:end]}\n <title id="{prefix}-title">{html.escape(title)}</title>{svg[end:]}'
