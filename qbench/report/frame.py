"""Records as one tidy frame."""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from qbench.track.records import flatten

LABELS = ["model", "algo", "scheme", "wbits", "abits", "kvbits"]
_ALREADY_SHOWN = ("scheme", "evaluation.")


def tidy(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One row per job and metric: fingerprint, status, reason, labels, setting, then metric, value, stderr.

    `setting` says how a job differs from others of the same model, algorithm and scheme (a hyperparameter, the
    calibration set, a seed), and is empty where none differs. Where records were evaluated in several ways, the
    protocol is part of the metric's name, so that two protocols never share a column. A failed job has one
    row, without a metric.
    """
    records = list(records)
    settings = differences(records)
    protocols: dict[str, set[str]] = {}
    for record in records:
        for name in record["metrics"]:
            protocols.setdefault(name, set()).add(protocol(record, name))
    rows = []
    for record in records:
        common = {
            "fingerprint": record["fingerprint"],
            "status": record["status"],
            "reason": record.get("reason"),
        }
        common |= {label: record["labels"].get(label) for label in LABELS}
        common |= {"setting": settings[record["fingerprint"]]}
        metrics = record["metrics"]
        named = [name for name in metrics if not name.endswith("_stderr")]
        for name in named:
            shown = name + (f" {protocol(record, name)}" if len(protocols[name]) > 1 else "")
            value, stderr = metrics[name], metrics.get(f"{name}_stderr")
            rows.append(common | {"metric": shown.strip(), "value": value, "stderr": stderr})
        if not named:
            rows.append(common | {"metric": None, "value": None, "stderr": None})
    columns = ["fingerprint", "status", "reason", *LABELS, "setting", "metric", "value", "stderr"]
    return pd.DataFrame(rows, columns=columns)


def protocol(record: dict[str, Any], metric: str) -> str:
    """How a metric was taken: `[512 x 32]` is window length and most windows, `[limit 50]` most documents."""
    how = record["identity"]["evaluation"]
    kind, _, name = metric.partition("/")
    if not name:
        return ""
    texts = [*how.get("ppl", ()), *how.get("decode_ppl", ())]
    content = {
        t.partition("@")[2] for t in texts if t.partition("@")[0] == name and not t.startswith("stdlib_")
    }
    content |= {digest for key, digest in how.get("files", {}).items() if key.partition("/")[0] == name}
    of = "".join(f" @{digest[:6]}" for digest in sorted(content) if digest)  # of a file that is the user's
    if kind == "decode_ppl":
        windows = f"{how['seq_len']}{' x ' + str(how['decode_windows']) if how.get('decode_windows') else ''}"
        return f"[{windows}{' ' + how['split'] if how.get('split') else ''}{of}]"
    if kind in ("ppl", "bpb", "kl", "agreement"):
        windows = f"{how['seq_len']}{' x ' + str(how['max_windows']) if how['max_windows'] else ''}"
        stride = f" stride {how['stride']}" if how.get("stride") else ""
        return f"[{windows}{stride}{' ' + how['split'] if how.get('split') else ''}{of}]"
    talk = how.get("talk") or {}
    if name in talk.get("benches", ()):
        marks = [f"limit {talk['limit']}" if talk["limit"] else "all", f"{talk['max_new_tokens']} tokens"]
        marks += ["plain"] if talk["plain"] else []
        return f"[{', '.join([*marks, *([str(talk['judge'])] if talk['judge'] else [])])}]"
    marks = [f"limit {how['limit']}" if how["limit"] else "all"]
    if (shots := how.get("shots", {}).get(name)) is not None:
        marks.append(f"{shots} shots")
    marks += [f"from {how['shots_split']}"] if how.get("shots_split") else []
    return f"[{', '.join(marks)}]"


def differences(records: list[dict[str, Any]], ignored: tuple[str, ...] = ()) -> dict[str, str]:
    """By fingerprint: what tells a job from the others of its model, algorithm and scheme.

    Args:
        ignored: Beginnings of keys of the identity that are not looked at.
    """
    alike: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for record in records:
        labels = record["labels"]
        key = tuple(str(labels[name]) for name in ("model", "algo", "scheme"))
        flat = flatten(record["identity"])
        flat = {k: v for k, v in flat.items() if not k.startswith((*_ALREADY_SHOWN, *ignored))}
        flat["python"] = record["environment"]["versions"]["python"]  # embedded text changes with it
        alike.setdefault(key, {})[record["fingerprint"]] = flat
    found: dict[str, str] = {}
    for group in alike.values():
        keys = dict.fromkeys(key for flat in group.values() for key in flat)
        differing = [key for key in keys if len({str(flat.get(key, "-")) for flat in group.values()}) > 1]
        for fingerprint, flat in group.items():
            found[fingerprint] = ", ".join(f"{_short(key)}={flat.get(key, '-')}" for key in differing)
    return found


def _short(key: str) -> str:
    """`algorithm.steps.0.n_grid` -> `n_grid`, `calib.name` -> `calib`."""
    return "calib" if key == "calib.name" else key.rpartition(".")[2]
