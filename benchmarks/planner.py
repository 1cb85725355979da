"""Time the planner: a grid of 100,000 cells, pruned, and subtracted from 10,000 records.

    python benchmarks/planner.py [cells in thousands, 100 by default]

The records are those of the grid's first jobs: each is a file of the size that a real job leaves, with the fingerprint
of its job, so that the planner reads as much as it would. Prints a Markdown table.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_automatic_config_search_path
from hydra.types import RunMode

from qbench.sweep.grid import expand
from qbench.sweep.plan import make_plan
from qbench.sweep.shipped import CONF
from qbench.track.records import RecordStore

N_RECORDS = 10_000


def grid_of(cells: int, results: Path):  # type: ignore[no-untyped-def]
    """6 algorithm settings x 10 schemes x 2 models x 2 calibration sets x as many seeds as it takes."""
    arguments = [
        "algo=rtn,gptq,awq,smoothquant", "scheme=w8a16,w4a16,w3a16,w2a16,w4a16g128,w3a16g128,w2a16g128,w8a8,w6a6,w4a4",
        "model=nano-llama,micro-llama", "calib=stdlib_docs,stdlib_code", "eval=quick", "calib.seq_len=256",
        "calib.n_samples=4,8", f"seed=range({max(1, round(cells / 320))})", f"results={results}",
    ]  # fmt: skip
    loader = ConfigLoaderImpl(create_automatic_config_search_path(None, None, str(CONF)))
    master = loader.load_configuration("config", [], run_mode=RunMode.MULTIRUN)
    return expand(arguments, loader, master)


def main() -> None:
    cells = int(sys.argv[1] if len(sys.argv) > 1 else 100) * 1000
    with tempfile.TemporaryDirectory() as folder:
        store = RecordStore(Path(folder))
        store.prepare()
        first = make_plan(grid_of(cells, store.root), is_sweep=True)
        for fingerprint, job in list(first.todo.items())[:N_RECORDS]:
            record = {
                "fingerprint": fingerprint,
                "status": "done",
                "labels": job.labels,
                "identity": job.identity(),
            }
            record |= {"config": job.settings, "metrics": {f"metric_{i}": i / 7 for i in range(40)}}
            path = store.path(fingerprint)
            path.mkdir()
            (path / "record.json").write_text(json.dumps(record, indent=1))
        del first
        clock, cpu = time.perf_counter(), time.process_time()
        plan = make_plan(grid_of(cells, store.root), is_sweep=True)
        wall, cpu = time.perf_counter() - clock, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print("| cells | pruned | the same job | recorded | to run | wall s | CPU s | peak MiB |")
        print("|---|---|---|---|---|---|---|---|")
        done = len(plan.wanted) - len(plan.todo)
        numbers = (plan.cells, plan.pruned.total(), plan.duplicates, done, len(plan.todo))
        print("| " + " | ".join(f"{n:,}" for n in numbers) + f" | {wall:.1f} | {cpu:.1f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
