"""A recommendation in words and as a table."""

import textwrap
from collections.abc import Iterator, Sequence

import pandas as pd
from rich.console import Console

from qbench.report.recommend.candidates import Candidate, Field
from qbench.report.recommend.decision import QUANTITIES, RESAMPLES, Decision, Limits, Preference, in_words
from qbench.report.recommend.halving import Dropped, Settled
from qbench.report.tables import print_table

_ROWS = 30  # candidates that a terminal shows
_HANGING = 11  # columns before what a line says
_RULES: dict[Preference, str] = {
    "quality": "the least perplexity that fits",
    "size": "the fewest bytes that fit",
    "speed": "the fastest that fits",
}


def lines(settled: Settled, limits: Limits, hardware: str = "") -> list[str]:
    """The recommendation, how sure it is, and what stands in the way where nothing meets the limits."""
    found, decision = settled.found, settled.decision
    asked = [
        f"{quantity} {in_words(quantity, most)}"
        for quantity in QUANTITIES
        if (most := limits.of(quantity)) is not None
    ]
    limit = ", ".join(asked) or "no limit (set one: max_ppl_increase=2%, max_bytes=3GB)"
    told = [f"asked for  {limit}; {_RULES[decision.preference]}"]
    told += [f"ms         {hardware}"] if hardware else []
    told.append(f"{'recommend' if decision.meets else 'nearest  '}  {_about(decision)}")
    told.append(f"how sure   {_how_sure(found, decision, limits)}")
    if any(c.has_luck for c in (decision.chosen, decision.runner_up) if c is not None):
        told.append("not known  what hangs on the draw of calibration samples, for there is one")
    if decision.runner_up is not None:
        told.append(f"runner-up  {_cost(decision.runner_up)}")
    for binding in decision.binding:
        needed = (
            f"; {in_words(binding.quantity, binding.needed)} would do"
            if binding.needed is not None
            else ", and not it alone"
        )
        told.append(f"in the way {binding.quantity} {in_words(binding.quantity, binding.most)}{needed}")
    return told


def _how_sure(found: Field, decision: Decision, limits: Limits) -> str:
    sure = f"the same choice in {decision.share:.0%} of {RESAMPLES} resamples of windows and draws"
    if decision.meets and limits.max_ppl_increase is not None and not decision.chosen.recipe.is_float:
        sure += f", within the limit of perplexity in {decision.surely_meets:.0%}"
    return sure + f" ({found.n_windows} windows: {', '.join(found.metrics)} {found.protocol})"


def _about(decision: Decision) -> str:
    chosen = decision.chosen
    if chosen.recipe.is_float:
        return f"{chosen.title}: the model as it is ({in_words('max_bytes', chosen.bytes)})"
    low, high = (in_words("max_ppl_increase", end) for end in decision.increase)
    return f"{_cost(chosen)} (95 %: {low} to {high})"


def _cost(candidate: Candidate) -> str:
    speed = f", {in_words('max_latency', candidate.seconds)}" if candidate.seconds is not None else ""
    size, change = in_words("max_bytes", candidate.bytes), in_words("max_ppl_increase", candidate.increase)
    return f"{candidate.title}: {size}{speed}, perplexity {change}"


def table(settled: Settled) -> pd.DataFrame:
    """All candidates, the choice first, then by how often they are chosen; those that were dropped on fewer windows last."""
    found, decision = settled.found, settled.decision
    reasons = {id(candidate): reason for candidate, reason in decision.reasons}
    shares = dict(zip(map(id, found.candidates), decision.shares, strict=True))
    rows = []
    for c in sorted(decision.order, key=lambda c: c is not decision.chosen):
        why_not = reasons.get(id(c), "recommended" if decision.meets else "nearest")
        rows.append(_row(c, f"{shares[id(c)]:.0%}", why_not))
    rows += [_row(one.candidate, "-", why_dropped(one)) for one in reversed(settled.dropped)]
    return pd.DataFrame(rows)


def why_dropped(one: Dropped) -> str:
    return f"{one.reason} on {one.n_windows} windows"


def _row(candidate: Candidate, chosen: str, why_not: str) -> dict[str, str]:
    row = {"recipe": candidate.title, "MB": f"{candidate.bytes / 1e6:.4g}"}
    if candidate.seconds is not None:
        row["ms"] = f"{1000 * candidate.seconds:.3g}"
    change = in_words("max_ppl_increase", candidate.increase)
    return row | {"perplexity": change, "chosen": chosen, "why not": why_not}


def show(settled: Settled, limits: Limits, console: Console, hardware: str = "") -> None:
    """Print it."""
    whole = table(settled)
    print_table(whole.head(_ROWS), f"{settled.decision.chosen.record['labels']['model']}: recipes", console)
    if len(whole) > _ROWS:
        console.print(f"and {len(whole) - _ROWS} more", highlight=False)
    console.print()
    told = lines(settled, limits, hardware)
    if settled.left_out:
        told.append(f"left out   not evaluated alike: {', '.join(settled.left_out)}")
    for line in _fitted(told, console.width):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _fitted(told: Sequence[str], width: int) -> Iterator[str]:
    for line in told:
        yield textwrap.fill(
            line, width, subsequent_indent=" " * _HANGING, break_long_words=False, break_on_hyphens=False
        )
