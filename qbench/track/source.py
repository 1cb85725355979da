"""Where reports read records: a results folder, or the copies that a mirror put into MLflow.

Both give equal records and samples in the same order, so what is made of them is the same.
"""

import contextlib
import gc
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from qbench.errors import UsageError, first_line
from qbench.track.mirror import Marks, connect, database_of, local_folder
from qbench.track.records import Record, RecordStore, in_order, read_record, read_samples, sample_table

if TYPE_CHECKING:
    import pyarrow

USUAL_UI = "http://127.0.0.1:5000"  # of `mlflow ui`
_PAGE = 1000  # runs asked for at a time
_DOWNLOADS = 8  # at a time; they wait for the network, not for a processor


class Source(Protocol):
    """Records and the samples behind them."""

    @property
    def where(self) -> str:
        """What is read, for messages."""

    def all(self) -> Iterator[Record]:
        """Every record, in the order in which jobs began."""

    def samples(self, fingerprint: str) -> list[dict[str, Any]]:
        """The values behind a record's metrics: `metric`, `item`, `value`; empty where there are none."""

    def sample_table(self, fingerprints: Sequence[str]) -> "pyarrow.Table":
        """The samples of many records, in this order: fingerprint, metric, item, value, part (null where there is none)."""

    def folder(self, fingerprint: str) -> Path:
        """Where the files of a record lie."""

    def link(self, fingerprint: str) -> str | None:
        """Where a browser shows the run; `None` where it does not."""


@dataclass(frozen=True)
class Run:
    """One copy of a record."""

    id: str
    artifacts: str
    finished: datetime


