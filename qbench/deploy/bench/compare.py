"""Open what can run a subject, time all of it in turns, and say what could not."""

from collections.abc import Callable, Mapping, Sequence

import torch

from qbench.deploy.bench.backend import Backend, Engine, Subject
from qbench.deploy.bench.floating import BFloat16, Dequantized, Float32
from qbench.deploy.bench.int4 import TorchInt4
from qbench.deploy.bench.int8 import TorchInt8, TorchInt8Dynamic
from qbench.deploy.bench.llamacpp import LlamaCpp
from qbench.deploy.bench.measure import Plan, in_turns
from qbench.deploy.bench.outcome import Opened, Outcome, load_now, machine_label
from qbench.deploy.bench.shares import Roof
from qbench.deploy.bench.vllm import VLLM
from qbench.deploy.devices import Here
from qbench.deploy.hardware import BUSY, measured
from qbench.models.sizes import Shape

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Float32(), BFloat16(), Dequantized(), TorchInt8(), TorchInt8Dynamic(), TorchInt4(), LlamaCpp(), VLLM()
    )
}  # fmt: skip


def chosen(names: Sequence[str]) -> list[Backend]:
    """The backends of these names; all where there are none.

    Raises:
        ValueError: If one is unknown.
    """
    if unknown := [name for name in names if name not in BACKENDS]:
        raise ValueError(f"backend {unknown[0]!r} is not known; there are {', '.join(BACKENDS)}")
    return [BACKENDS[name] for name in names] or list(BACKENDS.values())


def compare(
    subject: Subject,
    plan: Plan,
    backends: Sequence[Backend],
    shape: Shape | None,
    why_no_shape: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Time the backends that can run the subject.

    Args:
        shape: The model's sizes, for the roofline; `None` where `why_no_shape` says why.
        say: Told what is under way.

    Raises:
        ValueError: If no backend can run it; says why.
    """
    left_out = {b.name: why for b in backends if (why := b.why_not(subject))}
    able = [backend for backend in backends if backend.name not in left_out]
    if not able:
        raise ValueError(_none(subject, left_out))
    here: Here = "this-cuda" if torch.device(subject.device).type == "cuda" else "this"
    say("measuring what this machine can do at best")
    best = measured(here)
    if (spread := max(best.spread.values(), default=0.0)) > BUSY:
        say(
            f"the machine was busy when it was measured (a figure spreads by {spread:.0%}), which shares of the roofline "
            f"inherit; `qbench hardware hardware={here} remeasure=true` measures it again"
        )
    before, engines = load_now(), dict[str, Engine]()
    try:
        for backend in able:
            say(f"opening {backend.name}")
            try:
                engines[backend.name] = backend.open(subject)
            except (
                ValueError,
                ImportError,
            ) as error:  # such as weights that are off their grid, a library that lacks
                left_out[backend.name] = str(error)
        if not engines:
            raise ValueError(_none(subject, left_out))
        opened = _opened([b for b in able if b.name in engines], engines, subject)
        timings = in_turns(engines, plan, subject.vocab, say, left_out)
    finally:
        for engine in engines.values():
            engine.close()
    threads = torch.get_num_threads()
    roof = None if shape is None else Roof(shape, best.device)
    return Outcome(
        subject.title, machine_label(best.title, threads), threads, plan, opened, left_out, timings, roof,
        why_no_shape, (before, load_now()), subject.recipe is not None,
    )  # fmt: skip


def _none(subject: Subject, left_out: Mapping[str, str]) -> str:
    reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
    return f"no backend can run {subject.title}: {reasons}"


def _opened(
    backends: Sequence[Backend], engines: Mapping[str, Engine], subject: Subject
) -> dict[str, Opened]:
    return {
        b.name: Opened(b.runs_recipe, b.about, b.remark(subject), engines[b.name].weight_bytes, engines[b.name].bits)
        for b in backends
    }  # fmt: skip
