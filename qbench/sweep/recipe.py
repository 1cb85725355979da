"""Which recipe a command is about: a record's, or one that its settings describe."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qbench.errors import UsageError
from qbench.job import Job
from qbench.report.sides import find
from qbench.sweep.composed import config_of
from qbench.sweep.retype import command_of
from qbench.sweep.settings import Jobs
from qbench.track.records import Record, RecordStore


@dataclass(frozen=True)
class Asked:
    """A recipe, and the done record that it has.

    Attributes:
        record: `None` of a recipe that was described and has none.
    """

    job: Job
    record: Record | None
    store: RecordStore

    @property
    def shown(self) -> Record | None:
        """The record, with the short command that gives its job again where there is one."""
        if self.record is None or (command := command_of(self.record)) is None:
            return self.record
        return self.record | {"environment": self.record["environment"] | {"command": command}}


def asked_for(word: str, settings: Sequence[str]) -> Asked:
    """The recipe that a word means (a fingerprint's beginning, labels as of `qbench compare`), or settings describe.

    Args:
        word: Empty where `settings` describe it; else they may hold `results=` alone.

    Raises:
        UsageError: If no recipe, or several, or a failed one is meant, or a record's is another job by now.
    """
    if word and (other := [a for a in settings if a.partition("=")[0] != "results"]):
        raise UsageError(
            f"{word} has its own settings, and {other[0]} would not count; leave one of them out"
        )
    config = config_of([*settings])
    store = RecordStore(Path(config["results"]))
    try:
        record = _recorded(word, store) if word else None
        job = Jobs().job(record["config"] if record else config)
    except (ValueError, NotImplementedError, OSError) as error:
        raise UsageError(str(error)) from error
    if record is not None and job.fingerprint != record["fingerprint"]:
        raise UsageError(
            f"the config of record {record['fingerprint']} makes another job with this qbench ({job.fingerprint}), so its "
            "model cannot be made again; run the job again, and ask for that"
        )
    if record is None and (known := store.read(job.fingerprint)) is not None and known["status"] == "done":
        record = known
    return Asked(job, record, store)


def _recorded(word: str, store: RecordStore) -> Record:
    if not (records := list(store.all())):
        raise UsageError(f"no records under {str(store.records)!r}; run e.g. `qbench algo=gptq wbits=4`")
    found = find(word, records, store).records
    if len(found) > 1:
        prints = ", ".join(record["fingerprint"] for record in found)
        raise UsageError(f"{word!r} means {len(found)} draws of one recipe, and one is needed: {prints}")
    return found[0]
