"""Records into MLflow while a sweep runs: one writer for each results folder, and trouble that stops no sweep."""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from qbench.errors import UsageError, first_line
from qbench.sweep.progress import complain
from qbench.sweep.schema import TrackerSettings
from qbench.track.claims import Claim, Claims
from qbench.track.mirror import Marks, MLflowMirror
from qbench.track.records import Record, RecordStore

_BEAT = 5.0  # seconds between signs of life of the writer
_PATIENCE = 30.0  # seconds to wait, at the end, for what another launch's writer has not come to yet


@dataclass
class Mirroring:
    """Copies records to MLflow as they come.

    SQLite takes one writer at a time: of several launches on one results folder, one mirrors what it sees, and the
    others what is left at their end. MLflow is opened with the first record, and given up at its first failure: a
    dead server costs minutes a call.
    """

    store: RecordStore
    tracker: TrackerSettings
    _claims: Claims = field(init=False)
    _claim: Claim | None = None
    _mirror: MLflowMirror | None = None
    _over: threading.Event = field(default_factory=threading.Event)
    _given_up: bool = False

    def __post_init__(self) -> None:
        self._claims = Claims(self.store.root / "claims")

    @property
    def marks(self) -> Marks | None:
        if self.tracker.uri is None:
            return None
        return Marks(self.store, self.tracker.uri, self.tracker.experiment)

    def __enter__(self) -> Self:
        threading.Thread(target=self._keep_alive, daemon=True).start()
        return self

    def _keep_alive(self) -> None:
        """Touch the writer's claim; a job may run for hours between two records."""
        while not self._over.wait(_BEAT):
            if (claim := self._claim) is not None:
                claim.beat()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._mirror is not None and kind is None:
            self._guarded(self._mirror.close)
        if self._claim is not None:
            self._claim.give_back()
            self._claim = None

    def add(self, record: Record) -> None:
        """Mirror a record, unless another launch does."""
        if self.tracker.uri is not None and not self._given_up and self._may_write():
            self._open()
            if self._mirror is not None and not self._guarded(partial(self._mirror.mirror, record)):
                self._mirror, self._given_up = None, True

    def finish(self, records: Iterable[Record]) -> None:
        """Mirror what is not there yet; what another launch is about to mirror is waited for."""
        marks = self.marks
        if marks is None or self._given_up:
            return
        pending = [r for r in records if not marks.has(r)]
        deadline = time.monotonic() + _PATIENCE
        while pending and not self._given_up and not self._may_write() and time.monotonic() < deadline:
            time.sleep(0.5)
            pending = [r for r in pending if not marks.has(r)]
        if pending and self._claim is None:
            complain(
                f"{len(pending)} records are left to another launch to mirror; `qbench sync` does it too"
            )
            return
        for record in pending:
            self.add(record)

    def _may_write(self) -> bool:
        if self._claim is not None and self._claim.lost:
            self._claim = self._mirror = None  # this process slept, and another writes
        if self._claim is None:
            try:
                self._claim = self._claims.take("mlflow")
            except OSError as error:
                complain(
                    f"results cannot be written ({error.strerror}): nothing is mirrored; `qbench sync` does it later"
                )
                self._given_up = True
        return self._claim is not None

    def _open(self) -> None:
        if self._mirror is not None or self._given_up:
            return
        assert self.tracker.uri is not None
        try:
            self._mirror = MLflowMirror(self.tracker.uri, self.tracker.experiment, self.store)
        except ModuleNotFoundError:
            complain(
                "MLflow is not installed: records are kept, nothing is mirrored (tracker=none says so on purpose)"
            )
        except Exception as error:  # whatever the tracking server's trouble is, the sweep goes on
            complain(
                f"MLflow at {self.tracker.uri} is out of reach ({first_line(error)}); `qbench sync` mirrors later"
            )
        self._given_up = self._mirror is None

    @staticmethod
    def _guarded(action: Callable[[], object]) -> bool:
        """Whether MLflow did what it was asked to. If not, the records are safe, and the mirror can be made later."""
        try:
            action()
        except Exception as error:
            complain(f"MLflow: {first_line(error)}; `qbench sync` mirrors later")
            return False
        return True


def sync(results: Path, tracker: TrackerSettings) -> int:
    """Mirror every record that MLflow does not hold yet; returns how many.

    Raises:
        UsageError: If there is nothing to mirror, nowhere to mirror it to, MLflow does not answer, or a sweep is
            mirroring at the moment.
    """
    store = RecordStore(results)
    records = list(store.all())
    if not records:
        raise UsageError(
            f"no records under {str(store.records)!r}; run e.g. `qbench -m algo=rtn,gptq wbits=4,3`"
        )
    if tracker.uri is None:
        raise UsageError("tracker=none has nowhere to mirror to; use tracker=mlflow or set tracker.uri=")
    claim = Claims(store.root / "claims").take("mlflow")
    if claim is None:
        raise UsageError(
            "a sweep on this results folder is writing to MLflow now; it mirrors its records itself"
        )
    try:
        mirror = MLflowMirror(tracker.uri, tracker.experiment, store)
        count = 0
        for record in records:
            count += mirror.mirror(record)
            claim.beat()
        mirror.close()
    except ModuleNotFoundError as error:
        raise UsageError("MLflow is not installed; `pip install mlflow`") from error
    except Exception as error:
        raise UsageError(f"MLflow at {tracker.uri} could not be written ({first_line(error)})") from error
    finally:
        claim.give_back()
    return count
