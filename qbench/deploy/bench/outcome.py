"""What was measured, as it is kept: every repetition, what was left out and why, and the medians as metrics of a record.

A metric's name ends in the machine, the backend, the batch and the prompt, so that figures of two machines never
share a column: `decode_ms@<machine>:torch-int4:b001:p0128`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from qbench.deploy.bench.measure import Middle, Plan, Timing
from qbench.deploy.bench.shares import Roof
from qbench.deploy.operators import Bits

BASELINE = "transformers-fp32"


@dataclass(frozen=True)
class Opened:
    """A backend that was timed.

    Attributes:
        runs_recipe: Whether it ran the quantized model.
        about, remark: What it computes with, and how that departs from the recipe.
    """

    runs_recipe: bool
    about: str
    remark: str
    weight_bytes: int
    bits: Bits | None


@dataclass(frozen=True, eq=False)
class Outcome:
    """One comparison.

    Attributes:
        title: Of the subject.
        machine: A label of processor and threads.
        left_out: Why backends were not timed, by name.
        roof: `None` where `why_no_roof` says why.
        is_recipe: Whether the subject is a quantized model, so that what ran its floating-point model did not run it.
        load: Of the machine by other processes and this one, over the last minute, before and after.
    """

    title: str
    machine: str
    threads: int
    plan: Plan
    opened: Mapping[str, Opened]
    left_out: Mapping[str, str]
    timings: Sequence[Timing]
    roof: Roof | None
    why_no_roof: str = ""
    load: tuple[float, float] = (0.0, 0.0)
    is_recipe: bool = False
    measured: str = field(default_factory=lambda: datetime.now(UTC).isoformat())

    def rows(self) -> list["Row"]:
        """By batch and prompt, backends in the order in which they were opened."""
        order = list(self.opened)
        ordered = sorted(self.timings, key=lambda t: (t.batch, t.prompt, order.index(t.name)))
        return [self._row(timing) for timing in ordered]

    def _row(self, timing: Timing) -> "Row":
        base = next((t for t in self.timings if t.name == BASELINE and _pair(t) == _pair(timing)), None)
        opened, roof = self.opened[timing.name], self.roof
        bits = opened.bits
        return Row(
            timing, opened,
            prefill_gain=timing.against(base, "prefill") if base else None,
            decode_gain=timing.against(base, "decode") if base else None,
            prefill_share=roof.prefill_share(bits, timing) if roof and bits else None,
            decode_share=roof.decode_share(bits, timing) if roof and bits else None,
        )  # fmt: skip

    def metrics(self) -> dict[str, float]:
        """What a record of the subject carries: of backends that ran what was evaluated, and nothing near it."""
        found: dict[str, float] = {}
        for row in self.rows():
            if row.opened.runs_recipe == self.is_recipe and not row.opened.remark:
                found |= row.metrics(self.machine)
        return found

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "machine": self.machine, "threads": self.threads, "measured": self.measured, "load": list(self.load),
            "title": self.title, "baseline": BASELINE,
            "plan": {
                "batches": list(self.plan.batches), "prompts": list(self.plan.prompts),
                "new_tokens": self.plan.new_tokens, "repeats": self.plan.repeats, "warm_ups": self.plan.warm_ups,
            },
            "backends": {
                name: {"about": one.about, "remark": one.remark, "weight_mb": one.weight_bytes / 1e6}
                for name, one in self.opened.items()
            },
            "left_out": dict(self.left_out), "why_no_roofline": self.why_no_roof,
            "timings": [row.plain() for row in self.rows()],
            "metrics": self.metrics(),
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Row:
    """An engine on one pair of batch and prompt.

    Attributes:
        prefill_gain, decode_gain: How many times as fast as the floating-point model, by repetition; `None` without it.
        prefill_share, decode_share: What the roofline says it must take, of the measured time.
    """

    timing: Timing
    opened: Opened
    prefill_gain: Middle | None
    decode_gain: Middle | None
    prefill_share: float | None
    decode_share: float | None

    def plain(self) -> dict[str, Any]:
        t, mb = self.timing, None if self.timing.run_bytes is None else self.timing.run_bytes / 1e6
        return {
            "backend": t.name, "batch": t.batch, "prompt": t.prompt, "new_tokens": t.new_tokens,
            "first_s": [run.first for run in t.runs], "rest_s": [run.rest for run in t.runs], "run_mb": mb,
            "prefill_roofline_share": self.prefill_share, "decode_roofline_share": self.decode_share,
        }  # fmt: skip

    def metrics(self, machine: str) -> dict[str, float]:
        t = self.timing
        at = f"{machine}:{t.name}:b{t.batch:03d}:p{t.prompt:04d}"
        middles = {
            "decode_ms": _times(t.step(), 1e3), "decode_tokens_per_s": t.decode(),
            "prefill_tokens_per_s": t.prefill(), "ttft_ms": _times(t.first(), 1e3),
        }  # fmt: skip
        if t.name != BASELINE:
            gains = {"decode_speedup": self.decode_gain, "prefill_speedup": self.prefill_gain}
            middles |= {name: gain for name, gain in gains.items() if gain is not None}
        found = {}
        for name, middle in middles.items():
            found[f"{name}@{at}"] = middle.value
            if middle.stderr is not None:
                found[f"{name}@{at}_stderr"] = middle.stderr
        shares = {"decode_roofline_share": self.decode_share, "prefill_roofline_share": self.prefill_share}
        found |= {f"{name}@{at}": share for name, share in shares.items() if share is not None}
        if t.run_bytes is not None:
            found[f"run_mb@{at}"] = (self.opened.weight_bytes + t.run_bytes) / 1e6
        return found


def machine_label(title: str, threads: int) -> str:
    """A processor's or GPU's name and threads as one word: `intel-xeon-processor-2.80ghz-1t`."""
    plain = re.sub(r"\((?:r|tm|c)\)|@|\bcpu\b", " ", title.lower())
    return f"{re.sub(r'[^a-z0-9.]+', '-', plain).strip('-')}-{threads}t"


def load_now() -> float:
    """Processes that run or wait to, over the last minute."""
    return os.getloadavg()[0]


def _pair(timing: Timing) -> tuple[int, int]:
    return timing.batch, timing.prompt


def _times(middle: Middle, factor: float) -> Middle:
    return Middle(middle.value * factor, middle.low * factor, middle.high * factor, middle.n)
