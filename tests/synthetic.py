"""Made-up jobs for tests of reports: records and samples as a sweep would leave them, with differences that are known.

    jobs = made(Grid(algos=("rtn", "gptq", "awq"), seeds=(0, 1, 2)), effect)     # (record, samples) of every job
    store = stored(tmp_path, jobs)          # a results folder, written as a job writes it
    source = Memory(jobs)                   # the same, without files

`effect(labels, metric)` says what a job's quantization truly does: for a text, the nats that are added to every window's
loss; for a task, what is taken from the log-odds of every answer. Windows (and documents) differ in how hard they are, alike
for all jobs of a model; a job adds noise to each window, and a draw of calibration samples adds its luck to all of them.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qbench.track.records import Record, RecordStore, in_order

Sample = dict[str, Any]
Jobs = list[tuple[Record, list[Sample]]]
Effect = Callable[[Mapping[str, Any], str], float]

DATA_FREE = ("fp", "rtn", "hqq")
_DAMAGE = {2: 0.8, 3: 0.2, 4: 0.05, 8: 0.005}  # nats by bits
_KEPT = {"fp": 0.0, "rtn": 1.0, "hqq": 0.8, "gptq": 0.5, "awq": 0.45}  # share of it by algorithm
_SCHEMA = pa.schema(
    [("fingerprint", pa.string()), ("metric", pa.string()), ("item", pa.int64()), ("value", pa.float64()),
     ("part", pa.string())]
)  # fmt: skip


def plausible(labels: Mapping[str, Any], metric: str) -> float:
    """Fewer bits harm more, and calibration on the text that is read helps by a tenth."""
    damage = _DAMAGE.get(labels["wbits"], 0.0) * _KEPT.get(labels["algo"], 0.7)
    return damage * (0.9 if metric == f"ppl/{labels['calib']}" else 1.0)


def none(labels: Mapping[str, Any], metric: str) -> float:
    """No recipe differs from another."""
    return 0.0


@dataclass(frozen=True)
class Grid:
    """The jobs of a sweep, and how they were evaluated.

    Attributes:
        calibs, seeds: Of the algorithms that read calibration data; one that does not is one job for each scheme.
        texts, tasks: How many windows or documents each has.
        floating: Whether each model was run in floating point too.
        noise: Standard deviation of a job's windows' losses about what they are for others, and of a document's log-odds.
        luck: Standard deviation that all windows of a draw share.
        hyper: Hyperparameters of every algorithm.
        identity: What is said otherwise in the identity, by dotted key, as in `{"model.dtype": "bfloat16"}`.
        seed: Of everything that is drawn here.
    """

    models: Sequence[str] = ("micro-llama",)
    algos: Sequence[str] = ("rtn", "gptq", "awq")
    schemes: Sequence[str] = ("w3a16g128",)
    calibs: Sequence[str] = ("stdlib_docs",)
    seeds: Sequence[int] = (0,)
    texts: Mapping[str, int] = field(default_factory=lambda: {"stdlib_docs": 24})
    tasks: Mapping[str, int] = field(default_factory=dict)
    floating: bool = True
    noise: float = 0.02
    luck: float = 0.0
    hyper: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


def made(grid: Grid, effect: Effect = plausible) -> Jobs:
    """The jobs of a grid in the order in which they began."""
    return [_job(grid, labels, effect, i) for i, labels in enumerate(_cells(grid))]


def failed(record: Record, reason: str = "LinAlgError: not positive definite") -> tuple[Record, list[Sample]]:
    """The same job, had it failed."""
    return record | {"status": "failed", "reason": reason, "metrics": {}, "block_errors": []}, []


def stored(root: Path, jobs: Jobs) -> RecordStore:
    """A results folder with these jobs."""
    store = RecordStore(root)
    store.prepare()
    for record, samples in jobs:
        store.write(record, samples)
    return store


@dataclass(frozen=True)
class Memory:
    """A source of jobs that were never written: much faster where there are hundreds of tables to make."""

    jobs: Jobs

    @property
    def where(self) -> str:
        return "memory"

    def all(self) -> Iterator[Record]:
        return iter(in_order(record for record, _ in self.jobs))

    def samples(self, fingerprint: str) -> list[Sample]:
        return next((samples for record, samples in self.jobs if record["fingerprint"] == fingerprint), [])

    def sample_table(self, fingerprints: Sequence[str]) -> pa.Table:
        by = {record["fingerprint"]: samples for record, samples in self.jobs}
        rows = [
            {"fingerprint": name, "part": None} | row for name in fingerprints for row in by.get(name, ())
        ]
        return pa.Table.from_pylist(rows, schema=_SCHEMA)

    def folder(self, fingerprint: str) -> Path:
        raise FileNotFoundError(fingerprint)

    def link(self, fingerprint: str) -> str | None:
        return None


def _cells(grid: Grid) -> Iterable[dict[str, Any]]:
    floating = [(m, "fp", "w16a16") for m in grid.models] if grid.floating else []
    for model, algo, scheme in [*floating, *product(grid.models, grid.algos, grid.schemes)]:
        data_free = algo in DATA_FREE
        for calib, seed in [(None, None)] if data_free else product(grid.calibs, grid.seeds):
            yield {
                "model": model,
                "algo": algo,
                "scheme": scheme,
                **_bits(scheme),
                "calib": calib,
                "seed": seed,
            }


def _bits(scheme: str) -> dict[str, Any]:
    """`w3a16kv4g128` and what follows it -> the labels that it stands for."""
    found = re.match(r"w(\d+)a(\d+)(?:kv(\d+))?(?:g(\d+))?", scheme)
    assert found, f"{scheme} is no scheme"
    w, a, kv, group = found.groups()
    return {
        "wbits": int(w),
        "abits": int(a),
        "kvbits": int(kv or 16),
        "group_size": int(group) if group else None,
    }


def _rng(*key: object) -> np.random.Generator:
    """What is drawn for one thing does not depend on which others there are."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big"))


