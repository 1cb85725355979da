"""Figures: equal data give equal files, and what is drawn can be read by all, in colour and in print."""

import os
import re
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Annotation, Text

from qbench.report.figures import style
from qbench.report.figures.curves import bits_curves, layer_sensitivity
from qbench.report.figures.fronts import on_front, pareto
from qbench.report.figures.grids import contrast, correlation_map, heat_map, ink_on
from qbench.report.figures.radar import retention_radar
from qbench.report.figures.storage import equal_storage
from qbench.report.figures.wins import wins_matrix

ALGORITHMS = sorted(p.stem for p in (Path(__file__).parents[1] / "conf" / "algo").glob("*.yaml"))
LONG = "an_algorithm_whose_name_is_much_longer_than_any_column_is_wide_$_and_%_and_<&>"
NAN = float("nan")
# What separates two colours that are just told apart side by side, in CIE 1976 units (Mahy et al. 1994).
JUST_NOTICEABLE = 2.3


def spread(case, n, seed=0):
    """Values of n points: `one`, `ties`, `missing` in part or `wild` over many decades."""
    rng = np.random.default_rng(seed)
    if case == "ties":
        return np.full(n, 7.0)
    if case == "wild":
        return 10.0 ** rng.uniform(-7, 9, n)
    values = rng.uniform(5, 9, n)
    if case == "missing":
        values[::3] = np.nan
    return np.full(n, np.nan) if case == "nothing" else values


def names(case):
    if case == "one":
        return ["gptq"]
    return (
        [*ALGORITHMS[:20], LONG, *(f"{LONG[:40]}{i}" for i in range(9))] if case == "wild" else ALGORITHMS[:7]
    )


def grid(case, seed=0):
    """Names by widths, as columns: who, bits, value, low, high."""
    who, bits = names(case), [4] if case == "one" else [2, 3, 4, 8]
    n = len(who) * len(bits)
    value = spread(case, n, seed)
    return pd.DataFrame(
        {"who": np.repeat(who, len(bits)), "bits": np.tile(bits, len(who)), "value": value, "low": value * 0.9,
         "high": np.where(np.arange(n) % 4, value * 1.1, np.nan)},
    )  # fmt: skip


def scheme_of(bits):
    return [f"w{b}a16g128" for b in bits]


def draw_pareto(case, **more):
    f = grid(case)
    points = pd.DataFrame(
        {"label": f["who"], "scheme": scheme_of(f["bits"]), "x": spread(case, len(f), 1), "y": f["value"],
         "y_low": f["low"], "y_high": f["high"], "significant": f.index % 2 == 0},
    )  # fmt: skip
    return pareto(
        points, "stored size, MB", "perplexity on a text with a long name [512 x 32]", fp=6.5, **more
    )


def draw_storage(case, **more):
    f = grid(case).rename(columns={"who": "model"})
    return equal_storage(
        f.assign(scheme=scheme_of(f["bits"]), bytes=spread(case, len(f), 1) * 1e8), "accuracy", **more
    )


def draw_radar(case, **more):
    f = grid(case)
    f["value"] = (f["value"] - 5) / 4
    long = {"who": "scheme", "bits": "task"} if case != "wild" else {"who": "task", "bits": "scheme"}
    return retention_radar(f.rename(columns=long | {"value": "retention"}), **more)


def draw_bits(case, **more):
    return bits_curves(grid(case).rename(columns={"who": "algo"}), "perplexity", fp=6.5, **more)


def draw_layers(case, **more):
    blocks = {"one": 1, "wild": 28}.get(case, 3)
    units = [f"{b}.{layer}" for b in range(blocks) for layer in ("self_attn.q_proj", "mlp.down_proj")]
    kl = spread(case, 3 * len(units))
    kl[:1] *= -1  # the luck of few windows
    f = {"unit": units * 3, "bits": np.repeat([2, 3, 4], len(units)), "kl": kl, "kl_stderr": abs(kl) / 5}
    return layer_sensitivity(pd.DataFrame(f), **more)


def draw_heat(case, **more):
    who = names(case)
    values = pd.DataFrame(spread(case, 3 * len(who)).reshape(3, -1), index=["c4", LONG, "self"], columns=who)
    marks = pd.DataFrame(np.where(values > values.median().median(), "*", ""), values.index, who)
    return heat_map(values.T, (values / values.min() - 1).T, marks.T, **more)


def draw_correlation(case, **more):
    who = names(case)[-18:]
    values = np.clip((spread(case, len(who) ** 2).reshape(len(who), -1) - 7) / 2, -1, 1)
    return correlation_map(pd.DataFrame(values, who, who), **more)


def draw_wins(case, **more):
    who = names(case)
    pairs = [(a, b) for a in who for b in who if a != b] or [(who[0], "rtn")]
    counts = np.random.default_rng(0).integers(0, 5, (len(pairs), 3)).astype(float)
    counts[0] = 0
    counts[:, 0] *= np.where(np.isnan(spread(case, len(pairs))), np.nan, 1)
    return wins_matrix(
        pd.DataFrame(pairs, columns=["row", "column"]).assign(
            won=counts[:, 0], tied=counts[:, 1], lost=counts[:, 2]
        ),
        **more,
    )


