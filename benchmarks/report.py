"""Time the reading and tabulating of many jobs, and how much memory it takes.

    OMP_NUM_THREADS=1 python benchmarks/report.py [jobs] [runs]

Makes records of 10,000 jobs, or as many as are asked for, in a temporary folder: 4 models, 5 algorithms, 10 schemes, 5
calibration sets and 10 seeds, each with 29 metrics and 112 samples. They are read and tabulated in a process of their
own, step by step. Then 1,000 of them, or as many as are asked for, are mirrored to MLflow in SQLite and read from there.
Prints a Markdown table of wall-clock seconds; the total is of reading and tabulating, `CPU` its processor time.

    python benchmarks/report.py make <folder> <jobs>     only makes the records
    python benchmarks/report.py read <folder> [uri]      only reads them, and prints the steps as JSON
"""

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qbench.track.mirror import MLflowMirror
from qbench.track.records import Record, RecordStore
from qbench.track.source import source_of

MODELS = ("llama-a", "llama-b", "qwen-a", "opt-a")
ALGORITHMS = ("rtn", "gptq", "awq", "omniquant", "hqq")
SCHEMES = tuple(f"w{bits}a16{group}" for bits in (2, 3, 4, 6, 8) for group in ("", "g128"))
CALIB = ("wikitext2", "c4", "pileval", "docs", "code")
SEEDS = range(10)
TEXTS, WINDOWS, DOCUMENTS = ("wikitext2", "c4"), 24, 64
TASKS = ("piqa", "arc_easy", "boolq")
COSTS = (
    "load_time_s", "peak_mem_load_mb", "calib_time_s", "peak_mem_calib_mb", "eval_time_s", "peak_mem_eval_mb",
    "bits_per_linear_weight", "model_mb", "block_error_mean", "calib_overlap",
)  # fmt: skip
FAILS = 100  # one job in so many


