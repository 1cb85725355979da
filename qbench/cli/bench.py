"""`qbench bench`: how fast a recipe runs on this machine, against the floating-point model."""

import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qbench.cli.reports import console
from qbench.errors import UsageError

_COUNTS = ("new_tokens", "repeats", "warm_ups", "threads")
_OWN = ("batch", "prompt", *_COUNTS, "backends", "csv", "gguf", "checkpoint")


def bench(arguments: list[str]) -> int:
    """`qbench bench <fingerprint | labels | folder | file.gguf | model=… algo=… scheme=…> [batch=1,8,32] [prompt=128,512]
    [new_tokens=32] [repeats=5] [warm_ups=1] [threads=…] [backends=…] [checkpoint=…] [gguf=…] [csv=…]`

    Prompts are read and tokens made by everything here that can run the recipe's codes, and by the floating-point model,
    in turns: each repetition asks all backends, so that what else the machine does meets all alike. Shown are medians
    with quartiles: tokens of prompts read a second, time to the first token, tokens made a second, how many times as fast
    as floating point (repetition by repetition), the share of the measured time that the roofline of this machine says
    it must take, weights in memory, and what a run takes on top.

    A record's model is quantized again from its config; what was measured is written beside the record (speed.json), and
    tables, fronts and recommendations know it from then on. checkpoint= and gguf= are its exports, for engines that load
    those. A folder or a GGUF file alone is timed without a record.

    Backends: transformers-fp32, transformers-bf16, transformers-dequantized, torch-int8, torch-int8-dynamic, torch-int4,
    llamacpp, vllm. What is not installed, or cannot run the recipe, is named with the reason. A run takes minutes for a
    model of some hundred million weights: lower batch=, prompt= and repeats= first.
    """
    own = {k: v for k, _, v in (a.partition("=") for a in arguments) if k in _OWN}
    words = [a for a in arguments if "=" not in a]
    rest = [a for a in arguments if "=" in a and a.partition("=")[0] not in own]
    _check(words, rest)
    from qbench.deploy.bench.compare import chosen
    from qbench.deploy.bench.measure import Plan
    from qbench.sweep.bench import Asked, bench

    counts = {key: _counts(key, own[key])[0] for key in _COUNTS if key in own}
    threads = counts.pop("threads", None)
    lists = {
        name: tuple(_counts(key, own[key]))
        for key, name in (("batch", "batches"), ("prompt", "prompts"))
        if key in own
    }
    try:
        plan = Plan(**lists, **counts)  # type: ignore[arg-type]
        backends = tuple(chosen([b for b in own.get("backends", "").split(",") if b]))
    except ValueError as error:
        raise UsageError(str(error)) from error
    paths = {key: Path(own[key]).expanduser() for key in ("checkpoint", "gguf") if key in own}
    out = console()
    asked = Asked(
        words[0] if words else "", plan, backends, threads, paths.get("checkpoint"), paths.get("gguf"), tuple(rest)
    )  # fmt: skip
    # A spinner would take time of the core that is timed.
    timed = bench(asked, lambda line: print(line, file=sys.stderr))
    _show(timed, out)
    if "csv" in own:
        _write(timed, Path(own["csv"]))
        _say(out, f"written    {own['csv']}")
    return 0


def _check(words: list[str], rest: list[str]) -> None:
    """Refuse what cannot be meant.

    Raises:
        UsageError: If nothing is named, or several things, or a key of this command is misspelt.
    """
    if len(words) > 1:
        raise UsageError(f"one model is timed at a time, found {' and '.join(words)}")
    if options := [word for word in words if word.startswith("-")]:
        raise UsageError(f"there is no option {options[0]} here; see `qbench bench --help`")
    if not words and not any(a.startswith("model=") for a in rest):
        raise UsageError(
            "name what is to be timed: a fingerprint, labels such as gptq/w4a16g128, a folder, a GGUF file, or model=… "
            "algo=… scheme=…"
        )
    for key in (a.partition("=")[0] for a in rest):
        if near := difflib.get_close_matches(key, _OWN, n=1, cutoff=0.8):
            raise UsageError(f"unknown key {key!r}; did you mean {near[0]}=?")


