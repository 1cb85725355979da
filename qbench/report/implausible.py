"""Published values that cannot be true, or that one should look at before believing them; by rule, each with a message.

`impossible` means wrong as printed. `suspicious` means a thing that happens, but seldom: to be read, not to be refused.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

_NEVER = (
    0.02  # relative; more than floating-point values of one protocol differ between sources, rounding aside
)
_FP = ("FP16", "BF16", "FP", "FloatingPoint", "Pretrain")
_ROW = ["source", "table", "model", "method", "scheme", "calib", "dataset", "metric"]
_SEVERAL = 3  # values that must be equal before two rows are called twins
_SIGMAS = 3.5  # of a difference of accuracies: some 2000 are looked at, one of them by chance


def flags(frame: pd.DataFrame, sure: float) -> "pd.Series[str]":
    """What is wrong with each number of `qbench.report.published.load`, `; ` between; empty where nothing is.

    Args:
        sure: How far two floating-point perplexities of one model and text may be apart, relative.
    """
    rules = (below_floating_point(frame), conflicts(frame), repeats(frame), out_of_range(frame), twins(frame),
             fewer_bits_better(frame, sure), disagreements(frame, sure), drops(frame))  # fmt: skip
    found = pd.concat([messages.reindex(frame.index).fillna("") for messages in rules], axis=1)
    return found.apply(lambda row: "; ".join(filter(None, row)), axis=1)


def half_unit(printed: "pd.Series[str]") -> "pd.Series[float]":
    """Half a unit of the last printed digit: `5.60` -> 0.005, `2.2e5` -> 5000; nan where no digit is printed."""
    parts = printed.str.lower().str.extract(r"^-?\d+(?:\.(\d+))?(?:e(-?\d+))?$")
    digits, power = parts[0].fillna("").str.len(), parts[1].fillna("0").astype(float)
    known = printed.str.contains(r"\d")
    return (0.5 * 10.0 ** (power - digits)).where(known)


def _is_ppl(frame: pd.DataFrame) -> "pd.Series[bool]":
    return frame["metric"].isin(["ppl", "perplexity"])


def _is_accuracy(frame: pd.DataFrame) -> "pd.Series[bool]":
    return frame["metric"].str.contains(r"^(?:avg )?acc(?!_drop)|accuracy|MC[12]|winogrande acc")


def _percent(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Whether accuracies are in percent: as the metric says, or else the middle one of the table."""
    middle = (
        frame["value"]
        .where(_is_accuracy(frame))
        .groupby([frame["source"], frame["table"]])
        .transform("median")
    )
    return frame["metric"].str.contains("%") | (middle > 1)


def below_floating_point(frame: pd.DataFrame) -> "pd.Series[str]":
    """Perplexities below the floating-point model's, in the same table or (suspicious at most) the same text elsewhere.

    What rounding explains is left alone; a little less than floating point happens on one text, by chance.
    """
    ppl = frame[_is_ppl(frame) & np.isfinite(frame["value"])]
    place = ["source", "table", "model", "dataset"]
    base = ppl[ppl["method"].isin(_FP)].drop_duplicates(place).set_index(place)
    joined = ppl[~ppl["method"].isin(_FP)].join(base[["value", "printed"]], on=place, rsuffix="_fp")
    joined["here"] = joined["value_fp"].notna()
    joined["value_fp"] = joined["value_fp"].fillna(joined["fp"])
    rounding = half_unit(joined["printed"]) + half_unit(joined["printed_fp"].fillna("")).fillna(0.0)
    return _messages(
        joined[joined["value"] + rounding < joined["value_fp"]],
        lambda row: (
            f"{'impossible' if row.here and row.value < row.value_fp * (1 - _NEVER) else 'suspicious'}: "
            f"{row.value:g} is below floating point, {row.value_fp:g}{'' if row.here else ' elsewhere'} "
            f"({row.value / row.value_fp - 1:+.1%})"
        ),
    )


def conflicts(frame: pd.DataFrame) -> "pd.Series[str]":
    """Several values of one row of a table."""
    many = frame[frame.duplicated(_ROW, keep=False)]
    found: dict[object, str] = {}
    for _, same in many.groupby(_ROW):
        if same["value"].nunique() > 1:
            message = f"impossible: one row has several values, {', '.join(dict.fromkeys(same['printed']))}"
            found |= dict.fromkeys(same.index, message)
    return pd.Series(found, dtype=object)


def repeats(frame: pd.DataFrame) -> "pd.Series[str]":
    """Rows that stand more than once."""
    many = frame[frame.duplicated([*_ROW, "printed"], keep=False)]
    return pd.Series("suspicious: the row stands more than once", many.index, dtype=object)


def out_of_range(frame: pd.DataFrame) -> "pd.Series[str]":
    """Accuracies outside 0 to 1 (or 100 %), perplexities below 1."""
    most = np.where(_percent(frame), 100.0, 1.0)
    wrong = frame[_is_accuracy(frame) & ((frame["value"] < 0) | (frame["value"] > most))]
    low = frame[_is_ppl(frame) & (frame["value"] < 1)]
    return pd.concat([
        "impossible: " + wrong["printed"] + " is no accuracy",
        "impossible: " + low["printed"] + " is below 1, which no perplexity is",
    ])  # fmt: skip