DRAW = {
    "pareto": draw_pareto, "storage": draw_storage, "radar": draw_radar, "bits": draw_bits, "layers": draw_layers,
    "heat": draw_heat, "correlation": draw_correlation, "wins": draw_wins,
}  # fmt: skip
CASES = ["one", "usual", "ties", "missing", "nothing", "wild"]


def drawn_texts(figure):
    """All texts that a drawing of the figure shows."""
    found = []
    plain = Text.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", lambda self, *a, **k: (found.append(self), plain(self, *a, **k))[1])
        figure.canvas.draw()
    return [text for text in dict.fromkeys(found) if text.get_visible() and text.get_text().strip()]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", DRAW)
def test_a_figure_draws_whatever_the_data_and_its_text_is_inside_and_apart(kind, case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = DRAW[kind](case)
        texts = drawn_texts(figure)
    renderer = figure.canvas.get_renderer()
    boxes = {text: text.get_window_extent(renderer) for text in texts}
    whole = figure.bbox.padded(1)  # hinting moves the edge of a letter by up to a pixel
    for text, box in boxes.items():
        assert text.get_fontsize() >= 8
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1, text
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1, text
    for axes in figure.axes:
        for labels in (axes.get_xticklabels(), axes.get_yticklabels(), axes.texts):
            # The box of a text that is turned is larger than the text.
            level = [boxes[t].padded(-1) for t in labels if t in boxes and t.get_rotation() in (0, 90)]
            assert not any(a.overlaps(b) for i, a in enumerate(level) for b in level[:i])


@pytest.mark.parametrize(
    ("case", "width"),
    [("front", style.COLUMN), ("front", style.FULL), ("usual", style.FULL), ("wild", style.FULL)],
)
def test_labels_of_a_front_do_not_overlap(case, width):
    if case == "front":
        x = np.linspace(1, 4, 15)
        points = pd.DataFrame({"label": ALGORITHMS[:15], "scheme": "w3", "x": x, "y": 30 / x, "y_low": NAN, "y_high": NAN,
                               "significant": True})  # fmt: skip
        figure = pareto(points, "MB", "perplexity", width=width)
    else:
        figure = draw_pareto(case, width=width)
    renderer = figure.canvas.get_renderer()
    labels = [t for t in figure.axes[0].texts if isinstance(t, Annotation) and t.get_text()]
    boxes = [label.get_window_extent(renderer) for label in labels]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    # A front that has room is labelled in full.
    assert labels
    assert case != "front" or width < style.FULL or len(labels) == 15


SCRIPT = """
import sys
from pathlib import Path
from qbench.report.figures.style import save
from tests.test_figures import DRAW
for kind in sys.argv[2:]:
    save(DRAW[kind]("usual"), Path(sys.argv[1]) / kind)
"""


def test_equal_data_give_equal_files_in_every_process(tmp_path):
    kinds = ["pareto", "heat", "wins"]  # labels that are placed, a colour bar, hatches
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "b"), *kinds]
    root = Path(__file__).parents[1]
    subprocess.run(command, check=True, cwd=root, env=os.environ | {"PYTHONHASHSEED": "7"})
    for kind in kinds:
        paths = style.save(DRAW[kind]("usual"), tmp_path / "a" / kind)
        assert [p.suffix for p in paths] == [".svg", ".pdf", ".png"]
        for path in paths:
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_settings_of_the_user_do_not_change_a_figure_and_are_left_alone(tmp_path):
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        theirs = style.inline_svg(draw_bits("usual"), "t", "p")
        assert dict(matplotlib.rcParams) == before
    assert theirs == style.inline_svg(draw_bits("usual"), "t", "p")


@pytest.mark.parametrize("kind", DRAW)
def test_an_inline_figure_keeps_to_itself_and_takes_the_colour_of_the_page(kind):
    figure = DRAW[kind]("usual")
    svg = style.inline_svg(figure, "a < b & c", "one")
    assert svg == style.inline_svg(figure, "a < b & c", "one")
    root = ET.fromstring(svg)
    assert svg.startswith("<svg")
    assert root.get("role") == "img"
    title = root[0]
    assert title.text == "a < b & c"
    assert root.get("aria-labelledby") == title.get("id")
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(set(ids)) == len(ids)
    assert all(i == "one" or i.startswith("one-") for i in ids)
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg)) <= set(ids)
    assert style.INK not in svg
    assert "currentColor" in svg
    (sheet,) = (e for e in root.iter() if e.tag.endswith("style"))
    assert sheet.text.startswith("#one ")
    assert "<text" in svg  # letters, not their outlines


# Machado, Oliveira & Fernandes 2009, severity 1.0; for linear RGB.
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}  # fmt: skip


