"""`qbench sensitivity`: which part of a model suffers from quantization, and `qbench sensitivity stats`: how its tensors
are distributed. `qbench sensitivity solve` is in `qbench.sweep.solve`.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from qbench.errors import UsageError
from qbench.measure import calibration_tokens
from qbench.report.sensitivity import (
    draw_effects,
    print_effects,
    print_statistics,
    write_effects,
    write_statistics,
)
from qbench.statistics import tensor_statistics
from qbench.sweep.measurements import Measurements
from qbench.sweep.session import OK
from qbench.sweep.settings import Jobs, calibration, floating_point
from qbench.track.records import Record


def measure(found: Measurements) -> int:
    """Run the measurements, show and write what they say; returns the exit code."""
    code, failed = found.run()
    if not found.base["plan"]:
        report(found, failed)
    return code


def report(found: Measurements, failed: Sequence[Record]) -> None:
    """Show and write the effects that were measured, and say what failed."""
    console, request, effects = output(), found.request, found.effects()
    name = f"{found.baseline.model.name} {next(iter(found.jobs.values())).algo}"
    how = "one unit quantized" if request.mode == "in" else "one unit quantized beside all others"
    if effects:
        print_effects(effects, f"{name}, {how}", console)
        parts = ("sensitivity", *name.split(), *found.setting(), request.mode, *request.by.split(","))
        results, stem = Path(found.base["results"]).parent, "-".join(parts)
        path = results / "tables" / f"{stem}.csv"
        write_effects(effects, path)
        drawn = draw_effects(effects, results / "figures" / stem)
        say(console, f"table     {path}", f"figure    {drawn[0]}", f"records   {found.store.records}")
    for record in failed:
        say(console, f"failed    {record['labels']['scheme']}: {record['reason']}")


def statistics(config: dict[str, Any]) -> int:
    """Show and write statistics of the model's tensors on the calibration set; returns the exit code.

    Raises:
        UsageError: If the model cannot be run on it.
    """
    try:
        settings = Jobs().settings(config)
        calib = calibration(settings.calib, settings.seed)
        job = replace(Jobs().job(floating_point(config)), calib=calib)
        job.check()
        tokens = calibration_tokens(job.model, calib, job.library, job.device)
        model = job.model.load()
        rows = list(tensor_statistics(model, tokens, batch_size=calib.batch_size, device=job.device))
    except (ValueError, NotImplementedError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    console, name = output(), f"{job.model.name} on {calib.label}"
    print_statistics(rows, name, console)
    path = settings.results / "tables" / f"statistics-{job.model.name}-{calib.label}.csv"
    write_statistics(rows, path)
    say(console, f"table     {path}")
    return OK


def output() -> Console:
    """The terminal, or wide lines where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def say(console: Console, *lines: str) -> None:
    """Print lines as they are."""
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
