"""What records carry of measured speed (`qbench bench`): names of metrics, read back."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qbench.track.records import Record

_NAME = re.compile(r"(\w+)@(.+):([\w-]+):b(\d+):p(\d+)")


@dataclass(frozen=True)
class Measured:
    """A figure of a recipe's speed.

    Attributes:
        figure: Such as `decode_ms`.
    """

    figure: str
    machine: str
    backend: str
    batch: int
    prompt: int
    value: float


def measured(record: Record) -> Iterator[Measured]:
    """What was measured of a record, medians alone."""
    for name, value in record["metrics"].items():
        if (parts := _NAME.fullmatch(name)) is not None:
            yield Measured(parts[1], parts[2], parts[3], int(parts[4]), int(parts[5]), value)


@dataclass(frozen=True)
class Setting:
    """Where and how recipes were timed: figures of two settings are not to be compared."""

    machine: str
    batch: int
    prompt: int

    def __str__(self) -> str:
        return f"{self.machine}, batch {self.batch}, prompt {self.prompt}"


def usual_setting(records: Sequence[Record], batch: int = 1, prompt: int = 0) -> Setting | None:
    """How most of the records were timed at this batch; of equals, with the prompt nearest to `prompt`.

    `None` where none was.
    """
    found = (
        {Setting(m.machine, m.batch, m.prompt) for m in measured(r) if m.batch == batch} for r in records
    )
    counts = Counter(setting for settings in found for setting in settings)
    return min(counts, key=lambda s: (-counts[s], abs(s.prompt - prompt), s.machine), default=None)


def fastest(record: Record, setting: Setting, figure: str) -> float | None:
    """The least of a figure among the backends that were timed so; `None` where none was."""
    return min(
        (
            m.value
            for m in measured(record)
            if m.figure == figure and Setting(m.machine, m.batch, m.prompt) == setting
        ),
        default=None,
    )
