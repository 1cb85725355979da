"""Records as one tidy frame."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from qbench.report.labels import short
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
    settings, ways = differences(records), _ways(records)
    taken: dict[str, set[str]] = {}
    for way in ways:
        for name, how in way.items():
            taken.setdefault(name, set()).add(how)
    several = {name for name, hows in taken.items() if len(hows) > 1}
    jobs, rows, counts = list[list[Any]](), list[tuple[Any, ...]](), list[int]()
    for record, way in zip(records, ways, strict=True):
        labels, metrics = record["labels"], record["metrics"]
        common = [record["fingerprint"], record["status"], record.get("reason")]
        jobs.append([*common, *map(labels.get, LABELS), settings[record["fingerprint"]]])
        named = [name for name in metrics if not name.endswith("_stderr")]
        shown = [f"{name} {way[name]}".strip() if name in several else name for name in named]
        errors = [metrics.get(f"{name}_stderr") for name in named]
        rows += zip(shown, map(metrics.get, named), errors, strict=True) if named else [(None, None, None)]
        counts.append(len(named) or 1)
    columns = ["fingerprint", "status", "reason", *LABELS, "setting"]
    # Jobs are described once and repeated: a dict for each row takes longer than all else.
    described = pd.DataFrame(jobs, columns=columns).iloc[np.repeat(np.arange(len(jobs)), counts)]
    numbers = pd.DataFrame(rows, columns=["metric", "value", "stderr"])
    return pd.concat([described.reset_index(drop=True), numbers], axis=1)


def _ways(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    """How the metrics of each record were taken; records that were evaluated alike share a dict."""
    known: dict[str, dict[str, str]] = {}
    found = []
    for record in records:
        way = known.setdefault(repr(record["identity"].get("evaluation")), {})
        for metric in record["metrics"]:
            if metric not in way and not metric.endswith("_stderr"):
                way[metric] = protocol(record, metric)
        found.append(way)
    return found


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


def differences(records: list[dict[str, Any]]) -> dict[str, str]:
    """By fingerprint: what tells a job from the others of its model, algorithm and scheme."""
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        labels = record["labels"]
        key = tuple(str(labels[name]) for name in ("model", "algo", "scheme"))
        alike.setdefault(key, []).append(record)
    found: dict[str, str] = {}
    for group in alike.values():
        flats = _unlike(group)
        keys = dict.fromkeys(key for flat in flats.values() for key in flat)
        differing = [key for key in keys if len({str(flat.get(key, "-")) for flat in flats.values()}) > 1]
        for fingerprint, flat in flats.items():
            found[fingerprint] = ", ".join(f"{short(key)}={flat.get(key, '-')}" for key in differing)
    return found


def _unlike(group: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By fingerprint: the leaves of those branches of the identity that are not the same in all records, and the Python."""
    # Most branches are the same in all of a group, and flattening them takes longer than all else.
    branches = dict.fromkeys(name for record in group for name in record["identity"])
    unlike = [b for b in branches if len({repr(record["identity"].get(b, ...)) for record in group}) > 1]
    found = {}
    for record in group:
        flat = flatten({name: record["identity"][name] for name in unlike if name in record["identity"]})
        flat = {k: v for k, v in flat.items() if not k.startswith(_ALREADY_SHOWN)}
        flat["python"] = record["environment"]["versions"]["python"]  # embedded text changes with it
        found[record["fingerprint"]] = flat
    return found