def _counts(key: str, text: str) -> list[int]:
    parts = text.strip("[]").split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts) or (
        key in _COUNTS and len(parts) > 1
    ):
        raise UsageError(
            f"{key}={text}: must be a whole number from 1" + (", or several" if key not in _COUNTS else "")
        )
    return [int(part) for part in parts]


def _show(timed: Any, out: Any) -> None:
    from rich.table import Table

    outcome = timed.outcome
    grid = Table(box=None, header_style="bold", pad_edge=False)
    for title, _ in _COLUMNS:
        grid.add_column(title, justify="left" if title == "backend" else "right", no_wrap=True)
    before = None
    for row in outcome.rows():
        if before not in (None, (row.timing.batch, row.timing.prompt)):
            grid.add_row()
        before = row.timing.batch, row.timing.prompt
        grid.add_row(*(cell(row) for _, cell in _COLUMNS))
    _say(out, f"{outcome.title} on {outcome.machine}, {outcome.plan.new_tokens} tokens made\n")
    out.print(grid)
    _say(
        out,
        "\nmedians with quartiles; x: times as fast as transformers-fp32, repetition by repetition; roof: the share of the "
        "time that the roofline of this machine says it must take; run MB: what a run took on top of weights",
    )
    for name, one in outcome.opened.items():
        _say(out, f"{name:<26} {one.about}" + (f"; {one.remark}" if one.remark else ""))
    for name, why in outcome.left_out.items():
        _say(out, f"{name:<26} left out: {why}")
    for line in filter(None, (outcome.why_no_roof, *timed.remarks)):
        _say(out, f"note       {line}")
    _say(out, f"load       {outcome.load[0]:.1f} before, {outcome.load[1]:.1f} after")
    if timed.written is not None:
        _say(out, f"written    {timed.written}")


def _middle(middle: Any, factor: float = 1.0) -> str:
    if middle is None:
        return ""
    value, low, high = (_number(x * factor) for x in (middle.value, middle.low, middle.high))
    return f"{value} ({low}-{high})" if middle.n > 2 else value  # quartiles of two say nothing


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


_COLUMNS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("batch", lambda row: str(row.timing.batch)),
    ("prompt", lambda row: str(row.timing.prompt)),
    ("backend", lambda row: str(row.timing.name)),
    ("prefill tok/s", lambda row: _middle(row.timing.prefill())),
    ("x", lambda row: _middle(row.prefill_gain)),
    ("roof", lambda row: _share(row.prefill_share)),
    ("first token ms", lambda row: _middle(row.timing.first(), 1e3)),
    ("decode tok/s", lambda row: _middle(row.timing.decode())),
    ("x", lambda row: _middle(row.decode_gain)),
    ("roof", lambda row: _share(row.decode_share)),
    ("weights MB", lambda row: _number(row.opened.weight_bytes / 1e6)),
    ("run MB", lambda row: "" if row.timing.run_bytes is None else _number(row.timing.run_bytes / 1e6)),
)


def _write(timed: Any, path: Path) -> None:
    """One row for each repetition."""
    import csv

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "machine", "backend", "batch", "prompt", "new_tokens", "repetition", "first_s", "rest_s",
                "prefill_roofline_share", "decode_roofline_share", "weight_bytes", "run_bytes",
            ]
        )  # fmt: skip
        for row in timed.outcome.rows():
            t = row.timing
            for i, run in enumerate(t.runs):
                writer.writerow(
                    [
                        timed.outcome.machine, t.name, t.batch, t.prompt, t.new_tokens, i, run.first, run.rest,
                        row.prefill_share, row.decode_share, row.opened.weight_bytes, t.run_bytes,
                    ]
                )  # fmt: skip


def _say(out: Any, line: str) -> None:
    out.print(line, markup=False, highlight=False, soft_wrap=True)