def lab(colour, seen=None):
    """CIE 1976 coordinates of a colour as it is seen."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear if seen is None else np.array(seen) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ linear / to_xyz.sum(axis=1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("seen", [None, *BLINDNESS.values()], ids=["all", *BLINDNESS])
def test_colours_are_told_apart_by_all(seen):
    """Apart on a page, not side by side: several times what is just noticeable."""
    places = [lab(colour, seen) for colour in style.COLOURS]
    distances = [np.linalg.norm(a - b) for i, a in enumerate(places) for b in places[:i]]
    assert min(distances) >= 5 * JUST_NOTICEABLE


def test_looks_differ_in_marker_and_line_where_they_share_a_colour():
    looks = [style.look_at(i) for i in range(36)]
    for i, a in enumerate(looks):
        for b in looks[:i]:
            assert a.colour != b.colour or (a.marker != b.marker and a.line != b.line)
    for of in ("colour", "marker", "line"):
        assert len({getattr(one, of) for one in looks[:6]}) == 6


def test_every_algorithm_has_one_look_whatever_others_there_are():
    others = [f"mine{i}" for i in range(30)]
    for name in ALGORITHMS:
        if name != "custom":
            assert style.look(name, []) == style.look(name, [*ALGORITHMS, *others])
    looks = [style.look(name, [*ALGORITHMS, *others[:20]]) for name in [*ALGORITHMS, *others[:20]]]
    assert len({(one.colour, one.marker) for one in looks}) == len(looks)
    assert [style.look(n, others) for n in others] == [style.look(n, others[::-1]) for n in others]


@pytest.mark.parametrize("draw", [draw_heat, draw_correlation])
def test_text_in_cells_can_be_read(draw):
    axes = draw("usual", width=style.FULL).axes[0]
    cells = axes.collections[0]
    places = [path.get_extents() for path in cells.get_paths()]
    assert axes.texts
    for text in axes.texts:
        (behind,) = (i for i, box in enumerate(places) if box.contains(*text.get_position()))
        # WCAG 2, level AA.
        assert contrast(to_rgb(text.get_color()), tuple(cells.get_facecolor()[behind])) >= 4.5


def test_black_or_white_can_be_read_on_any_colour():
    for colour in np.random.default_rng(0).uniform(0, 1, (500, 3)):
        assert contrast(to_rgb(ink_on(tuple(colour))), tuple(colour)) >= 4.5
    assert contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)


def test_a_missing_cell_is_hatched():
    axes = heat_map(pd.DataFrame([[1.0, NAN]], columns=["a", "b"])).axes[0]
    of_values, of_gaps = axes.collections
    assert [len(c.get_paths()) for c in (of_values, of_gaps)] == [1, 1]
    assert of_gaps.get_hatch()
    assert [t.get_text() for t in axes.texts] == ["1"]


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_the_front_is_what_nothing_dominates(lower_is_better):
    rng = np.random.default_rng(0)
    x, y = (pd.Series(rng.integers(0, 6, 40).astype(float)) for _ in range(2))  # with ties
    cost = y if lower_is_better else -y
    expected = [
        not any(x[j] <= x[i] and cost[j] <= cost[i] and (x[j] < x[i] or cost[j] < cost[i]) for j in range(40))
        for i in range(40)
    ]
    assert on_front(x, y, lower_is_better).tolist() == expected


def test_a_radar_averages_nothing():
    frame = pd.DataFrame({"scheme": "w4", "task": ["a", "b", "c", "a"], "retention": 1.0})
    with pytest.raises(ValueError, match="w4 has a twice"):
        retention_radar(frame)


def test_a_scale_is_logarithmic_where_values_span_more_than_a_decade():
    frame = pd.DataFrame({"algo": "rtn", "bits": [2, 3], "low": NAN, "high": NAN})
    assert bits_curves(frame.assign(value=[99.0, 10.0]), "ppl").axes[0].get_yscale() == "linear"
    assert bits_curves(frame.assign(value=[101.0, 10.0]), "ppl").axes[0].get_yscale() == "log"


def test_numbers_of_bits_that_are_close_do_not_overlap():
    frame = pd.DataFrame(
        {"algo": "rtn", "bits": [2.0, 2.125, 2.15, 3.0, 8.0], "value": 5.0, "low": NAN, "high": NAN}
    )
    figure = bits_curves(frame, "ppl")
    shown, renderer = set(drawn_texts(figure)), figure.canvas.get_renderer()
    boxes = [t.get_window_extent(renderer) for t in figure.axes[0].get_xticklabels() if t in shown]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_missing_column_is_named():
    with pytest.raises(
        ValueError, match=r"needs the columns algo, bits, value, low, high; low, high is missing"
    ):
        bits_curves(pd.DataFrame({"algo": ["rtn"], "bits": [2], "value": [1.0]}), "ppl")
    with pytest.raises(ValueError, match="the frame is empty"):
        heat_map(pd.DataFrame())