@dataclass(frozen=True)
class MLflowSource:
    """The records among an experiment's runs.

    Where a job was mirrored from several results folders, the record that was finished last counts. The runs of sweeps,
    and those that are deleted or half made, hold no record. The runs are looked up once, when they are first needed.

    Attributes:
        cache: Folder for files that are not on this machine; what is there is not downloaded again.

    Raises:
        UsageError: By whatever looks for a run, if the tracker is out of reach, has no such experiment, or lost a
            run's files.
        ModuleNotFoundError: If MLflow is not installed.
    """

    uri: str
    experiment: str
    cache: Path

    @property
    def where(self) -> str:
        """Tracker and experiment, for messages; without a password."""
        return f"experiment {self.experiment!r} at {_public(self.uri, self.uri)}"

    def all(self) -> Iterator[Record]:
        """Every record, in the order in which jobs began."""
        return iter(in_order(read_record(f) for _, f in self._folders(self._runs)))

    def samples(self, fingerprint: str) -> list[dict[str, Any]]:
        """The values behind a record's metrics: `metric`, `item`, `value`; empty where there are none."""
        return [row for _, folder in self._folders([fingerprint]) for row in read_samples(folder)]

    def sample_table(self, fingerprints: Sequence[str]) -> "pyarrow.Table":
        """The samples of many records, in this order: fingerprint, metric, item, value, part (null where there is none)."""
        return sample_table(self._folders(fingerprints))

    def folder(self, fingerprint: str) -> Path:
        return self._folders([fingerprint])[0][1]

    def link(self, fingerprint: str) -> str | None:
        """Where a browser shows the run, that of a database while `mlflow ui` runs; `None` where it is unknown."""
        run = self._runs.get(fingerprint)
        return _link(self.uri, self._experiment, run.id) if run else None

    @cached_property
    def _client(self) -> Any:
        database = database_of(self.uri)
        if database and not database.is_file():  # MLflow would make one
            raise UsageError(
                f"there is no MLflow database at {str(database)!r}; `qbench sync` makes one of records"
            )
        return connect(self.uri)

    @cached_property
    def _experiment(self) -> str:
        found = self._asked(lambda: self._client.get_experiment_by_name(self.experiment))
        if found is None or found.lifecycle_stage != "active":
            known = sorted(e.name for e in self._asked(lambda: list(self._client.search_experiments())))
            raise UsageError(
                f"MLflow at {_public(self.uri, self.uri)} has no experiment {self.experiment!r}; there are "
                f"{', '.join(known) or 'none'}; set tracker.experiment="
            )
        return str(found.experiment_id)

    @cached_property
    def _runs(self) -> dict[str, Run]:
        """By fingerprint."""
        found: dict[str, Run] = {}
        for fingerprint, run in self._asked(lambda: list(self._search())):
            other = found.setdefault(fingerprint, run)
            # Copies of one record finished at the same time: whichever, but always the same.
            if (run.finished, run.id) > (other.finished, other.id):
                found[fingerprint] = run
        return found

    def _search(self) -> Iterator[tuple[str, Run]]:
        """The whole runs with their fingerprints, by pages."""
        query, token = "tags.`qbench.fingerprint` LIKE '%'", None
        while True:
            with _no_collection():
                page = self._client.search_runs(
                    [self._experiment], query, max_results=_PAGE, page_token=token
                )
            for run in page:
                tags = run.data.tags
                if run.info.status in ("FINISHED", "FAILED") and "qbench.finished" in tags:
                    finished = datetime.fromisoformat(tags["qbench.finished"])
                    yield tags["qbench.fingerprint"], Run(run.info.run_id, run.info.artifact_uri, finished)
            if not (token := page.token):
                return

    def _asked(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except (UsageError, ModuleNotFoundError):
            raise
        except Exception as error:  # of a database's driver, of a network library, or MLflow's own
            why = _public(first_line(error), self.uri)
            raise UsageError(
                f"MLflow at {_public(self.uri, self.uri)} could not be read ({why}); is it running, and the URI right?"
            ) from error

    def _folders(self, fingerprints: Iterable[str]) -> list[tuple[str, Path]]:
        """Where the files of each record lie on this machine, by fingerprint; without those that have no run."""
        wanted = [(name, self._runs[name]) for name in fingerprints if name in self._runs]
        places = {run: local_folder(run.artifacts) for _, run in wanted}
        remote = [run for run, place in places.items() if place is None]
        with ThreadPoolExecutor(_DOWNLOADS) as pool:
            list(pool.map(self._download, (run for run in remote if not (self.cache / run.id).is_dir())))
        found = []
        for name, run in wanted:
            folder = places[run] or self.cache / run.id
            if not (folder / "record.json").is_file():
                raise UsageError(
                    f"run {run.id} of job {name} has no record.json at {str(folder)!r}; where its files are on "
                    "another machine read there, else delete the run, and results/mirrored, and `qbench sync` again"
                )
            found.append((name, folder))
        return found

    def _download(self, run: Run) -> None:
        from mlflow.artifacts import download_artifacts

        kept, draft = self.cache / run.id, self.cache / f".tmp-{run.id}-{os.getpid()}"
        try:
            # Both files at once, and not through the run, which would be asked for again.
            came = download_artifacts(artifact_uri=run.artifacts, dst_path=str(draft), tracking_uri=self.uri)
            try:
                Path(came).rename(kept)
            except OSError:
                if not kept.is_dir():  # no other process was faster
                    raise
        except Exception as error:
            raise UsageError(
                f"the files of run {run.id} at {run.artifacts} could not be fetched ({first_line(error)}); if they are "
                "lost, delete the run, and results/mirrored, and `qbench sync` again"
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the search for garbage: among the objects that MLflow makes of a page it takes 60 % of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def source_of(results: Path, uri: str | None, experiment: str) -> Source:
    """The records of a results folder, or those of an experiment if there is a tracking URI to read them from."""
    return MLflowSource(uri, experiment, results / "fetched") if uri else RecordStore(results)


def link_to_copy(marks: Marks, fingerprint: str) -> str | None:
    """Where a browser shows the mirror's copy of a record; `None` where there is none."""
    mark, made_for = marks.read(fingerprint), marks.folder / "experiment"
    if mark is None or not mark[1] or not made_for.is_file():
        return None
    return _link(marks.uri, made_for.read_text().split()[0], mark[1])


def _link(uri: str, experiment: str, run: str) -> str:
    """A run on its server; one of a database at the usual address of `mlflow ui`."""
    server = _public(uri, uri).rstrip("/") if uri.startswith(("http://", "https://")) else USUAL_UI
    return f"{server}/#/experiments/{experiment}/runs/{run}"


def _public(text: str, uri: str) -> str:
    """The text without the user and password of a URI in it."""
    user, at, _ = urlsplit(uri).netloc.rpartition("@")
    return text.replace(user + at, "") if at else text
