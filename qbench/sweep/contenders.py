"""The recipes that a recommendation may try: their jobs, and what each costs as far as its grids tell."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from qbench.deploy.size import size_metrics
from qbench.errors import Unsuitable, UsageError
from qbench.job import Job, skeleton
from qbench.models.family import family_of
from qbench.models.load import ModelRef
from qbench.quant.scheme import Scheme
from qbench.quant.storage import layer_bits
from qbench.report.recommend.candidates import Latency
from qbench.sweep.grid import Cell, unite
from qbench.sweep.limits import Constraints
from qbench.sweep.progress import complain
from qbench.sweep.settings import Jobs
from qbench.sweep.shipped import CONF
from qbench.sweep.steps import choose_custom
from qbench.sweep.study import Part, parts

_STUDY = "recommend"
_RECIPES = ("algo", "scheme")


def contenders(arguments: Sequence[str]) -> list[Job]:
    """The jobs of all recipes that can run; what cannot is said.

    Raises:
        UsageError: If none can, or perplexity is not asked for.
    """
    found, problems = dict[str, Job](), dict[str, str]()
    builder, evaluation = Jobs(), dict[str, Any]()
    for cell in _cells(arguments):
        try:
            if cell.config is None:
                raise ValueError(cell.problem)
            # One section for all: what is shared is checked once.
            evaluation = evaluation or _only_perplexity(cell.config["eval"])
            job = builder.job(cell.config | {"eval": evaluation})
            job.check()
            found[job.fingerprint] = job
        except Unsuitable as error:
            problems.setdefault(str(error), "")
        except UsageError:
            raise
        except (ValueError, NotImplementedError, OSError) as error:
            problems[" ".join(str(error).split())] = cell.name
    if not found:
        raise UsageError(
            f"no recipe can run ({'; '.join(problems) or 'none is named'}); name some: algo=rtn,gptq scheme=w4a16g128"
        )
    for problem, name in problems.items():
        if name:
            complain(f"skipped {name}: {problem}")
    return list(found.values())


def _cells(arguments: Sequence[str]) -> list[Cell]:
    own = choose_custom([*arguments])
    recipes = [a for a in own if a.partition("=")[0] in _RECIPES]
    rest = [a for a in own if a not in recipes]
    study = parts(["-m", f"+sweep={_STUDY}", *rest, *recipes])
    unique = {tuple(part.arguments): Part(part.arguments) for part in study}
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("config", [], run_mode=RunMode.MULTIRUN)
        return list(unite(unique.values(), loader, master))


def _only_perplexity(section: dict[str, Any]) -> dict[str, Any]:
    if not section["ppl"]:
        raise UsageError(
            "recipes are judged by perplexity, and eval.ppl is empty; set e.g. eval.ppl=[wikitext2]"
        )
    return section | {"tasks": [], "decode_ppl": [], "dialogue": [], "against_fp": False}


def excess(job: Job, asked: Constraints, clock: Latency | None) -> float:
    """By how much a recipe exceeds the limits of size and time, relative to them; at most 0 if it keeps to both."""
    record = predicted(job)
    limits = asked.with_size(sum(p.numel() for p in skeleton(job.model).parameters()))
    over = [0.0]
    if limits.max_bytes is not None:
        over.append(record["metrics"]["model_mb"] * 1e6 / limits.max_bytes - 1)
    if limits.max_latency is not None and clock is not None:
        over.append(clock(record) / limits.max_latency - 1)
    return max(over)


def predicted(job: Job) -> dict[str, Any]:
    """Size and labels as a record has them, from the grids alone: what an algorithm keeps beside them shows in its run."""
    return {"metrics": _size(job.model, job.scheme), "labels": job.labels}


@cache
def _size(ref: ModelRef, scheme: Scheme) -> dict[str, float]:
    model = skeleton(ref)
    family = family_of(model)
    bits = {}
    for index, block in enumerate(model.get_submodule(family.blocks)):
        for name in family.linears(block):
            rows, columns = block.get_submodule(name).weight.shape
            bits[f"{index}.{name}"] = layer_bits(scheme.layer(index, name).weight, rows, columns)
    return size_metrics(model, sum(p.numel() for p in model.parameters()), bits)
