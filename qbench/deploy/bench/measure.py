"""Engines timed in turns: each repetition asks all of them, so that whatever else the machine does meets all alike."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from qbench.deploy.bench.backend import Engine, Run
from qbench.deploy.bench.memory import grown
from qbench.errors import first_line

T = TypeVar("T")

_Z = 0.6744897501960817  # the upper quartile of the standard normal distribution


@dataclass(frozen=True)
class Plan:
    """What is asked of each engine.

    Attributes:
        batches, prompts: Sequences at once, and tokens of each before the first that is made; all pairs are run.
        new_tokens: That are made of each sequence.
        repeats: Runs that count.
        warm_ups: Runs before, that do not; memory is watched in the first of them, so that without one it is not known.
    """

    batches: tuple[int, ...] = (1, 8, 32)
    prompts: tuple[int, ...] = (128, 512)
    new_tokens: int = 32
    repeats: int = 5
    warm_ups: int = 1

    def __post_init__(self) -> None:
        for key in ("batches", "prompts"):
            if not (values := getattr(self, key)) or min(values) < 1:
                raise ValueError(f"{key} are {values}; each must be 1 or more")
        if self.new_tokens < 2 or self.repeats < 1 or self.warm_ups < 0:
            raise ValueError(
                f"new_tokens is {self.new_tokens}, repeats {self.repeats} and warm_ups {self.warm_ups}; a rate of decoding "
                "takes 2 new tokens or more, and a median 1 repeat or more"
            )

    def pairs(self) -> list[tuple[int, int]]:
        """Batch and prompt, from the least tokens to the most."""
        return sorted(
            ((b, p) for b in self.batches for p in self.prompts), key=lambda pair: pair[0] * pair[1]
        )


@dataclass(frozen=True)
class Middle:
    """The median of repetitions, and what it varies by.

    Attributes:
        low, high: Quartiles.
    """

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Middle":
        low, middle, high = np.quantile(np.asarray(values, dtype=float), (0.25, 0.5, 0.75))
        return cls(float(middle), float(low), float(high), len(values))

    @property
    def stderr(self) -> float | None:
        """Of the median, were the values normal with these quartiles; `None` of fewer than three."""
        if self.n < 3:
            return None
        return float(np.sqrt(np.pi / 2) * (self.high - self.low) / (2 * _Z) / np.sqrt(self.n))


@dataclass(frozen=True)
class Timing:
    """An engine's runs of one pair.

    Attributes:
        runs: In the order of repetitions, those of all engines together.
        run_bytes: What the process grew by during a run, weights aside; `None` where it was not watched.
    """

    name: str
    batch: int
    prompt: int
    new_tokens: int
    runs: tuple[Run, ...]
    run_bytes: float | None

    def prefill(self) -> Middle:
        """Tokens of prompts read a second."""
        return Middle.of([self.batch * self.prompt / run.first for run in self.runs])

    def decode(self) -> Middle:
        """Tokens made a second, by all sequences together, behind the first."""
        return Middle.of([self.batch * (self.new_tokens - 1) / run.rest for run in self.runs])

    def first(self) -> Middle:
        """Seconds to the first token."""
        return Middle.of([run.first for run in self.runs])

    def step(self) -> Middle:
        """Seconds a step of decoding."""
        return Middle.of([run.rest / (self.new_tokens - 1) for run in self.runs])

    def against(self, other: "Timing", phase: str) -> Middle:
        """How many times as fast as `other`, repetition by repetition."""
        pairs = zip(self.runs, other.runs, strict=True)
        if phase == "prefill":
            return Middle.of([theirs.first / mine.first for mine, theirs in pairs])
        return Middle.of([theirs.rest / mine.rest for mine, theirs in pairs])


def in_turns(
    engines: Mapping[str, Engine],
    plan: Plan,
    vocab: int,
    say: Callable[[str], None] = lambda line: None,
    failed: dict[str, str] | None = None,
) -> list[Timing]:
    """Time all engines on all pairs of batch and prompt.

    Each repetition begins with another engine, so that none always follows the same one. An engine that fails, for want
    of memory for example, is asked no more, and what the others did before stays.

    Args:
        failed: Told why an engine failed, by its name; `None` raises it.
    """
    left, found = dict(engines), list[Timing]()
    for batch, prompt in plan.pairs():
        say(f"batch {batch}, prompt {prompt}")
        tokens, wrong = drawn(vocab, batch, prompt), dict[str, Exception]()
        found += _pair(left, plan, tokens, wrong)
        for name, error in wrong.items():
            if failed is None:
                raise error
            failed[name] = f"failed at batch {batch}, prompt {prompt}: {first_line(error)}"
            del left[name]
    return found


def _pair(
    engines: Mapping[str, Engine], plan: Plan, tokens: Tensor, failed: dict[str, Exception]
) -> list[Timing]:
    def tried(name: str, act: Callable[[Engine], T]) -> T | None:
        try:
            return act(engines[name])
        except (MemoryError, RuntimeError, ValueError) as error:
            failed[name] = error
            return None

    peaks = {name: tried(name, lambda engine: _warmed(engine, plan, tokens)) for name in engines}
    names = [name for name in engines if name not in failed]
    runs: dict[str, list[Run]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for repeat in range(plan.repeats):
            start = repeat % max(1, len(names))
            for name in names[start:] + names[:start]:
                run = (
                    None
                    if name in failed
                    else tried(name, lambda engine: engine.run(tokens, plan.new_tokens))
                )
                if run is not None:
                    runs[name].append(run)
    finally:
        gc.enable()
    (batch, prompt), whole = tokens.shape, [name for name in names if name not in failed]
    return [Timing(n, batch, prompt, plan.new_tokens, tuple(runs[n]), peaks[n]) for n in whole]


def _warmed(engine: Engine, plan: Plan, tokens: Tensor) -> float | None:
    """Run without counting; returns the bytes that the first run took."""
    if not plan.warm_ups:
        return None
    with grown() as peak:
        engine.run(tokens, plan.new_tokens)
    for _ in range(plan.warm_ups - 1):
        engine.run(tokens, plan.new_tokens)
    return peak[0]


def drawn(vocab: int, batch: int, prompt: int) -> Tensor:
    """Tokens to read, `(batch, prompt)`: which they are does not change how long a dense model takes."""
    return torch.randint(vocab, (batch, prompt), generator=torch.Generator().manual_seed(0))
