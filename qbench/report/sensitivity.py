"""What quantizing one unit of a model does: differences on the same windows, tensor statistics, and what was chosen."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from qbench.report.figures.curves import layer_sensitivity
from qbench.report.figures.style import save
from qbench.report.tables import number, print_table
from qbench.statistics import TensorStatistics

_ROWS = 100  # of a table in the terminal; files have all


@dataclass(frozen=True)
class Effect:
    """What quantizing a unit does, with all others in floating point or all others quantized.

    Attributes:
        size: Stored bits of the unit's weights at this width, scales and zero-points included.
        kl: By how much the mean divergence from the floating-point model grows, in nats a token; `nll` the same of
            the negative log-likelihood.
        kl_stderr, nll_stderr: Standard errors of the means of the windows' differences.
        n_windows: How many windows both jobs were evaluated on.
    """

    unit: str
    bits: int
    n_weights: int
    size: float
    kl: float
    kl_stderr: float
    nll: float
    nll_stderr: float
    n_windows: int


Samples = Sequence[Mapping[str, Any]]


def difference(samples: Samples, against: Samples, kind: str) -> tuple[float, float, int]:
    """Mean difference of the windows' values, its standard error, and the number of windows.

    Args:
        kind: Of the metrics to take together: `kl` or `ppl` (whose windows are negative log-likelihoods).

    Raises:
        ValueError: If the two were not evaluated on the same windows.
    """
    first, second = (
        {(s["metric"], s["item"]): float(s["value"]) for s in side if s["metric"].startswith(f"{kind}/")}
        for side in (samples, against)
    )
    if first.keys() != second.keys() or len(first) < 2:
        raise ValueError(
            f"{len(first)} and {len(second)} windows of {kind} are to be compared; both jobs need the same, two or more"
        )
    delta = np.array([first[key] - second[key] for key in first])
    return float(delta.mean()), float(delta.std(ddof=1) / len(delta) ** 0.5), len(delta)


def effect(
    unit: str, bits: int, n_weights: int, size: float, quantized: Samples, left_alone: Samples
) -> Effect:
    """From the samples of two jobs, of which one quantizes the unit and the other does not."""
    kl, kl_stderr, n_windows = difference(quantized, left_alone, "kl")
    nll, nll_stderr, _ = difference(quantized, left_alone, "ppl")
    return Effect(unit, bits, n_weights, size, kl, kl_stderr, nll, nll_stderr, n_windows)


def write_effects(effects: Iterable[Effect], path: Path) -> None:
    """A row for each unit and width, the most sensitive first, as CSV."""
    frame = pd.DataFrame([asdict(e) for e in effects], columns=[f.name for f in fields(Effect)])
    frame.insert(4, "bits_per_weight", frame["size"] / frame["n_weights"])
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.drop(columns="size").sort_values("kl", ascending=False).to_csv(path, index=False)


def draw_effects(effects: Iterable[Effect], stem: Path) -> list[Path]:
    """The same as a figure: SVG, PDF and PNG."""
    frame = pd.DataFrame([asdict(e) for e in effects], columns=[f.name for f in fields(Effect)])
    return save(layer_sensitivity(frame, width=6.5), stem)


def print_effects(effects: Sequence[Effect], title: str, console: Console) -> None:
    """Units down, widths across; the most sensitive at the lowest width first."""
    found = {(e.unit, e.bits): e for e in effects}
    widths = sorted({e.bits for e in effects})
    units = sorted(
        dict.fromkeys(e.unit for e in effects),
        key=lambda unit: max((e.kl for e in effects if e.unit == unit and e.bits == widths[0]), default=0.0),
        reverse=True,
    )
    total = sum({e.unit: e.n_weights for e in effects}.values())
    rows = []
    for unit in units:
        mine = {bits: found[unit, bits] for bits in widths if (unit, bits) in found}
        row = {"unit": unit, "weights": f"{next(iter(mine.values())).n_weights / total:.1%}"}
        row |= {f"w{b}": number(1000 * e.kl, 1000 * e.kl_stderr) for b, e in mine.items()}
        rows.append(row)
    _print(pd.DataFrame(rows).fillna(""), f"{title}: KL divergence, 10⁻³ nats a token", console)


def print_choice(rows: Sequence[Mapping[str, str]], console: Console) -> None:
    """Units down: their bits, what these take, and what they cost."""
    _print(pd.DataFrame(rows), "bits by unit", console)


@dataclass(frozen=True)
class Recipe:
    """Bits for a model, predicted, and measured where they were.

    Attributes:
        bits: Stored bits a weight of the layers that are quantized; those of the record where there is one.
        predicted: Sum of the units' divergences.
        measured: Metrics by name, with their standard errors behind `_stderr`.
    """

    name: str
    bits: float
    predicted: float
    measured: Mapping[str, float]


def print_recipes(recipes: Sequence[Recipe], console: Console) -> None:
    """What was predicted beside what was measured."""
    rows = []
    for recipe in recipes:
        row = {"recipe": recipe.name, "bits": f"{recipe.bits:.3f}", "KL predicted": f"{recipe.predicted:.4f}"}
        for key, value in recipe.measured.items():
            if f"{key}_stderr" in recipe.measured:
                title = "KL measured" if key == "KL" else key
                row[title] = _precise(value, recipe.measured[f"{key}_stderr"])
        rows.append(row)
    title = "predicted and measured" if any(recipe.measured for recipe in recipes) else "predicted"
    _print(pd.DataFrame(rows).fillna(""), title, console)


def _precise(value: float, stderr: float) -> str:
    """As `number`, with four digits behind the point where the error is that small."""
    return f"{value:.4f} ± {stderr:.4f}" if stderr < 0.01 else number(value, stderr)


def write_statistics(rows: Iterable[TensorStatistics], path: Path) -> None:
    """A row for each tensor, as CSV."""
    names = [f.name for f in fields(TensorStatistics)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([astuple(row) for row in rows], columns=names).to_csv(path, index=False)


def print_statistics(rows: Sequence[TensorStatistics], title: str, console: Console) -> None:
    """Layers with their weight and input, then blocks with their keys and values."""
    for tensors in (("W", "A"), ("K", "V")):
        found: dict[str, dict[str, str]] = {}
        for row in rows:
            if row.tensor in tensors:
                unit = f"{row.block}.{row.layer}".rstrip(".")
                found.setdefault(unit, {"unit": unit}).update(
                    {
                        f"{row.tensor} {name}": f"{getattr(row, name):.3g}"
                        for name in ("absmax", "std", "kurtosis")
                    }
                )
        _print(pd.DataFrame(found.values()), f"{title}: {' and '.join(tensors)}", console)


def _print(table: pd.DataFrame, title: str, console: Console) -> None:
    print_table(table.head(_ROWS), title, console)
    if len(table) > _ROWS:
        console.print(f"and {len(table) - _ROWS} more rows in the file", highlight=False)
    console.print()
