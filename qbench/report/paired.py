"""Is an algorithm better than another on the same windows? Differences, item by item, with a test of each."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from qbench.report.frame import tidy
from qbench.report.significance import Draws, differences, holm
from qbench.report.tables import file_name, print_table, save

Samples = Callable[[str], list[dict[str, Any]]]
_SURE = 0.01
_FLOAT = "w16a16"
_PAID = 0.05  # bits per weight, all of the model


def compare(records: Sequence[dict[str, Any]], samples: Samples, against: str) -> pd.DataFrame:
    """Perplexities of every job beside those of the algorithm `against` with the same model, scheme and evaluation.

    Where that algorithm was not run with a job's scheme it is met in the plain scheme of the same bits and groups: HQQ,
    whose zero-points are real, is compared with rounding to integer ones, and a cache in KIVI's layout with the usual one.

    The test is a paired t-test of the windows' mean negative log-likelihood. P-values are corrected for their number by
    Holm's method, over all comparisons of one metric.

    Args:
        samples: The samples of a fingerprint: columns `metric`, `item`, `value`.

    Returns:
        One row per job and metric: model, scheme, algo, setting, bits, metric, value, against, baseline,
        baseline_scheme, baseline_bits, change (of the perplexity, relative), n (windows), p.

    Raises:
        ValueError: If no job of that algorithm is there, or none that it could be compared with.
    """
    done = [r for r in records if r["status"] == "done"]
    base: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in done:
        if record["labels"]["algo"] == against:
            base.setdefault(_meets(record), []).append(record)
    if not base:
        known = sorted({r["labels"]["algo"] for r in done})
        raise ValueError(f"no job with algo={against} is recorded; there are {', '.join(known) or 'none'}")
    settings = tidy(done).drop_duplicates("fingerprint").set_index("fingerprint")["setting"]
    cache: dict[str, pd.DataFrame] = {}

    def windows(fingerprint: str) -> pd.DataFrame:
        if fingerprint not in cache:
            cache[fingerprint] = pd.DataFrame(samples(fingerprint), columns=["metric", "item", "value"])
        return cache[fingerprint]

    rows, pairs = [], []
    for record in done:
        other = _baseline(record, base, settings)
        if other is None or record["labels"]["algo"] == "fp":
            continue
        both = windows(record["fingerprint"]).merge(windows(other["fingerprint"]), on=["metric", "item"])
        for metric, items in both[both["metric"].str.startswith("ppl/")].groupby("metric"):
            names = tuple(items["item"].astype(str))
            one, two = (
                Draws(names, items[[side]].to_numpy().T, loss=True) for side in ("value_x", "value_y")
            )
            pairs.append((one, two))
            labels = record["labels"]
            rows.append({
                "model": labels["model"], "scheme": labels["scheme"], "algo": labels["algo"],
                "setting": settings[record["fingerprint"]], "bits": record["metrics"]["bits_per_weight"],
                "metric": metric, "value": record["metrics"][metric],
                "against": against, "baseline": other["metrics"][metric],
                "baseline_scheme": other["labels"]["scheme"],
                "baseline_bits": other["metrics"]["bits_per_weight"],
            })  # fmt: skip
    if not rows:
        raise ValueError(f"no job shares model, scheme and evaluation with one of algo={against}")
    found = differences(pairs)
    frame = pd.DataFrame(rows)
    frame["change"] = np.expm1([d.effect for d in found])
    frame["n"], frame["p"] = [d.n for d in found], [d.p for d in found]
    frame["p"] = frame.groupby("metric")["p"].transform(holm)
    return frame


def _baseline(
    record: dict[str, Any], base: dict[tuple[str, ...], list[dict[str, Any]]], settings: "pd.Series[str]"
) -> dict[str, Any] | None:
    """The job to compare with, calibrated on the same data where there is one; `None` for the baseline itself.

    Raises:
        ValueError: If there are several.
    """
    found = base.get(_meets(record), [])
    if not found or any(r is record for r in found):
        plain = _meets(record, plain=True)
        found = base.get(plain, []) if plain != _meets(record) else []
    if not found:  # every scheme is met by the floating-point model
        model, _, evaluation = _meets(record)
        found = base.get((model, _FLOAT, evaluation), [])
    same = [r for r in found if r["identity"]["calib"] == record["identity"]["calib"]]
    if len(found := same or found) > 1:
        raise ValueError(
            f"{len(found)} jobs could be the baseline of {record['labels']['algo']} {record['labels']['scheme']}: "
            + " or ".join(repr(settings[r["fingerprint"]]) for r in found)
            + "; keep all but one of them under another results="
        )
    return found[0] if found else None


def _meets(record: dict[str, Any], plain: bool = False) -> tuple[str, ...]:
    """What two jobs must share; of the scheme only bits, groups and overrides if `plain`, no other departures."""
    model, scheme, evaluation = (str(record["identity"][key]) for key in ("model", "scheme", "evaluation"))
    whole, bracket, overrides = scheme.partition("-[")
    return model, whole.partition("-")[0] + bracket + overrides if plain else scheme, evaluation


def table(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Algorithms down, the baseline's schemes across: perplexity and its change, with `*` where p < 0.01.

    The baseline comes first. What a scheme departs in from the baseline's stands behind the algorithm's name, and bits
    per weight behind a change that was paid for.
    """
    chosen = frame[frame["metric"] == metric]
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for _, row in chosen.iterrows():
        cells.setdefault((row["model"], row["against"], ""), {})[row["baseline_scheme"]] = (
            f"{row['baseline']:.4g}"
        )
    for _, row in chosen.iterrows():
        text = f"{row['value']:.4g} ({row['change']:+.1%}{'*' if row['p'] < _SURE else ''})"
        if abs(row["bits"] - row["baseline_bits"]) >= _PAID:
            text += f" {row['bits']:.2f} bits"
        departure = row["scheme"].removeprefix(row["baseline_scheme"])
        key = (row["model"], f"{row['algo']} {departure}".strip(), row["setting"])
        cells.setdefault(key, {})[row["baseline_scheme"]] = text
    index, models = ["model", "algo", "setting"], list(dict.fromkeys(chosen["model"]))
    rows = [
        dict(zip(index, key, strict=True)) | columns
        for key, columns in sorted(cells.items(), key=lambda cell: models.index(cell[0][0]))
    ]
    schemes = sorted(chosen["baseline_scheme"].unique(), key=_many_bits_first)
    found = pd.DataFrame(rows, columns=[*index, *schemes]).fillna("")
    return found if found["setting"].any() else found.drop(columns="setting")


def _many_bits_first(scheme: str) -> tuple[list[int], str]:
    return [-int(bits or 16) for bits in re.findall(r"^w(\d+)a(\d+)(?:kv(\d+))?", scheme)[0]], scheme


def show(frame: pd.DataFrame, against: str, console: Console) -> None:
    """A table for each metric."""
    for metric in dict.fromkeys(frame["metric"]):
        print_table(
            table(frame, metric), f"{metric}, against {against} (* p < {_SURE}, paired, Holm)", console
        )


def write(frame: pd.DataFrame, against: str, folder: Path) -> list[Path]:
    """All comparisons, and a table for each metric, as CSV, Markdown and LaTeX."""
    tables = {f"against-{against}": frame}
    for metric in dict.fromkeys(frame["metric"]):
        tables[f"against-{against}-{file_name(metric)}"] = table(frame, metric)
    return save(tables, folder)
