"""Jobs that quantize one unit of a model, or all but one.

Each measurement is a job of its own, with `scheme.overrides` that leave the other units in floating point, so that
records, resuming and workers are those of any sweep. The loss is the KL divergence from the floating-point model on the
calibration split of the evaluation's corpora: what is chosen by it can still be tested on the other split.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qbench.errors import UsageError
from qbench.job import Job, skeleton
from qbench.models.units import Unit, units_of
from qbench.quant.storage import FLOAT_BITS
from qbench.report.sensitivity import Effect, effect
from qbench.sweep.grid import Cell
from qbench.sweep.plan import make_plan
from qbench.sweep.preview import print_plan
from qbench.sweep.request import Request
from qbench.sweep.session import OK, SOME_FAILED, complete
from qbench.sweep.settings import Jobs, floating_point
from qbench.track.records import Record, RecordStore

FOLDER = "sensitivity"  # of the results: jobs that quantize a part of a model would crowd other tables
_FLOAT = f"w{FLOAT_BITS}a{FLOAT_BITS}"


@dataclass
class Measurements:
    """The jobs that a request takes, and what came of them.

    Attributes:
        base: The config of the measurements; each job departs from it by bits and overrides.
        units: Of the model.
        baseline: The floating-point model's job.
        jobs: By unit and bits; by `""` and bits where all units have the same, which is what `mode=out` refers to.
    """

    base: dict[str, Any]
    request: Request
    units: tuple[Unit, ...]
    baseline: Job
    jobs: dict[tuple[str, int], Job] = field(default_factory=dict)

    @classmethod
    def of(cls, config: dict[str, Any], request: Request) -> "Measurements":
        """The jobs of a request, from the config of its arguments.

        Raises:
            UsageError: If the config cannot be measured.
        """
        _check(config)
        windows = {"against_fp": True, "split": "calibration"}
        evaluation = config["eval"] | {"tasks": [], "decode_ppl": [], "dialogue": []} | windows
        results = str(Path(config["results"]) / FOLDER)
        base = config | {"eval": evaluation, "results": results, "baseline": True}
        try:
            jobs = Jobs()
            baseline = jobs.job(floating_point(base))
            found = cls(base, request, units_of(skeleton(baseline.model), request.by), baseline)
            for bits in request.widths:
                if request.mode == "out":
                    found.jobs["", bits] = jobs.job(found.config(bits))
                for unit in found.units:
                    found.jobs[unit.name, bits] = jobs.job(found.config(bits, found._overrides(unit, bits)))
        except (ValueError, NotImplementedError, OSError) as error:
            raise UsageError(" ".join(str(error).split())) from error
        return found

    @property
    def store(self) -> RecordStore:
        return RecordStore(Path(self.base["results"]))

    def config(self, bits: int, overrides: dict[str, str] | None = None) -> dict[str, Any]:
        """The config of one job."""
        return self.base | {"wbits": bits, "scheme": {"overrides": overrides}}

    def setting(self) -> list[str]:
        """What tells these measurements from others of the same model and algorithm, for the name of a file."""
        group, abits, calib = (
            self.base["group_size"],
            self.base["abits"],
            next(iter(self.jobs.values())).calib,
        )
        parts = (group and f"g{group}", abits < FLOAT_BITS and f"a{abits}", calib and calib.label)
        return [str(part) for part in parts if part]

    def text(self, bits: int) -> str:
        """What an override says for these bits; a layer's input is quantized where its weight is."""
        return _FLOAT if bits == FLOAT_BITS else f"w{bits}a{self.base['abits']}"

    def _overrides(self, unit: Unit, bits: int) -> dict[str, str]:
        if self.request.mode == "out":
            return unit.overrides(_FLOAT)
        return {"*": _FLOAT} | unit.overrides(self.text(bits))

    def run(self) -> tuple[int, list[Record]]:
        """Run what is not recorded yet; returns the exit code, and the records of failed jobs.

        Raises:
            UsageError: If a job cannot run.
        """
        return run_jobs(self.jobs.values())

    def effects(self) -> list[Effect]:
        """What each unit's quantization does, of the jobs that are done."""
        found = []
        for unit in self.units:
            for bits in self.request.widths:
                pair = self.jobs[unit.name, bits], self.jobs.get(("", bits), self.baseline)
                if all(self.store.is_done(job.fingerprint) for job in pair):
                    one, other = (self.store.samples(job.fingerprint) for job in pair)
                    sides = (one, other) if self.request.mode == "in" else (other, one)
                    found.append(effect(unit.name, bits, unit.n_weights, self.size(unit, bits), *sides))
        return found

    def size(self, unit: Unit, bits: int) -> float:
        """Stored bits of a unit's weights: those of its grids, and what else the algorithm stored for it alone."""
        if bits == FLOAT_BITS:
            return float(FLOAT_BITS * unit.n_weights)
        if self.request.mode == "out":
            return unit.stored_bits(self.jobs["", bits].scheme)
        job = self.jobs[unit.name, bits]
        by_grid = unit.stored_bits(job.scheme)
        record = self.store.read(job.fingerprint)
        if record is None or record["status"] != "done":
            return by_grid
        rest = FLOAT_BITS * (self.n_weights - unit.n_weights)
        more = record["metrics"]["bits_per_linear_weight"] * self.n_weights - rest - by_grid
        return by_grid + (more if abs(more) >= 1 else 0.0)  # less than a bit is rounding of the recorded mean

    @property
    def n_weights(self) -> int:
        return sum(unit.n_weights for unit in self.units)


def run_jobs(jobs: Iterable[Job]) -> tuple[int, list[Record]]:
    """Run jobs of one results folder, and the floating-point model; returns the exit code, and failed records.

    Raises:
        UsageError: If one of them cannot run.
    """
    plan = make_plan([Cell(job.title, job.settings) for job in jobs], is_sweep=True)
    problems = [*(problem for _, problem in plan.problems), *plan.pruned]
    if problems or plan.settings is None:
        raise UsageError(problems[0])
    if plan.settings.plan:
        print_plan(plan)
        return OK, []
    records, unfinished = complete(plan, plan.settings, is_sweep=True)
    failed = [record for record in records if record["status"] == "failed"]
    return (SOME_FAILED if unfinished or failed else OK), failed


def _check(config: dict[str, Any]) -> None:
    if config["algo_name"] == "fp":
        raise UsageError("algo=fp quantizes nothing; sensitivity needs an algorithm, for example algo=rtn")
    if config["kvbits"] != FLOAT_BITS or config["quant_bmm"]:
        raise UsageError("sensitivity is that of linear layers; leave kvbits=16 and quant_bmm=false")
    if config["scheme"]["overrides"]:
        raise UsageError("sensitivity sets scheme.overrides itself; choose a scheme without them")