def _job(grid: Grid, labels: dict[str, Any], effect: Effect, i: int) -> tuple[Record, list[Sample]]:
    identity = _identity(grid, labels)
    text = json.dumps(identity, sort_keys=True)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
    what = (grid.seed, labels["model"])
    own = (*what, text)
    luck = _rng(*own).normal(0, grid.luck) if labels["seed"] is not None else 0.0
    noise = 0.0 if labels["algo"] == "fp" else grid.noise
    samples, metrics = [], _costs(labels)
    for name, n in grid.texts.items():
        hard = _rng(*what, name).normal(3, 0.6, n)
        change = effect(labels, f"ppl/{name}") + luck + _rng(*own, name).normal(0, 1, n) * noise
        samples += _rows(f"ppl/{name}", hard + change)
        metrics |= _perplexity(name, hard + change)
    for name, n in grid.tasks.items():
        rng = _rng(*what, name)
        ease, asked = rng.normal(0.5, 1.5, n), rng.logistic(0, 1, n)
        ease = ease - effect(labels, f"acc/{name}") + _rng(*own, name).normal(0, 1, n) * noise
        marks = (ease + asked > 0).astype(float)
        samples += _rows(f"acc/{name}", marks)
        metrics |= {f"acc/{name}": marks.mean(), f"acc/{name}_stderr": marks.std(ddof=1) / np.sqrt(n)}
    metrics = {name: float(value) for name, value in metrics.items()}
    return _record(fingerprint, labels, identity, metrics, i), samples


def _rows(metric: str, values: np.ndarray) -> list[Sample]:
    return [{"metric": metric, "item": i, "value": value} for i, value in enumerate(values.tolist())]


def _perplexity(text: str, nll: np.ndarray) -> dict[str, float]:
    error, ppl = nll.std(ddof=1) / np.sqrt(len(nll)), np.exp(nll.mean())
    nats = 3 * np.log(2)  # of a token of three bytes, per bit per byte
    return {
        f"ppl/{text}": ppl, f"ppl/{text}_stderr": ppl * error,
        f"bpb/{text}": nll.mean() / nats, f"bpb/{text}_stderr": error / nats,
    }  # fmt: skip


def _costs(labels: Mapping[str, Any]) -> dict[str, float]:
    bits = labels["wbits"] + (16 / labels["group_size"] if labels["group_size"] else 0.0)
    return {
        "load_time_s": 0.5, "calib_time_s": 0.1 if labels["calib"] is None else 4.0, "peak_mem_calib_mb": 900.0,
        "bits_per_weight": bits + 0.5, "bits_per_linear_weight": bits, "model_mb": 0.6 * (bits + 0.5),
        "eval_time_s": 20.0, "peak_mem_eval_mb": 950.0,
    }  # fmt: skip


def _identity(grid: Grid, labels: Mapping[str, Any]) -> dict[str, Any]:
    calib = None
    if labels["calib"] is not None:
        calib = {
            "name": labels["calib"],
            "n_samples": 16,
            "seq_len": 256,
            "propagate_error": True,
            "seed": labels["seed"],
        }
    found: dict[str, Any] = {
        "model": {"id": labels["model"], "revision": None, "dtype": "float32", "attn": "sdpa", "content": "ab" * 8},
        "algorithm": {"name": labels["algo"].upper(), "revision": 1}
        | (dict(grid.hyper) if labels["algo"] != "fp" else {}),
        "scheme": labels["scheme"],
        "calib": calib,
        "evaluation": {"ppl": list(grid.texts), "tasks": list(grid.tasks), "seq_len": 256, "max_windows": 24, "limit": 64},
        "engine": 2,
    }  # fmt: skip
    for key, value in grid.identity.items():
        section, _, name = key.partition(".")
        if found[section] is not None:
            found[section][name] = value
    return found


def _record(
    fingerprint: str, labels: dict[str, Any], identity: dict[str, Any], metrics: dict[str, float], i: int
) -> Record:
    began = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=40 * i)
    data = identity["calib"] or {
        "name": "stdlib_docs",
        "n_samples": 128,
        "seq_len": 2048,
    }  # as configs have it
    return {
        "fingerprint": fingerprint, "labels": labels, "identity": identity,
        "environment": {
            "versions": {"python": "3.11.7", "torch": "2.13.0", "qbench": "0.1.0"}, "git_commit": "0" * 40,
            "command": "qbench -m",
        },
        "device": "x86_64 CPU, 1 threads",
        "config": {
            "wbits": labels["wbits"], "seed": labels["seed"] or 0, "calib": data,
            "model": {"id": f"zoo/{labels['model']}"}, "algo": identity["algorithm"], "algo_name": labels["algo"],
        },
        "started": began.isoformat(), "status": "done", "reason": None, "metrics": metrics,
        "block_errors": [0.01] * 4, "block_reports": [],
        "data": {f"eval/{text}": {"origin": "made up", "sha256": "f" * 64} for text in identity["evaluation"]["ppl"]},
        "left_out": {}, "finished": (began + timedelta(seconds=30)).isoformat(), "worker": "made-up",
    }  # fmt: skip
