"""Where data sets are found: under `data.root`, in the hub's local cache, on the hub, in this order."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qbench.data.files import alike, file_rows
from qbench.data.sources import SUFFIXES, Source
from qbench.errors import first_line

_WITHOUT_ALL = (
    "ceval/ceval-exam",
    "haonan-li/cmmlu",
)  # whose "all" is ours: every configuration, one after another
_REACHED_WITHIN = 5.0  # seconds in which a hub must answer


@dataclass(frozen=True)
class Rows:
    """The rows of one split.

    Attributes:
        data: A `datasets.Dataset`.
        origin: Where it was found, for the log and the record.
        sha256: Of the files under `data.root`; of the rows where they come from elsewhere.
    """

    data: Any
    origin: str
    sha256: str


@dataclass(frozen=True)
class Library:
    """The data sets that can be read.

    Attributes:
        root: A folder that holds data sets, tried first.
        files: Pairs of `<corpus or hub id>/<split>` and a path, below `root` unless it is absolute, that serves in
            place of the usual one; `*` stands for any text.
    """

    root: Path | None = None
    files: tuple[tuple[str, str], ...] = ()

    def local(self, source: Source, split: str, name: str | None = None) -> list[Path]:
        """The files that hold a split under `root`; empty where none does.

        Args:
            name: Of the corpus, by which `files` may call it.

        Raises:
            FileNotFoundError: If `files` names one that is not there.
        """
        for key, pattern in self.files:
            if key in (f"{name}/{split}", f"{source.hub_id}/{split}"):
                if found := sorted((self.root or Path()).glob(pattern)) or _existing(Path(pattern)):
                    return found
                raise FileNotFoundError(f"data.files gives {pattern!r} for {key}, there is no such file")
        if self.root is None:
            return []
        for pattern in source.patterns(split):
            whole = pattern if pattern.endswith((*SUFFIXES, "*")) else pattern + "*"
            found = [p for p in sorted(self.root.glob(whole)) if _is(p, self.root / pattern)]
            if found:
                return found
        return []

    def rows(self, source: Source, split: str, name: str | None = None) -> Rows:
        """The rows of a split.

        Raises:
            FileNotFoundError: If it is nowhere; names the files that would serve.
        """
        return _rows(self, source, split, name)

    def substitutes(self, needed: Iterable[tuple[Source, str, str | None]]) -> dict[str, str]:
        """Digests of the files that `files` puts in the place of needed splits, by `<corpus or hub id>/<split>`."""
        found = {}
        for source, split, name in needed:
            for key in (f"{name}/{split}", f"{source.hub_id}/{split}"):
                if key in dict(self.files):
                    digests = [file_rows(path)[1] for path in self.local(source, split, name)]
                    found[key] = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
        return found

    def under_root(self, source: Source, split: str, name: str | None = None) -> str:
        """Where `root` holds a split, in the words of `Rows.origin`; empty where it does not."""
        if paths := self.local(source, split, name):
            return _named(paths, self.root)
        folder = _hub_folder(self, source)
        return f"folder {source.hub_id}" if folder and _lists(str(folder), source, split) else ""

    def on_machine(self, source: Source, split: str, name: str | None = None) -> str:
        """Where this machine holds a split, in the words of `Rows.origin`; empty where it does not. Asks no hub."""
        if (place := self.under_root(source, split, name)) or not source.on_hub:
            return place
        with offline():
            return f"hub cache {source.hub_id}" if _lists(source.hub_id, source, split) else ""

    def expected(self, source: Source, split: str) -> str:
        """In words: the files that would serve."""
        places = [f"{self.root / p}" for p in source.patterns(split)] if self.root else []
        files = [p if p.endswith(SUFFIXES) else f"{p}.jsonl" for p in places]
        return " or ".join(files)


@cache
def _rows(library: Library, source: Source, split: str, name: str | None) -> Rows:
    if paths := library.local(source, split, name):
        return _read(source, split, tuple(paths), library.root)
    looked = (
        [f"{library.expected(source, split)} (one JSON object a line, or parquet)"] if library.root else []
    )
    if (folder := _hub_folder(library, source)) is not None:
        try:
            return _loaded(source, split, str(folder), f"folder {source.hub_id}")
        except Exception as error:  # the library raises its own kinds
            looked.append(f"{folder} ({first_line(error)})")
    if source.on_hub:
        with offline():
            try:
                return _loaded(source, split, source.hub_id, f"hub cache {source.hub_id}")
            except Exception:  # not there, in one of many words
                looked.append("the local hub cache")
        if reason := unreachable():
            looked.append(f"{source.hub_id} on the hub ({reason})")
        else:
            try:
                return _loaded(source, split, source.hub_id, f"hub {source.hub_id}")
            except Exception as error:  # as above
                looked.append(f"{source.hub_id} on the hub ({first_line(error)})")
    what = f"{name}: " if name else ""
    raise FileNotFoundError(
        f"{what}split {split!r} of {source} was not found: looked for {', '.join(looked) or 'no file: data.root is unset'}"
        "; set data.root to a folder that holds it, or fetch it with `qbench data fetch` where there is a network"
    )


def _read(source: Source, split: str, paths: tuple[Path, ...], root: Path | None) -> Rows:
    from datasets import Dataset

    rows, digests = [], []
    for path in paths:
        found, digest = file_rows(path)
        digests.append(digest)
        # In the hub's layout a file holds one configuration alone, whose rows need not say which.
        whole = source.on_hub and root is not None and path.is_relative_to(root / source.hub_id)
        rows += [row for row in found if whole or source.keeps(row, split)]
    if not rows:
        raise FileNotFoundError(
            f"{', '.join(map(str, paths))} hold no row of split {split!r} of {source}, which is needed"
        )
    columns = dict.fromkeys(key for row in rows for key in row)
    data = Dataset.from_dict({key: alike([row.get(key) for row in rows]) for key in columns})
    sha256 = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return Rows(data, _named(paths, root), sha256)


def _named(paths: Iterable[Path], root: Path | None) -> str:
    names = [str(p.relative_to(root)) if root and p.is_relative_to(root) else str(p) for p in paths]
    return "file " + ", ".join(names)


def _loaded(source: Source, split: str, place: str, origin: str) -> Rows:
    data = table(source, split, place)
    return Rows(data, origin, _sha256(data))


def table(source: Source, split: str, place: str, revision: str | None = None) -> Any:
    """A split from a folder or the hub, as a `datasets.Dataset`; the library raises its own kinds."""
    import datasets

    asked = _asked(source, split, place, revision)
    if source.config != "all" or source.hub_id not in _WITHOUT_ALL:
        return datasets.load_dataset(**asked, split=split)
    names = datasets.get_dataset_config_names(place, revision=asked.get("revision"))
    return datasets.concatenate_datasets(
        [datasets.load_dataset(**asked | {"name": n}, split=split) for n in names]
    )


def _asked(source: Source, split: str, place: str, revision: str | None = None) -> dict[str, Any]:
    asked: dict[str, Any] = {"path": place, "name": source.config}
    if place == source.hub_id and (revision or source.revision):
        asked["revision"] = revision or source.revision
    if (file := source.hub_file(split)) is not None:
        asked |= {"name": None, "data_files": {split: file}}
    return asked


def _lists(place: str, source: Source, split: str) -> bool:
    """Whether a folder or the hub's cache has a split; nothing is read or converted."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(**_asked(source, split, place))
    except Exception:  # not there, in one of many words
        return False
    return split in (builder.info.splits or builder.config.data_files or ())


