"""Records as one tidy frame."""

from collections.abc import Iterable
from typing import Any

import pandas as pd

LABELS = ["model", "algo", "scheme", "wbits", "abits", "kvbits", "group_size", "calib", "seed"]


def tidy(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One row per job and metric: fingerprint, status, reason, the labels, then metric, value and stderr.

    A failed job has one row, without a metric.
    """
    rows = []
    for record in records:
        common = {
            "fingerprint": record["fingerprint"],
            "status": record["status"],
            "reason": record.get("reason"),
        }
        common |= {label: record["labels"].get(label) for label in LABELS}
        metrics = record["metrics"]
        named = [name for name in metrics if not name.endswith("_stderr")]
        for name in named or [None]:
            value, stderr = metrics.get(name), metrics.get(f"{name}_stderr")
            rows.append(common | {"metric": name, "value": value, "stderr": stderr})
    columns = ["fingerprint", "status", "reason", *LABELS, "metric", "value", "stderr"]
    return pd.DataFrame(rows, columns=columns)
