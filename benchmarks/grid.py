"""Time the README's grid: from nothing, and again when everything is recorded.

    python benchmarks/grid.py [extra overrides]

Prints a Markdown table: wall-clock and CPU seconds of the command, and the phases of each job from its record.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [sys.executable, "-m", "qbench", "-m", "algo=rtn,gptq,awq", "wbits=4,3,2", *sys.argv[1:]]


def timed(folder: str) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one run of the command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    clock = time.perf_counter()
    subprocess.run(COMMAND, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall = time.perf_counter() - clock
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print("| | wall s | CPU s |\n|---|---|---|")
        for name in ("first run", "again"):
            wall, cpu = timed(folder)
            print(f"| {name} | {wall:.1f} | {cpu:.1f} |")
        print(
            "\n| job | load s | calib s | eval s | calib peak MB | eval peak MB |\n|---|---|---|---|---|---|"
        )
        records = [json.loads(p.read_text()) for p in Path(folder).glob("results/records/*/record.json")]
        for record in sorted(records, key=lambda r: r["started"]):
            keys = ("load_time_s", "calib_time_s", "eval_time_s", "peak_mem_calib_mb", "peak_mem_eval_mb")
            cells = [f"{record['labels']['algo']} {record['labels']['scheme']}"]
            cells += [f"{record['metrics'][key]:.1f}" for key in keys]
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