def _sha256(rows: Iterable[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str, ensure_ascii=False).encode())
    return digest.hexdigest()


def _hub_folder(library: Library, source: Source) -> Path | None:
    if library.root is None:
        return None
    folder = library.root / source.hub_id
    return folder if folder.is_dir() and source.on_hub else None


def _is(path: Path, pattern: Path) -> bool:
    """Whether a file is what a pattern without suffix stands for: nothing but a suffix may follow its name."""
    if not path.is_file() or not path.name.endswith(SUFFIXES):
        return False
    if pattern.name.endswith(SUFFIXES):
        return True
    stem = next(
        path.name.removesuffix(s) for s in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(s)
    )
    return Path(stem).match(pattern.name)


def _existing(path: Path) -> list[Path]:
    return [path] if path.is_file() else []


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """While it lasts the hub's libraries use their cache alone; they ask the hub first otherwise, with many retries."""
    import datasets
    import huggingface_hub.constants as hub

    before = datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before


@cache
def unreachable() -> str:
    """Why the hub cannot be asked; empty where it can. Looked at once, since each try of its libraries takes long."""
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE") == "1":
        return "HF_HUB_OFFLINE is set"
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    try:
        get_session().head(hub.ENDPOINT, timeout=_REACHED_WITHIN)
    except Exception as error:  # of one of several libraries that this one has used
        return f"{hub.ENDPOINT} cannot be reached: {first_line(error)}"
    return ""
