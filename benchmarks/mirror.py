"""Time the MLflow mirror: what a record costs, and what is asked of it when everything is mirrored.

    python benchmarks/mirror.py [records]

Makes 1,000 synthetic records, or as many as are asked for, each of 60 parameters, 40 metrics, 4 block errors, 2 data
sets and 2 files, and mirrors them into a fresh SQLite database. Prints a Markdown table.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from qbench.track.mirror import MLflowMirror
from qbench.track.records import Record, RecordStore

LAST = 200


def synthetic(i: int) -> Record:
    random.seed(i)
    start = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=10 * i)
    steps = {f"step{k}": {"damp": random.random(), "mode": "mse"} for k in range(26)}
    return {
        "fingerprint": f"{i:016x}",
        "status": "done",
        "labels": {"model": "micro-llama", "algo": "gptq", "scheme": "w4a16g128"},
        "config": {"algo": {"steps": steps}} | {f"key{k}": k for k in range(5)},
        "environment": {
            "versions": dict.fromkeys(("torch", "transformers", "datasets", "lm_eval", "numpy"), "1.2.3"),
            "git_commit": "0" * 40,
            "command": "qbench -m +sweep=synthetic",
        },
        "metrics": {f"acc/task_{k}": random.random() for k in range(40)},
        "block_errors": [random.random() for _ in range(4)],
        "data": {
            "calib/stdlib_code": {"origin": "embedded", "sha256": "e" * 64},
            "eval/stdlib_docs": {"origin": "embedded", "sha256": "f" * 64},
        },
        "started": start.isoformat(),
        "finished": (start + timedelta(seconds=9)).isoformat(),
    }


def keep(store: RecordStore, record: Record) -> None:
    """Write a record as `RecordStore.write` lays it out, without waiting for the disk."""
    folder = store.path(record["fingerprint"])
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps(record, indent=1))
    (folder / "samples.parquet").write_bytes(random.randbytes(20_000))


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def opening(folder: str) -> float:
    """Wall-clock seconds of opening the mirror in a process of its own, which has yet to import MLflow."""
    result = subprocess.run([sys.executable, __file__, folder], check=True, capture_output=True, text=True)
    return float(result.stdout)


def measure(n: int, folder: str) -> str:
    """A row of the table."""
    store = RecordStore(Path(folder))
    store.prepare()
    records = [synthetic(i) for i in range(n)]
    for record in records:
        keep(store, record)
    store.open_sweep("qbench -m +sweep=synthetic", [record["fingerprint"] for record in records])
    mirror = open_mirror(folder)
    times = [timed(partial(mirror.mirror, record)) for record in records]
    mirror.close()
    last = times[-LAST:]
    wall, cpu = (1000 * sum(t) / len(last) for t in zip(*last, strict=True))
    marks = mirror.marks
    check, _ = timed(lambda: [marks.has(record) for record in records])
    with_marks = opening(folder)
    marks.clear()
    without = opening(folder)
    assert all(marks.has(record) for record in records)
    megabytes = (Path(folder) / "mlflow.db").stat().st_size / 1e6
    cells = f"{wall:.1f} | {cpu:.1f} | {with_marks:.2f} | {without:.1f} | {check:.2f} | {megabytes:.0f}"
    return f"| {n} | {cells} |"


def open_mirror(folder: str) -> MLflowMirror:
    return MLflowMirror(f"sqlite:///{folder}/mlflow.db", "qbench", RecordStore(Path(folder)))


def main() -> None:
    os.environ["MLFLOW_CONFIGURE_LOGGING"] = "0"
    argument = sys.argv[1] if len(sys.argv) > 1 else "1000"
    if not argument.isdecimal():
        print(timed(partial(open_mirror, argument))[0])
        return
    head = ["runs", f"a record (last {LAST}), wall ms", "CPU ms", "open s", "open without marks s"]
    head += ["check all marks s", "database MB"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    with tempfile.TemporaryDirectory() as folder:
        print(measure(int(argument), folder))


if __name__ == "__main__":
    main()