def twins(frame: pd.DataFrame) -> "pd.Series[str]":
    """Rows of a table that are equal in all their values, though model or scheme differ.

    Values that many rows share because they know nothing or everything (0, 1, 100, and what a quarter of a column is) do
    not tell.
    """
    column = ["source", "table", "dataset", "metric"]
    shared = frame.groupby([*column, "value"])["value"].transform("size")
    common = shared > frame.groupby(column)["value"].transform("size") / 4
    telling = (~common & ~frame["value"].isin([0.0, 1.0, 100.0]) & np.isfinite(frame["value"])).tolist()
    lines: dict[tuple[str, ...], dict[tuple[str, str], tuple[str, bool, object]]] = defaultdict(dict)
    rows: Any = frame.itertuples()
    for row, tells in zip(rows, telling, strict=True):
        line = (row.source, row.table, row.model, row.method, row.scheme, row.calib)
        lines[line][row.dataset, row.metric] = (row.printed, tells, row.Index)
    alike: dict[object, list[tuple[str, list[object]]]] = defaultdict(list)
    for said, cells in lines.items():
        values = {cell: printed for cell, (printed, _, _) in sorted(cells.items())}
        if sum(tells for _, tells, _ in cells.values()) >= _SEVERAL and len(set(values.values())) >= _SEVERAL:
            indices = [index for _, _, index in cells.values()]
            alike[(*said[:2], tuple(values.items()))].append((" ".join(said[2:5]), indices))
    return pd.Series({
        i: f"suspicious: all {len(indices)} values are those of {next(o for o, _ in same if o != name)}"
        for same in alike.values() if len({name for name, _ in same}) > 1
        for name, indices in same for i in indices
    }, dtype=object)  # fmt: skip


def fewer_bits_better(frame: pd.DataFrame, sure: float) -> "pd.Series[str]":
    """Where the same method does better with fewer bits of weights (or cache), by more than chance has it.

    Accuracies are compared with floating point too; perplexities are elsewhere (`below_floating_point`).
    """
    parts = frame["scheme"].str.lower().str.extract(r"^(w|kv|int|)(\d+)(.*)$")
    frame = frame.assign(bits=pd.to_numeric(parts[1]), shape=parts[0] + "#" + parts[2], ppl=_is_ppl(frame))
    frame = frame[frame["ppl"] | (_is_accuracy(frame) & frame["size"].notna())]
    fp = frame["method"].isin(_FP)
    rows: Any = frame[fp & ~frame["ppl"]].itertuples()
    base: dict[object, float] = {
        (row.source, row.table, row.model, row.dataset, row.metric): row.value for row in rows
    }
    above: dict[tuple[object, ...], list[tuple[float, float]]] = defaultdict(list)
    found = {}
    cells = frame[~fp].dropna(subset=["bits"]).sort_values("bits", ascending=False, kind="stable")
    row: Any
    for row in cells.itertuples():
        place = (row.source, row.table, row.model, row.dataset, row.metric)
        more = above[(*place, row.method, row.calib, row.shape)]
        if not more and place in base:
            more.append((16.0, base[place]))
        for n, value in more:
            if n > row.bits and _better(row, value, sure):
                found[row.Index] = f"suspicious: {row.value:g} is better than {value:g} with {n:g} bits"
                break
        more.append((row.bits, row.value))
    return pd.Series(found, dtype=object)


def _better(row: Any, other: float, sure: float) -> bool:
    """Better than a value with more bits, beyond chance."""
    if row.ppl:
        return bool(row.value * (1 + max(sure, _NEVER)) < other)
    unit = 100.0 if max(row.value, other) > 1 else 1.0
    variance = sum(max(share * (1 - share), 0.0) for share in (row.value / unit, other / unit)) / row.size
    return bool((row.value - other) / unit > _SIGMAS * variance**0.5)


def _messages(rows: pd.DataFrame, say: Callable[[Any], str]) -> "pd.Series[str]":
    return pd.Series([say(row) for row in rows.itertuples()], rows.index, dtype=object)


def disagreements(frame: pd.DataFrame, sure: float) -> "pd.Series[str]":
    """Floating point and rounding to nearest have nothing random: sources that differ did not do the same."""
    one = ["our_model", "our_algo", "our_scheme", "our_metric"]
    ppl = frame[
        _is_ppl(frame)
        & frame["our_algo"].isin(["fp", "rtn"])
        & frame["why_not"].isna()
        & np.isfinite(frame["value"])
    ]
    messages = {}
    for _, same in ppl.groupby(one, sort=False):
        half = half_unit(same["printed"])
        for i, row in same.iterrows():
            others = same[same["source"] != row["source"]].drop_duplicates("source_name")
            apart = (others["value"] - row["value"]).abs() - half[others.index] - half[i]
            far = apart > sure * others["value"]
            if far.sum() > (~far).sum():  # the majority is not told of the one that is off
                said = ", ".join(f"{o.printed} in {o.source_name}" for o in others[far].itertuples())
                messages[i] = f"suspicious: {row['printed']}, of which nothing is random, is {said}"
    return pd.Series(messages, dtype=object)


def drops(frame: pd.DataFrame) -> "pd.Series[str]":
    """Drops under attack that are not what accuracy before and after give: 1 - after / before."""
    place = [column for column in _ROW if column != "metric"]
    by_metric = {
        m: part.drop_duplicates(place).set_index(place)["value"] for m, part in frame.groupby("metric")
    }
    found = frame[frame["metric"] == "acc_drop"]
    if found.empty:
        return pd.Series(dtype=object)
    for name in ("acc_after", "acc_before"):
        found = found.join(by_metric[name].rename(name), on=place)
    share = found["acc_after"] / found["acc_before"]
    rounding = (
        half_unit(found["printed"]) + 0.005 * (1 + share) / found["acc_before"]
    )  # percent with two digits
    wrong = found[(found["value"] - (1 - share)).abs() > rounding * (1 + 1e-9)]
    return _messages(
        wrong, lambda row: f"impossible: drop {row.printed} is not 1 - {row.acc_after:g} / {row.acc_before:g}"
    )
