"""What a run or a sweep ends with: its table, what to mind, where things are, what to type next."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from qbench.report.frame import tidy
from qbench.report.tables import show, show_failures

_ROWS = 100  # jobs whose table is shown


def _warnings(records: Sequence[dict[str, Any]]) -> list[str]:
    """What makes numbers untrustworthy, a line for each kind."""
    overlaps, cut = dict[str, float](), dict[str, float]()
    for record in records:
        for name, about in record.get("data", {}).items():
            for text, share in about.get("overlap", {}).items():
                pair = f"{name.removeprefix('calib/')} in {text}"
                overlaps[pair] = max(share, overlaps.get(pair, 0.0))
        for metric, share in record["metrics"].items():
            if metric.startswith("truncated/"):
                cut[metric.partition("/")[2]] = max(share, cut.get(metric.partition("/")[2], 0.0))
    found = [f"{pair} ({share:.0%} of the samples)" for pair, share in overlaps.items() if share]
    lines = [f"WARNING   calibration text occurs in evaluation text: {', '.join(found)}"] if found else []
    left_out = dict.fromkeys(task for record in records for task in record.get("left_out", ()))
    lines += [f"left out  for want of data: {', '.join(left_out)}"] if left_out else []
    if answered := [r for r in records if r.get("identity", {}).get("evaluation", {}).get("talk")]:
        judged = all(r["identity"]["evaluation"]["talk"]["judge"] for r in answered)
        lines.append(
            "answers   "
            + ("" if judged else "not marked, for want of a judge: ")
            + "in the folder dialogue of the results"
        )
    tasks = [f"{task} ({share:.0%})" for task, share in cut.items()]
    return lines + ([f"cut off   longer than the model reads: {', '.join(tasks)}"] if tasks else [])


def print_summary(
    records: Iterable[dict[str, Any]],
    *,
    problems: Sequence[tuple[str, str]],
    n_pruned: int = 0,
    ran: int,
    results: Path,
    tracker_uri: str | None,
) -> None:
    """What a command ends with: the table, what was skipped, where things are, what to type next."""
    console = Console()
    records = list(records)
    failed = sum(record["status"] == "failed" for record in records)
    if not console.is_terminal:
        console = Console(width=200)
    frame = tidy(records)
    if len(records) <= _ROWS:
        show(frame, console)
    else:
        console.print(
            f"{len(records)} jobs are too many rows for a terminal; `qbench tables` writes them", markup=False
        )
        show_failures(frame, console)
    counts = [f"{ran} run", f"{len(records) - ran} already done"]
    counts += [f"{failed} failed"] if failed else []
    counts += [f"{len(problems)} skipped"] if problems else []
    counts += [f"{n_pruned} pruned"] if n_pruned else []
    lines = [
        ", ".join(counts),
        f"records   {results / 'records'}",
        f"tables    qbench tables results={results}",
        f"report    qbench report results={results}",
    ]
    if len({r["labels"]["algo"] for r in records if r["status"] == "done"} - {"fp"}) > 1:
        lines.append(f"decide    qbench recommend results={results} max_ppl_increase=2%")
    lines[1:1] = _warnings(records)
    if failed:
        lines.append(f"failed    qbench retry results={results}")
    if tracker_uri:
        lines.append(f"MLflow    mlflow ui --backend-store-uri {tracker_uri}")
    console.print("\n" + "\n".join(lines), markup=False, highlight=False, soft_wrap=True)
