"""What a job costs besides quantizing and evaluating: a qbench sweep, one process per job, and plain Hydra with MLflow.

    python benchmarks/overhead.py [jobs of the sweep, 60 by default]

The same jobs throughout (GPTQ on nano-llama with another seed each), one thread. The overhead of a job is the time from
its start to the start of the next, less what it spent on quantizing and evaluating; the first ten of a process
are left out. In one process per job it is the wall-clock time of the process instead. All write to MLflow on SQLite.
Prints a Markdown table.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

JOB = ["algo=gptq", "model=nano-llama", "eval=quick", "calib.n_samples=8", "calib.seq_len=128"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


def timed(command: list[str], folder: str) -> float:
    clock = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, env=ENVIRONMENT, capture_output=True)
    return time.perf_counter() - clock


def work(metrics: dict[str, float]) -> float:
    return metrics["calib_time_s"] + metrics["eval_time_s"]


def steady(folder: str, first: int = 10) -> list[float]:
    """The overhead of every job but the first ones and the last."""
    records = [json.loads(p.read_text()) for p in Path(folder).glob("results/records/*/record.json")]
    records = sorted((r for r in records if r["labels"]["algo"] != "fp"), key=lambda r: r["started"])
    starts = [datetime.fromisoformat(r["started"]).timestamp() for r in records]
    gaps = zip(starts, starts[1:], records, strict=False)
    return [after - before - work(r["metrics"]) for before, after, r in gaps][first:]


def sweep(n: int, launcher: str) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        seeds = f"seed=range({n})"
        timed([sys.executable, "-m", "qbench", "-m", *JOB, seeds, f"launcher={launcher}"], folder)
        return steady(folder)


def one_process_each(n: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "qbench", *JOB]
        timed([*command, "seed=999"], folder)  # makes the database
        walls = [timed([*command, f"seed={seed}"], folder) for seed in range(n)]
        records = [json.loads(p.read_text()) for p in Path(folder).glob("results/records/*/record.json")]
        spent = {r["labels"]["seed"]: work(r["metrics"]) for r in records}
        return [wall - spent[seed] for seed, wall in enumerate(walls)]


def plain_hydra(n: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["-m", "hydra/sweeper=basic", *JOB, f"seed=range({n})"]
        timed([sys.executable, __file__, "task", *arguments], folder)
        return steady(folder, first=5)


def task() -> None:
    """What one writes without qbench's engine: Hydra's own multirun, everything loaded by each job, MLflow's own API."""
    import hydra
    import mlflow
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from qbench.engine import quantize
    from qbench.evaluate.evaluator import Evaluator
    from qbench.sweep.compose import plain
    from qbench.sweep.settings import Jobs
    from qbench.sweep.shipped import CONF
    from qbench.track.records import flatten

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def main(config: DictConfig) -> None:
        started = datetime.now().astimezone()
        job = Jobs().job(plain(config, HydraConfig.get().runtime.choices["algo"]))
        assert job.calib is not None
        model, tokenizer = job.model.load(), job.model.tokenizer()
        tokens = job.calib.tokens(tokenizer)
        clock = time.perf_counter()
        quantize(model, job.algorithm, job.scheme, tokens)
        calib = time.perf_counter() - clock
        job.evaluation.prepare(tokenizer, job.library)
        clock = time.perf_counter()
        result = Evaluator(job.evaluation, model, tokenizer, job.library).run()
        metrics = result.metrics | {"calib_time_s": calib, "eval_time_s": time.perf_counter() - clock}
        mlflow.set_tracking_uri("sqlite:///mlflow.db")
        mlflow.set_experiment("plain")
        record = {"started": started.isoformat(), "labels": job.labels, "metrics": metrics}
        folder = Path("results/records") / job.fingerprint
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(record))
        with mlflow.start_run():
            mlflow.log_params({key: str(value) for key, value in flatten(job.settings).items()})
            mlflow.log_metrics(metrics)
            mlflow.log_artifact(str(folder / "record.json"))

    main()


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    rows = {
        "qbench, one worker process": sweep(n, "local"),
        "qbench, in the command's own process": sweep(n, "inline"),
        "(a) one process per job": one_process_each(8),
        "(b) plain Hydra and MLflow": plain_hydra(25),
    }
    base = statistics.median(rows["qbench, one worker process"])
    print("| | jobs | median s | 90th percentile s | times qbench |\n|---|---|---|---|---|")
    for name, values in rows.items():
        high = statistics.quantiles(values, n=10)[-1]
        middle = statistics.median(values)
        print(f"| {name} | {len(values)} | {middle:.3f} | {high:.3f} | {middle / base:.0f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["task"]:
        del sys.argv[1]
        task()
    else:
        main()
