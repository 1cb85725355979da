"""What a running sweep shows: jobs, the current job's phase, its blocks. Plain lines where there is no terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from qbench.job import Reporter


class Progress:
    """Three bars, for the sweep, the job and its blocks."""

    def __init__(self, total: int, done: int) -> None:
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._total, self._done = total, done
        self._bars = Bars(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=self._console, transient=True, disable=not self._live,
        )  # fmt: skip
        self._jobs = self._bars.add_task("jobs", total=total, completed=done)

    def __enter__(self) -> Self:
        self._bars.start()
        if self._done:
            todo = self._total - self._done
            self._say(
                f"{self._done} of {self._total} jobs are recorded already, {todo or 'none'} left to run"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        if kind is KeyboardInterrupt:
            self._say(
                f"stopped after {self._done} of {self._total} jobs; the same command takes up from here"
            )

    @contextmanager
    def job(self, title: str) -> Iterator[Reporter]:
        """The bars of one job."""
        phases = {"load": "loading", "calib": "quantizing", "eval": "evaluating"}
        row = self._bars.add_task(title, total=len(phases))
        blocks = self._bars.add_task("  blocks", total=None, visible=False)
        state = {"phase": -1}

        def phase(name: str) -> None:
            state["phase"] += 1
            self._bars.update(row, completed=state["phase"], description=f"{title}: {phases[name]}")
            self._bars.update(blocks, visible=name == "calib")

        def block(done: int, total: int) -> None:
            self._bars.update(blocks, completed=done, total=total)

        try:
            yield Reporter(phase, block)
        finally:
            self._bars.remove_task(row)
            self._bars.remove_task(blocks)

    def finished(self, record: dict[str, Any]) -> None:
        self._done += 1
        self._bars.update(self._jobs, completed=self._done)
        labels = record["labels"]
        title = " ".join(str(labels[key]) for key in ("model", "algo", "scheme"))
        if record["status"] == "failed":
            self._say(f"[{self._done}/{self._total}] {title}: failed, {record['reason']}")
            return
        metrics = record["metrics"]
        shown = [
            f"{k} {v:.4g}" for k, v in metrics.items() if k.startswith(("ppl/", "acc/")) and "stderr" not in k
        ]
        seconds = sum(metrics[f"{name}_time_s"] for name in ("load", "calib", "eval"))
        self._say(f"[{self._done}/{self._total}] {title}: {', '.join(shown)} ({seconds:.1f} s)")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