def synthetic(i: int) -> Record:
    """The record of job `i`, in the shape of a real one."""
    rng = random.Random(i)
    cells = list(product(SEEDS, CALIB, SCHEMES, ALGORITHMS, MODELS))
    seed, calib, scheme, algo, model = cells[i % len(cells)]
    wbits, group = int(scheme[1]), 128 if scheme.endswith("g128") else None
    start = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=40 * i)
    failed = i % FAILS == FAILS - 1
    labels = {
        "model": model, "algo": algo, "scheme": scheme, "wbits": wbits, "abits": 16, "kvbits": 16,
        "group_size": group, "calib": calib, "seed": seed,
    }  # fmt: skip
    hyper = {"damp": 0.01, "block_size": 128, "act_order": True, "static_groups": True}
    texts = {f"eval/{t}": {"origin": f"file {t}.jsonl", "sha256": f"{len(t):064x}"} for t in TEXTS}
    overlap = {
        f"calib/{calib}": {
            "shape": [128, 2048],
            "sha256": f"{seed:064x}",
            "overlap": dict.fromkeys(TEXTS, 0.0),
        }
    }
    return {
        "fingerprint": f"{rng.getrandbits(64):016x}",
        "labels": labels,
        "identity": {
            "model": {"id": model, "revision": None, "dtype": "float32", "attn": "sdpa", "content": f"{len(model):016x}"},
            "algorithm": {"name": algo.upper(), "revision": 1} | hyper | {"index": i // len(cells)},
            "scheme": scheme,
            "calib": {"name": calib, "n_samples": 128, "seq_len": 2048, "propagate_error": True, "seed": seed,
                      "files": {f"{calib}/train": f"{len(calib):016x}"}},
            "evaluation": {"ppl": list(TEXTS), "tasks": list(TASKS), "seq_len": 2048, "max_windows": WINDOWS,
                           "limit": DOCUMENTS, "files": {"c4/validation": f"{4:016x}"}},
            "engine": 2,
        },
        "environment": {
            "versions": {"python": "3.11.7", "platform": "Linux-6.1-x86_64-with-glibc2.36"}
            | dict.fromkeys(("qbench", "torch", "transformers", "lm_eval", "datasets", "numpy"), "1.2.3"),
            "git_commit": f"{0:040x}",
            "command": "qbench -m algo=rtn,gptq,awq,omniquant,hqq wbits=2,3,4,6,8 calib=wikitext2,c4,pileval,docs,code",
        },
        "device": "x86_64 CPU, 1 threads",
        "config": labels | {"algo": {"_target_": "qbench.algorithms.gptq.GPTQ"} | hyper}
        | {f"{part}{k}": {"option": k, "value": None} for part in ("scheme", "data", "eval") for k in range(20)},
        "started": start.isoformat(),
        "status": "failed" if failed else "done",
        "reason": "LinAlgError: not positive definite" if failed else None,
        "metrics": {} if failed else _metrics(rng, wbits),
        "block_errors": [rng.random() for _ in range(8)],
        "block_reports": [],
        "data": texts | overlap,
        "left_out": {},
        "finished": (start + timedelta(seconds=30)).isoformat(),
        "worker": "0101-120000-abcdef-host-1-0.1",
    }  # fmt: skip


def _metrics(rng: random.Random, wbits: int) -> dict[str, float]:
    found = {name: rng.random() * 100 for name in COSTS} | {"bits_per_weight": wbits + 0.25}
    for name in [f"{kind}/{text}" for kind in ("ppl", "bpb", "kl") for text in TEXTS] + [
        f"acc/{t}" for t in TASKS
    ]:
        found |= {name: 1 + rng.random(), f"{name}_stderr": rng.random() / 10}
    return found


def samples_of(rng: random.Random) -> list[dict[str, Any]]:
    windows = [
        {"metric": f"ppl/{t}", "item": i, "value": rng.random()} for t in TEXTS for i in range(WINDOWS)
    ]
    return windows + [
        {"metric": "acc/piqa", "item": i, "value": float(rng.random() < 0.5)} for i in range(DOCUMENTS)
    ]


def make(folder: Path, n: int) -> None:
    """Write records as `RecordStore.write` lays them out, without waiting for the disk."""
    store = RecordStore(folder)
    store.prepare()
    for i in range(n):
        record = synthetic(i)
        path = store.path(record["fingerprint"])
        path.mkdir()
        (path / "record.json").write_text(json.dumps(record, indent=1) + "\n")
        if record["status"] == "done":
            pq.write_table(pa.Table.from_pylist(samples_of(random.Random(i))), path / "samples.parquet")


def read(folder: Path, uri: str | None) -> dict[str, float]:
    """Seconds of each step, then rows and peak memory."""
    taken: dict[str, float] = {}

    def timed(name: str, action: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = action()
        taken[name] = time.perf_counter() - start
        return found

    def libraries() -> None:
        import qbench.report.tables  # noqa: F401

    timed("import", libraries)
    from qbench.report.frame import tidy
    from qbench.report.tables import by_metric, quality_metrics, summary, write

    source = source_of(folder, uri, "qbench")
    records = timed("load", lambda: list(source.all()))
    after_load = _peak()
    frame = timed("tidy", lambda: tidy(records))
    table = timed("summary", lambda: summary(frame))
    timed("by_metric", lambda: [by_metric(frame, metric) for metric in quality_metrics(frame)])
    timed("write", lambda: write(frame, folder / "tables"))
    before = _peak()
    taken["total"], taken["CPU"] = sum(taken.values()), time.process_time()
    rows = timed("sample_table", lambda: source.sample_table([r["fingerprint"] for r in records]))
    sizes = {"MiB after load": after_load, "MiB after write": before, "MiB": _peak()}
    return taken | sizes | {"jobs": len(table), "rows": len(rows)}


def _peak() -> float:
    """The largest resident set of this process so far, MiB.

    `ru_maxrss` will not do: a process begins with that of whoever started it.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) / 1024


def in_a_process(*arguments: str) -> dict[str, float]:
    """What `read` found, in a process that has done nothing else."""
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(n: int, n_runs: int) -> None:
    steps = ("import", "load", "tidy", "summary", "by_metric", "write", "total", "CPU", "sample_table")
    sizes = ("MiB after load", "MiB after write", "MiB")
    print(f"| from | jobs | {' | '.join(f'{s} s' for s in steps)} | {' | '.join(sizes)} |")
    print("|" + "---|" * (len(steps) + len(sizes) + 2))
    with tempfile.TemporaryDirectory() as name:
        folder, few = Path(name) / "all", Path(name) / "few"
        uri = f"sqlite:///{name}/mlflow.db"
        make(folder, n)
        make(few, n_runs)
        store = RecordStore(few)
        mirror = MLflowMirror(uri, "qbench", store)
        for record in store.all():
            mirror.mirror(record)
        for title, arguments in (("records", [folder]), ("records", [few]), ("MLflow", [few, uri])):
            found = in_a_process("read", *map(str, arguments))
            cells = [f"{found[s]:.1f}" for s in steps] + [f"{found[s]:.0f}" for s in sizes]
            print(f"| {title} | {found['jobs']} | {' | '.join(cells)} |")


def main() -> None:
    match sys.argv[1:]:
        case ["make", folder, n]:
            make(Path(folder), int(n))
        case ["read", folder, *uri]:
            print(json.dumps(read(Path(folder), uri[0] if uri else None)))
        case sizes:
            n, n_runs = (*map(int, sizes), *(10_000, 1_000)[len(sizes) :])
            measure(n, n_runs)


if __name__ == "__main__":
    main()
