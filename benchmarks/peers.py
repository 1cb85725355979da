"""Quantization time, peak memory and quality: qbench and three other libraries, in one run on one machine.

    python benchmarks/peers.py install ENVS            environments of the peers, once
    python benchmarks/peers.py run --envs ENVS         measure what is not measured yet, then print the table
    python benchmarks/peers.py table                   print the table

Every system gets the same model folder and the same calibration tokens, runs in a process of its own, one at a time,
and on one core. Only the quantization call is timed: not imports, loading, or saving. Each leaves an ordinary
float32 model with the weights on their grids, and one program judges them all (peers/judge.py). How each is set up
stands in peers/run_<system>.py. A repetition runs all systems before the next one begins.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy

HERE = Path(__file__).resolve().parent / "peers"
PACKAGES = {
    "llmcompressor": ["llmcompressor==0.14.0.1"],
    "gptqmodel": ["gptqmodel==7.6.0"],
    "inc": ["neural-compressor-pt==3.10", "transformers==5.17.0", "accelerate", "numba"],
}
TORCH = "torch==2.13.0"
SYSTEMS = ("qbench", *PACKAGES)
# Samples run together: qbench's default; the others' too. With 8, GPTQ of llmcompressor and gptqmodel took as long (within
# 4 %) and 100 to 130 MB more; not tried for inc and for AWQ.
BATCH_SIZE = {"qbench": 2, "llmcompressor": 1, "gptqmodel": 1, "inc": 1}
# Of weights and arithmetic where it is not `--dtype`.
# gptqmodel's AWQ refuses float32, and where it is made to accept it, its search overwrites the weights that it means
# to restore (what should be a copy of them, in float32, is then no copy).
DTYPE = {("gptqmodel", "awq"): "bfloat16"}
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip

Record = dict[str, Any]


def install(envs: Path) -> None:
    """One environment per peer, all with the same torch: a peer's own choice may be another build."""
    for system, packages in PACKAGES.items():
        subprocess.run([sys.executable, "-m", "venv", str(envs / system)], check=True)
        pip = [str(envs / system / "bin" / "python"), "-m", "pip", "install", "-q"]
        subprocess.run([*pip, TORCH, "numpy", "wheel", "setuptools"], check=True)
        subprocess.run([*pip, TORCH, *packages], check=True)


def call(python: str, script: str, *arguments: object, log: Path) -> None:
    """Run a script of peers/ to its end.

    Raises:
        RuntimeError: If it fails; names the log.
    """
    with log.open("w") as file:
        command = [python, str(HERE / script), *map(str, arguments)]
        done = subprocess.run(command, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(map(str, arguments))} failed, see {log}")


def measure(
    system: str,
    model: str,
    method: str,
    samples: tuple[int, int],
    options: argparse.Namespace,
    judge: bool = True,
) -> Record:
    """One measurement in a process of its own; the quantized model is judged and deleted."""
    folder = options.work / model
    tokens = folder / f"tokens-{samples[0]}x{samples[1]}.npy"
    if not tokens.exists():
        folder.mkdir(parents=True, exist_ok=True)
        call(sys.executable, "inputs.py", model, folder, *samples, log=folder / "inputs.log")
    run = folder / f"{system}-{method}"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    request = {
        "model": str(folder / "model"), "tokens": str(tokens), "method": method, "core": options.core,
        "batch_size": BATCH_SIZE[system], "dtype": DTYPE.get((system, method), options.dtype),
        "out": str(run / "model"), "answer": str(run / "answer.json"),
    }  # fmt: skip
    (run / "request.json").write_text(json.dumps(request))
    python = sys.executable if system == "qbench" else str(options.envs / system / "bin" / "python")
    record: Record = {"started": datetime.now().isoformat(timespec="seconds"), "load": os.getloadavg()[0]}
    call(python, f"run_{system}.py", run / "request.json", log=run / "log.txt")
    record |= json.loads((run / "answer.json").read_text()) | {"batch_size": BATCH_SIZE[system]}
    if judge:
        arguments = (model, request["model"], request["out"], run / "quality.json")
        call(sys.executable, "judge.py", *arguments, log=run / "judge.txt")
        record |= json.loads((run / "quality.json").read_text())
    shutil.rmtree(run / "model")
    return record


def run(options: argparse.Namespace) -> None:
    """Measure what has no record, and write a line for each measurement as soon as it is there."""
    options.work.mkdir(parents=True, exist_ok=True)
    done = [] if options.force else [identity(record) for record in read(options)]
    warm: set[tuple[str, str]] = set()
    cells = product(range(options.repeat), options.models, options.methods, options.systems)
    for repetition, model, method, system in cells:
        key = {
            "system": system,
            "model": model,
            "method": method,
            "samples": options.samples,
            "repetition": repetition,
        }
        if identity(key) in done:
            continue
        try:
            if (system, method) not in warm:  # compiles what a library compiles when it is first used
                measure(system, "micro-llama", method, (1, 128), options, judge=False)
                warm.add((system, method))
            record = key | measure(system, model, method, options.samples, options)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            continue
        record |= {"python": platform.python_version(), "note": options.note}
        with (options.work / "measurements.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(
            f"{model} {method} {system}: {record['seconds']:.1f} s ({record['cpu_seconds']:.1f} of CPU)",
            file=sys.stderr,
        )


