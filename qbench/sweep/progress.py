"""What a running sweep shows: jobs and time left, and what each worker does. Plain lines where there is no terminal."""

import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

PHASES = {"load": "loading", "calib": "quantizing", "eval": "evaluating"}
_SILENCE = 60.0  # seconds without a finished job after which a log without a terminal says what goes on


class _Count(MofNCompleteColumn):
    """`2/4`, and nothing where there is nothing to count."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class Progress:
    """A bar for the sweep and a line for each worker."""

    def __init__(self, total: int, done: int) -> None:
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._total, self._done, self._ran, self._failed, self._running = total, done, 0, 0, 0
        self._began = self._spoke = time.monotonic()
        self._bars = Bars(
            TextColumn("{task.description}"), BarColumn(bar_width=20), _Count(), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(), console=self._console, transient=True, disable=not self._live,
        )  # fmt: skip
        self._jobs = self._bars.add_task("jobs", total=total, completed=done, note="")
        self._workers: dict[str, TaskID] = {}
        self._weighed: set[str] = set()

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

    def show(self, states: Iterable[dict[str, Any]]) -> None:
        """Show what the workers do."""
        states = list(states)
        self._running = sum(state["state"] == "running" for state in states)
        self._note()
        for name in self._workers.keys() - {state["name"] for state in states}:
            self._bars.remove_task(self._workers.pop(name))
        for number, state in enumerate(states, 1):
            model = state["title"].partition(" ")[0]
            if (
                state.get("memory") and model not in self._weighed
            ):  # once for a model: its jobs take much the same
                self._weighed.add(model)
                self._say(f"{model}: {state['memory']}")
            if state["name"] not in self._workers:
                self._workers[state["name"]] = self._bars.add_task("", total=None, note="")
            done, total = state["block"] or (0, None)
            self._bars.update(
                self._workers[state["name"]], completed=done, total=total, description=f"  {number} {activity(state)}",
                note="blocks" if total else "",
            )  # fmt: skip
        if not self._live and time.monotonic() - self._spoke > _SILENCE:
            self._say(f"[{self._done}/{self._total}] " + "; ".join(activity(state) for state in states))

    def finished(self, record: dict[str, Any]) -> None:
        self._done += 1
        self._ran += 1
        self._failed += record["status"] == "failed"
        self._bars.update(self._jobs, completed=self._done)
        self._note()
        labels = record["labels"]
        title = " ".join(
            str(labels[key]) for key in ("model", "algo", "scheme", "calib") if labels[key] is not None
        )
        head = f"[{self._done}/{self._total}] {title}"
        if record["status"] == "failed":
            self._say(f"{head}: failed, {record['reason']}")
            return
        metrics = record["metrics"]
        quality = {k: v for k, v in metrics.items() if "/" in k and not k.endswith("_stderr")}
        usual = {k: v for k, v in quality.items() if k.startswith(("ppl/", "acc/"))}
        shown = [f"{k} {v:.4g}" for k, v in list((usual or quality).items())[:8]]
        seconds = sum(metrics[f"{name}_time_s"] for name in ("load", "calib", "eval"))
        eta = f", {left} left" if (left := self._left()) else ""
        self._say(f"{head}: {', '.join(shown)} ({seconds:.1f} s{eta})")

    def _left(self) -> str:
        """Time left, from the pace so far."""
        jobs = self._total - self._done
        if not self._ran or not jobs:
            return ""
        return duration((time.monotonic() - self._began) / self._ran * jobs)

    def _note(self) -> None:
        parts = [f"{self._running} running"] + ([f"{self._failed} failed"] if self._failed else [])
        parts += [f"{left} left"] if (left := self._left()) else []
        self._bars.update(self._jobs, note=", ".join(parts))

    def _say(self, line: str) -> None:
        self._spoke = time.monotonic()
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def complain(message: str) -> None:
    """Say on standard error what the user should know, on one line."""
    print(f"qbench: {message}", file=sys.stderr)


def activity(state: dict[str, Any]) -> str:
    """What a worker does, in a few words."""
    if state["state"] != "running":
        return str(state["state"])
    text = f"{state['title']}: {PHASES.get(state['phase'], state['phase'])}"
    if state["block"]:
        text += f" block {state['block'][0]} of {state['block'][1]}"
    return text


def duration(seconds: float) -> str:
    """`75` -> `1 min`; rounded, as such estimates are."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
