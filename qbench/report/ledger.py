"""Every published number: have we a run of it, how far is that, and if not, why not, or which command would make one."""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from qbench.report.frame import protocol
from qbench.report.labels import seedless
from qbench.report.naming import names
from qbench.report.published import load, match
from qbench.report.tables import print_table, save

_COLUMNS = [
    "model",
    "algo",
    "scheme",
    "calib",
    "samples",
    "recipe",
    "fingerprint",
    "metric",
    "value",
    "stderr",
    "protocol",
]
_EXAMPLES = 20  # flagged numbers in the terminal
_SHOWN = ["number", "model", "method", "scheme", "dataset", "printed", "flags"]


def cells_of(records: Iterable[dict[str, Any]], metrics: Iterable[str]) -> pd.DataFrame:
    """Some metrics of all finished jobs, as `qbench.report.published.match` reads them."""
    wanted, rows = set(metrics), []
    for record in records:
        if record["status"] != "done":
            continue
        labels, calib = record["labels"], record["identity"].get("calib") or {}
        common = {key: labels[key] for key in ("model", "algo", "scheme", "calib")}
        common["samples"] = f"{calib['n_samples']}x{calib['seq_len']}" if calib else None
        algorithm = json.dumps(seedless(record["identity"]["algorithm"]), sort_keys=True)
        common["recipe"] = algorithm  # its hyperparameters, seeds apart
        common["fingerprint"] = record["fingerprint"]
        for metric in sorted(wanted & set(record["metrics"])):
            value, error = record["metrics"][metric], record["metrics"].get(f"{metric}_stderr")
            how = {"metric": metric, "value": value, "stderr": error, "protocol": protocol(record, metric)}
            rows.append(common | how)
    return pd.DataFrame(rows, columns=_COLUMNS, dtype=object)


def ledger(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """What has become of every published number.

    Returns:
        The columns of `qbench.report.published.match`, then state (`not mapped`, `not run`, `within`, `outside`, or
        `not judged`: there is a run, of what is known to differ) and why (a reason, or the command that would run it).
    """
    published = load()
    mapped = published[published["why_not"].isna()]
    models = set(mapped["our_model"])
    mine = [record for record in records if record["labels"]["model"] in models]
    found = match(published, cells_of(mine, mapped["our_metric"].unique()))
    rows: Any = found.itertuples()
    states = [_state(row) for row in rows]
    return found.assign(
        state=[state for state, _ in states],
        why=pd.Series([why for _, why in states], found.index, dtype=object),
    )


def _state(row: Any) -> tuple[str, str | None]:
    if row.why_not is not None:
        return "not mapped", row.why_not
    if row.fingerprint is None:
        return "not run", command(row)
    if row.within is None:
        return "not judged", row.caveat or "the published value is not a finite number"
    return ("within" if row.within else "outside"), None


def command(row: Any) -> str:
    """The command that runs a published number's setting; where the paper names no calibration set, it has `calib=...`."""
    words = ["qbench", f"algo={row.our_algo}", *shlex.split(names().commands[row.our_scheme])]
    words += ["model=hf", f"model.id={row.model_id}"]
    if row.our_calib is not None:
        n_samples, seq_len = row.our_samples.split("x")
        name, _, recipe = row.our_calib.partition("/")
        words += [f"calib={name}", *([f"calib.recipe={recipe}"] if recipe else [])]
        words += [f"calib.n_samples={n_samples}", f"calib.seq_len={seq_len}"]
    elif row.our_algo not in names().data_free:
        words.append("calib=...")
    kind, _, name = row.our_metric.partition("/")
    ppl = f"eval.ppl=[{name if kind == 'ppl' else ''}]"
    words += ["eval=wikitext2"] if row.our_metric == "ppl/wikitext2" else ["eval=wikitext2", ppl]
    return shlex.join(words + ([f"eval.tasks=[{name}]"] if kind != "ppl" else []))


def summary(ledger: pd.DataFrame) -> pd.DataFrame:
    """By source, and all together: numbers, mapped, comparable (mapped without a caveat), run, within, outside, flags."""
    counted = pd.DataFrame({
        "source": ledger["source_name"],
        "numbers": 1,
        "mapped": ledger["why_not"].isna(),
        "comparable": ledger["why_not"].isna() & ledger["caveat"].isna(),
        "run": ledger["fingerprint"].notna(),
        "within": ledger["state"] == "within",
        "outside": ledger["state"] == "outside",
        "impossible": ledger["flags"].str.contains("impossible"),
        "suspicious": ledger["flags"].str.contains("suspicious"),
    })  # fmt: skip
    table = counted.groupby("source", sort=False).sum().astype(int)
    table.loc["all"] = table.sum()
    return table.reset_index()


def flagged(ledger: pd.DataFrame) -> pd.DataFrame:
    """Numbers that a rule of `qbench.report.implausible` is about: impossible ones first."""
    found = ledger[ledger["flags"] != ""]
    order = (~found["flags"].str.contains("impossible")).astype(int)
    return found.loc[order.sort_values(kind="stable").index, _SHOWN].reset_index(drop=True)


def show(ledger: pd.DataFrame, console: Console) -> None:
    """The summary, what cannot be, and one example of each thing that is suspicious; the files have all."""
    print_table(summary(ledger), "published numbers", console)
    found = flagged(ledger).drop(columns="dataset")
    rule = found["flags"].str.replace(r"[\d.]+", "#", regex=True).str.split(",").str[0]
    source = found["number"].str.partition("/")[0]
    first = ~pd.concat([source, rule.str.split(" ").str[-4:].str.join(" ")], axis=1).duplicated()
    shown = found[first | found["flags"].str.contains("impossible")].head(_EXAMPLES)
    if len(found):
        console.print()
        console.print(f"numbers to look at: {len(shown)} of {len(found)}", style="bold", highlight=False)
        for row in shown.itertuples():
            line = f"{row.number}: {row.model} {row.method} {row.scheme}: {row.flags}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def write(ledger: pd.DataFrame, folder: Path) -> list[Path]:
    """The summary and the flagged numbers as CSV, Markdown and LaTeX, and the whole ledger as CSV."""
    paths = save({"ledger-summary": summary(ledger), "ledger-flags": flagged(ledger)}, folder)
    whole = folder / "ledger.csv"
    whole.write_text(ledger.to_csv(index=False), encoding="utf-8")
    return [*paths, whole]
