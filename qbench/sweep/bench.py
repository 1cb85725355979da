"""What `qbench bench` times: a record's model quantized again, a recipe that was never run, or a checkpoint."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qbench.algorithms.fp import FloatingPoint
from qbench.deploy.bench.backend import Backend, Recipe, Subject
from qbench.deploy.bench.compare import compare
from qbench.deploy.bench.measure import Plan
from qbench.deploy.bench.outcome import Outcome
from qbench.errors import UsageError
from qbench.job import Job, skeleton
from qbench.models.exported import exported_config, load_unpacked
from qbench.models.family import family_of
from qbench.models.manifest import verify_if_listed
from qbench.models.shape import shape_of
from qbench.models.sizes import Shape
from qbench.remade import differences, remade
from qbench.run import command, environment
from qbench.sweep.recipe import asked_for
from qbench.track.records import Record

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What follows `qbench bench`, read.

    Attributes:
        word: A fingerprint's beginning, a folder or a GGUF file; empty where `rest` names a recipe.
        checkpoint, gguf: Exports of the recipe, for engines that load them.
        rest: What makes a config.
    """

    word: str
    plan: Plan
    backends: tuple[Backend, ...]
    threads: int | None
    checkpoint: Path | None
    gguf: Path | None
    rest: tuple[str, ...]


@dataclass(frozen=True)
class Timed:
    """What came of it.

    Attributes:
        written: The file beside the record, `None` where there is no record.
        remarks: What to mind.
    """

    outcome: Outcome
    written: Path | None
    remarks: tuple[str, ...]


def bench(asked: Asked, say: Say) -> Timed:
    """Time what is asked for; what belongs to a record is written beside it.

    Raises:
        UsageError: If it cannot be had, or no backend can run it.
    """
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    try:
        _check_alone(asked)
        folder = Path(asked.word).expanduser() if asked.word else None
        if folder is not None and folder.is_dir() and (file := next(folder.glob("*.gguf"), None)):
            folder = file
        if folder is not None and folder.is_dir():
            return _of_checkpoint(folder, asked, say)
        if folder is not None and folder.suffix == ".gguf" and not asked.rest:
            asked = replace(asked, gguf=folder)
            subject = Subject(folder.name, _SMALLEST_VOCABULARY, gguf=_existing(folder))
            why = "a GGUF file does not say its model's sizes as they are read here; name the model too, model=…"
            return Timed(compare(subject, asked.plan, asked.backends, None, why, say), None, ())
        return _of_job(asked, say)
    except (ValueError, NotImplementedError, OSError, MemoryError) as error:
        raise UsageError(" ".join(str(error).split())) from error


def _check_alone(asked: Asked) -> None:
    """Refuse settings beside a folder, which has its own, and paths that lead nowhere.

    A GGUF file goes with a recipe.
    """
    path = Path(asked.word).expanduser()
    if asked.word.startswith((".", "/", "~")) and not path.exists():
        raise ValueError(f"{asked.word!r} is neither a folder nor a GGUF file that exists")
    other = [a for a in asked.rest if a.partition("=")[0] != "results"]
    if asked.word and path.is_dir() and other:
        raise ValueError(
            f"{asked.word} has its own settings, and {other[0]} would not count; leave one of them out"
        )


# Any model has so many tokens.
_SMALLEST_VOCABULARY = 256


def _of_checkpoint(folder: Path, asked: Asked, say: Say) -> Timed:
    config = exported_config(folder)
    subject = Subject(
        folder.name, config.vocab_size, lambda dtype: load_unpacked(folder, dtype), folder=folder,
        gguf=asked.gguf and _existing(asked.gguf),
    )  # fmt: skip
    shape, why = _shape(config, False)
    remarks = (
        "a checkpoint is unpacked when it is loaded: transformers runs it as a floating-point model, inputs not rounded",
    )
    return Timed(compare(subject, asked.plan, asked.backends, shape, why, say), None, remarks)


def _of_job(asked: Asked, say: Say) -> Timed:
    gguf = asked.gguf
    word = asked.word
    if word.endswith(".gguf"):
        gguf, word = Path(word).expanduser(), ""
    found = asked_for(word, asked.rest)
    job, record = found.job, found.record
    _check_length(job, asked.plan)
    with _subject(job, record, asked, gguf, say) as (subject, remarks):
        shape, why = _shape(skeleton(job.model).config, job.model.trust_remote_code)
        outcome = compare(subject, asked.plan, asked.backends, shape, why, say)
    if record is None:
        return Timed(outcome, None, (*remarks, "not kept: the recipe has no record here to be kept with"))
    if not outcome.metrics():
        remarks.append("nothing here ran what was evaluated, so the record has no figures of it")
    kept = outcome.plain() | {"command": command(), "versions": environment()["versions"]}
    return Timed(outcome, found.store.add_speed(job.fingerprint, outcome.machine, kept), tuple(remarks))


@contextmanager
def _subject(
    job: Job, record: Record | None, asked: Asked, gguf: Path | None, say: Say
) -> Iterator[tuple[Subject, list[str]]]:
    """The job's model, quantized again where it is quantized at all, and what to mind of it."""
    whole = replace(job, model=replace(job.model, offload="memory"))  # kernels are made of all of it
    forms: dict[str, Any] = {
        "floating": lambda dtype: replace(whole.model, dtype=str(dtype).removeprefix("torch.")).load(),
        "folder": asked.checkpoint and _existing_folder(asked.checkpoint),
        "gguf": gguf and _existing(gguf), "device": job.device,
    }  # fmt: skip
    vocab = skeleton(job.model).get_input_embeddings().weight.shape[0]
    if isinstance(job.algorithm, FloatingPoint):
        yield Subject(job.title, vocab, **forms), []
        return
    say("quantizing")
    with remade(whole, record=record) as again:
        other = differences(again, record) if record else []
        recipe = Recipe(again.model, again.layers, job.scheme)
        yield Subject(job.title, vocab, recipe=recipe, **forms), [f"not as recorded: {x}" for x in other]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}; `qbench export --to gguf` writes one")
    verify_if_listed(path.parent)
    return path


def _existing_folder(path: Path) -> Path:
    exported_config(path)
    verify_if_listed(path)
    return path


def _check_length(job: Job, plan: Plan) -> None:
    """Refuse positions for which a model has no embedding; rotary ones go on."""
    shell = skeleton(job.model)
    most = getattr(shell.config, "max_position_embeddings", None)
    length = max(plan.prompts) + plan.new_tokens
    if most is not None and length > most and family_of(shell).rotary == "none":
        raise ValueError(
            f"prompt={max(plan.prompts)} and new_tokens={plan.new_tokens} are {length} positions, {job.model.name} has "
            f"{most}; lower one of them"
        )


def _shape(config: Any, trust_remote_code: bool) -> tuple[Shape | None, str]:
    """The sizes for the roofline, or why there are none."""
    try:
        return shape_of(config, trust_remote_code), ""
    except NotImplementedError as refusal:
        return None, str(refusal)
