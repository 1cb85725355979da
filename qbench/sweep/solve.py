"""`qbench sensitivity solve`: bits for every unit within a budget, from the measured sensitivities.

Assumes that divergences add up: that what quantizing several units does is the sum of what each does alone. To second
order in small changes this holds on average where the errors of different layers are unrelated; `check=true` measures
how far it holds.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from qbench.errors import Unsuitable, UsageError
from qbench.job import Job
from qbench.quant.allocation import Option, allocate
from qbench.quant.storage import FLOAT_BITS
from qbench.report.sensitivity import Recipe, difference, print_choice, print_recipes
from qbench.sweep.measurements import Measurements, run_jobs
from qbench.sweep.sensitivity import output, report, say
from qbench.sweep.session import OK
from qbench.sweep.settings import Jobs
from qbench.track.records import RecordStore


@dataclass(frozen=True)
class Choice:
    """Bits by unit.

    Attributes:
        base: The width that most weights have, other than floating point; the others are overrides.
        bits_per_weight: Stored, scales and zero-points included.
        predicted: Sum of the units' divergences, nats a token.
    """

    bits: Mapping[str, int]
    base: int
    bits_per_weight: float
    predicted: float


def solve(found: Measurements, config: dict[str, Any]) -> int:
    """Measure what is missing, choose bits, print the command for them; returns the exit code.

    Args:
        config: What the chosen bits are tried in, where `check` is set.

    Raises:
        UsageError: If there is no budget, it is too small, or a measurement failed.
    """
    request = found.request
    if request.budget is None:
        raise UsageError("solve needs a budget of stored bits a weight, for example budget=3.25")
    if request.mode != "in":
        raise UsageError("solve adds up what each unit does alone; leave mode=in")
    code, failed = found.run()
    if found.base["plan"]:
        return code
    if code != OK:
        report(found, failed)
        raise UsageError("solve needs every measurement; run the command again when the failed jobs can run")
    losses = {(e.unit, e.bits): e.kl for e in found.effects()}
    choice = choose(found, losses, request.budget)
    print_choice(_rows(found, losses, choice), output())
    uniform = {f"all w{bits}": uniform_choice(found, losses, bits) for bits in request.widths}
    choices = {"solved": choice} | uniform
    _conclude(found, choices, _checked(found, choices, config) if request.check else {}, request.budget)
    return OK


def _conclude(
    found: Measurements,
    choices: Mapping[str, Choice],
    results: Mapping[str, dict[str, float]],
    budget: Fraction,
) -> None:
    """Show what was predicted and measured, and the command."""
    console = output()
    recipes = [
        Recipe(name, stored.get("bits", one.bits_per_weight), one.predicted, stored)
        for name, one in choices.items()
        for stored in [results.get(name, {})]
    ]
    print_recipes(recipes, console)
    say(console, "predicted: the sum of the units' divergences, as if each were quantized alone")
    if (stored := recipes[0].bits) > float(budget) + 1e-6:  # beyond the rounding of a recorded mean
        say(console, f"{stored:.4f} bits were stored: what this algorithm keeps depends on the other layers")
    say(console, command(found, choices["solved"]))


def choose(found: Measurements, losses: Mapping[tuple[str, int], float], budget: Fraction) -> Choice:
    """The least predicted loss that a budget of stored bits a weight allows.

    Raises:
        UsageError: If the budget is below the narrowest choice.
    """
    widths = found.request.bits
    options = [
        [Option(found.size(unit, b), losses.get((unit.name, b), 0.0)) for b in widths] for unit in found.units
    ]
    try:
        taken = allocate(options, budget * found.n_weights)
    except Unsuitable as error:
        least = sum(min(o.size for o in unit) for unit in options) / found.n_weights
        raise UsageError(
            f"budget={float(budget):g} is below {least:.4f} bits a weight, which {widths[0]}-bit weights take with their "
            "scales and zero-points; raise the budget, or offer fewer bits or larger groups"
        ) from error
    return _choice(found, losses, [widths[i] for i in taken])


def uniform_choice(found: Measurements, losses: Mapping[tuple[str, int], float], bits: int) -> Choice:
    """All units at one width."""
    return _choice(found, losses, [bits] * len(found.units))


def _choice(found: Measurements, losses: Mapping[tuple[str, int], float], bits: list[int]) -> Choice:
    weights: dict[int, int] = {}
    for unit, b in zip(found.units, bits, strict=True):
        weights[b] = weights.get(b, 0) + unit.n_weights
    quantized = {b: n for b, n in weights.items() if b != FLOAT_BITS}
    if not quantized:
        raise UsageError("the budget leaves every weight in floating point; there is nothing to choose")
    pairs = list(zip(found.units, bits, strict=True))
    size = sum(found.size(unit, b) for unit, b in pairs)
    predicted = sum(losses.get((unit.name, b), 0.0) for unit, b in pairs)
    base = max(quantized, key=lambda b: quantized[b])
    return Choice({unit.name: b for unit, b in pairs}, base, size / found.n_weights, predicted)


def overrides(found: Measurements, choice: Choice) -> dict[str, str]:
    """`scheme.overrides` for the units that depart from the base width."""
    return {
        pattern: text
        for unit in found.units
        if choice.bits[unit.name] != choice.base
        for pattern, text in unit.overrides(found.text(choice.bits[unit.name])).items()
    }


def command(found: Measurements, choice: Choice) -> str:
    """What to type for a job with the chosen bits."""
    kept = [a for a in found.request.arguments if a.partition("=")[0] != "wbits"]
    changed = ", ".join(f"{pattern}: {text}" for pattern, text in overrides(found, choice).items())
    more = [f"scheme.overrides={{{changed}}}"] if changed else []
    return shlex.join(["qbench", *kept, f"wbits={choice.base}", *more])


def _rows(
    found: Measurements, losses: Mapping[tuple[str, int], float], choice: Choice
) -> list[dict[str, str]]:
    return [
        {
            "unit": unit.name,
            "bits": str(bits := choice.bits[unit.name]),
            "stored bits": f"{found.size(unit, bits) / unit.n_weights:.3f}",
            "KL, 10⁻³ nats": f"{1000 * losses.get((unit.name, bits), 0.0):.3f}",
        }
        for unit in found.units
    ]


def _checked(
    found: Measurements, choices: Mapping[str, Choice], config: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """By name: the divergence on the windows of the measurements, and the metrics of the command's own evaluation.

    Raises:
        UsageError: If one of the jobs fails.
    """
    jobs = Jobs()
    results: dict[str, dict[str, float]] = {name: {} for name in choices}
    for base in (found.base, config | {"baseline": True}):
        store = RecordStore(Path(base["results"]))
        mine = {name: _job(jobs, base, found, choice) for name, choice in choices.items()}
        code, failed = run_jobs(mine.values())
        if code != OK:
            reason = failed[0]["reason"] if failed else "workers were lost"
            raise UsageError(f"a job of the check failed: {reason}")
        for name, job in mine.items():
            if base is found.base:
                sides = store.samples(job.fingerprint), store.samples(found.baseline.fingerprint)
                results[name]["KL"], results[name]["KL_stderr"], _ = difference(*sides, "kl")
            else:
                record = store.read(job.fingerprint)
                assert record is not None, "the job was just run"
                metrics = record["metrics"]
                results[name] |= {k: v for k, v in metrics.items() if "/" in k}
                results[name]["bits"] = metrics["bits_per_linear_weight"]
    return results


def _job(jobs: Jobs, base: dict[str, Any], found: Measurements, choice: Choice) -> Job:
    return jobs.job(base | {"wbits": choice.base, "scheme": {"overrides": overrides(found, choice) or None}})