def identity(record: Record) -> tuple[Any, ...]:
    return (*(record[k] for k in ("system", "model", "method", "repetition")), *record["samples"])


def read(options: argparse.Namespace) -> list[Record]:
    """The records, the last one of each cell."""
    file = options.work / "measurements.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return list({identity(r): r for r in map(json.loads, lines)}.values())


def rows(model: str, method: str, options: argparse.Namespace) -> Iterator[list[str]]:
    records = [r for r in read(options) if (r["model"], r["method"]) == (model, method)]
    records = [r for r in records if tuple(r["samples"]) == options.samples]
    by_system = {s: [r for r in records if r["system"] == s] for s in SYSTEMS}
    own = by_system["qbench"]
    for system, runs in by_system.items():
        if not runs:
            continue
        wall, cpu, peak = (
            statistics.median(r[k] for r in runs) for k in ("seconds", "cpu_seconds", "peak_mb")
        )
        grown = statistics.median(r["peak_mb"] - r["before_mb"] for r in runs)
        share = f"{cpu / statistics.median(r['cpu_seconds'] for r in own):.1f}" if own else ""
        quality, difference = judged(runs[0], own[0] if own else None)
        version = [*runs[0]["versions"].values()][-1]
        yield [
            f"{system} {version}", str(len(runs)),
            f"{wall:.1f}", f"{cpu:.1f}", share, f"{peak:.0f}", f"{grown:.0f}", quality, difference,
        ]  # fmt: skip


def judged(record: Record, own: Record | None) -> tuple[str, str]:
    """Perplexity (or divergence) of a record, and how much more it is than qbench's, with the paired standard error."""
    values = numpy.array(record["values"])
    level = float(numpy.exp(values.mean()) if record["metric"] == "nll" else values.mean())
    digits = 3 if record["metric"] == "nll" else 5
    if own is None or own is record:
        return f"{level:.{digits}f}", ""
    gap = values - numpy.array(own["values"])
    slope = level if record["metric"] == "nll" else 1.0  # of the exponential
    error = slope * gap.std(ddof=1) / len(gap) ** 0.5
    return f"{level:.{digits}f}", f"{slope * gap.mean():+.{digits}f} ± {error:.{digits}f}"


def table(options: argparse.Namespace) -> None:
    for model, method in product(options.models, options.methods):
        lines = list(rows(model, method, options))
        if not lines:
            continue
        config = options.work / model / "model" / "config.json"
        arguments = [str(a) for a in (config, method, *options.samples, options.core)]
        command = [sys.executable, str(HERE / "floor.py"), *arguments]
        floor = json.loads(subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True).stdout)
        quality = "perplexity" if model == "micro-llama" else "KL, nats"
        print(f"\n{method} w4g128, {model}, {options.samples[0]} x {options.samples[1]} tokens\n")
        print(f"| | runs | s | CPU s | times qbench | peak MB | grown MB | {quality} | more than qbench |")
        print("|" + "---|" * 9)
        for line in lines:
            print("| " + " | ".join(line) + " |")
        print(f"| floor | | {floor['seconds']:.1f} | | | | | | |")
        print(f"\n{floor['gflop']:.0f} Gflop at {floor['gflops']:.1f} Gflop/s.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("install", "run", "table"))
    parser.add_argument("folder", nargs="?", type=Path, help="for install: where the environments go")
    parser.add_argument("--envs", type=Path, help="where the environments are")
    parser.add_argument("--work", type=Path, default=Path("results/peers"))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument(
        "--models", nargs="+", default=["micro-llama"], help="micro-llama, random-llama[-LAYERS]"
    )
    parser.add_argument("--methods", nargs="+", choices=("gptq", "awq"), default=["gptq", "awq"])
    parser.add_argument("--samples", nargs=2, type=int, default=(128, 512), metavar=("N", "LENGTH"))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of weights and arithmetic; bfloat16 is the faster where the processor has products of it; use another --work",
    )
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--force", action="store_true", help="measure again what has a record")
    parser.add_argument(
        "--note", default="", help="kept with the records, such as what else the machine does"
    )
    options = parser.parse_args()
    options.samples = tuple(options.samples)
    options.work = options.work.resolve()
    if options.command == "install":
        install(options.folder or parser.error("install needs a folder"))
        return
    if options.command == "run":
        if options.envs is None and set(options.systems) != {"qbench"}:
            parser.error("run needs --envs, the folder given to install")
        options.envs = options.envs and options.envs.resolve()
        run(options)
    table(options)


if __name__ == "__main__":
    main()
