"""What jobs need of the hub, brought to this machine: data sets into `data.root`, models into the hub's cache.

`qbench-data.json` beside the data says what was fetched, from which commit, with which SHA-256. A file is written
under another name, put into the manifest, and renamed: a fetch that was killed leaves nothing half-written, and goes on
when it is repeated. One fetch at a time may write to a folder.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qbench.data.library import Library, offline, table, unreachable
from qbench.data.sources import Source
from qbench.errors import UsageError, first_line

MANIFEST = "qbench-data.json"
_OF_MODELS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "tokenizer*"]
_SECOND_COPIES = ["consolidated*", "original/*", "onnx/*"]  # the same weights for other programs


@dataclass
class Manifest:
    """What was fetched into a folder.

    Attributes:
        data: By path below the folder: source, configuration, split, revision, rows, SHA-256, bytes.
        models: By id and revision: these, the commit, and SHA-256 and bytes of each file.
    """

    root: Path
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def of(root: Path) -> "Manifest":
        """The manifest of a folder, an empty one where nothing was fetched yet.

        Raises:
            UsageError: If it cannot be read.
        """
        if not (path := root / MANIFEST).is_file():
            return Manifest(root)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return Manifest(root, dict(content["data"]), dict(content["models"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} cannot be read ({first_line(error)}); delete it") from error

    def save(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        draft = self.root / f"{MANIFEST}.part"
        text = json.dumps({"data": self.data, "models": self.models}, indent=1, sort_keys=True)
        draft.write_text(f"{text}\n", encoding="utf-8")
        draft.replace(self.root / MANIFEST)

    def files(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every file that was fetched, where it should be on this machine, with its SHA-256 and bytes."""
        for path, about in self.data.items():
            yield self.root / path, about
        for about in self.models.values():
            folder = snapshot(about["id"], about["commit"])
            for name, file in about["files"].items():
                yield folder / name, file


@dataclass(frozen=True)
class Piece:
    """A split that jobs read; `data.files` may call it by the name of its corpus."""

    source: Source
    split: str
    name: str | None = None

    def __str__(self) -> str:
        return f"data set {self.source}, split {self.split}"

    @property
    def path(self) -> str:
        """Below `data.root`: the place where a library looks first."""
        return f"{self.source.hub_id}/{self.source.config or 'default'}/{self.split}.parquet"

    def fetch(self, library: Library, manifest: Manifest) -> str:
        """Write the split into `data.root` unless it is there; returns what was done, in words.

        Raises:
            OSError: If it could not be had, with the reason.
        """
        if place := library.under_root(self.source, self.split, self.name):
            return f"is there ({place})"
        if not self.source.on_hub:
            raise OSError(f"it is not on the hub; put it at {library.expected(self.source, self.split)}")
        rows, commit = _rows(self.source, self.split)
        path = manifest.root / self.path
        draft = path.with_name(f"{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(str(draft))
        about = {"source": self.source.hub_id, "config": self.source.config, "split": self.split}
        manifest.data[self.path] = about | {"revision": commit, "rows": len(rows), **digest(draft)}
        manifest.save()  # first, so that no file of ours is without an entry
        draft.replace(path)
        return f"{len(rows)} rows, {size(path.stat().st_size)}"


@dataclass(frozen=True)
class Weights:
    """A model of the hub that jobs load; with `code`, its own Python files too."""

    id: str
    revision: str | None = None
    code: bool = False

    def __str__(self) -> str:
        return f"model {self.id}" + (f" ({self.revision})" if self.revision else "")

    def fetch(self, _: Library, manifest: Manifest) -> str:
        """Bring the model into the hub's cache unless it is there; returns what was done, in words.

        Raises:
            OSError: If it could not be had, with the reason.
        """
        folder = self._snapshot()
        key = f"{self.id}@{self.revision or ''}"
        known = manifest.models.get(key, {"commit": None})
        # What was read once need not be read again, and a file that has changed since is for `wrong` to find.
        known = known["files"] if known["commit"] == folder.name else {}
        paths = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        files = {name: known.get(name) or digest(path) for name, path in paths.items()}
        about = {"id": self.id, "revision": self.revision, "commit": folder.name}
        manifest.models[key] = {**about, "files": files}
        manifest.save()
        shown = size(sum(file["bytes"] for file in files.values()))
        return f"{len(files)} files, {shown}, commit {folder.name[:12]}"

    def _snapshot(self) -> Path:
        from huggingface_hub import snapshot_download

        reason, wanted = unreachable(), [*_OF_MODELS, *(["*.py"] if self.code else [])]
        try:
            folder = Path(snapshot_download(
                self.id, revision=self.revision, local_files_only=bool(reason), allow_patterns=wanted,
                ignore_patterns=_SECOND_COPIES,
            ))  # fmt: skip
        except Exception as error:  # the library raises its own kinds
            why = f"it is not in the hub cache, and {reason}" if reason else first_line(error)
            raise OSError(why) from error
        if lacking := _lacking(folder):
            raise OSError(f"it lacks {', '.join(lacking)}" + f", and {reason}" * bool(reason))
        return folder


def _rows(source: Source, split: str) -> tuple[Any, str | None]:
    """The split and the commit that it is of; from the hub's cache where there is no hub."""
    if reason := unreachable():
        with offline():
            try:
                return table(source, split, source.hub_id), source.revision
            except Exception as error:  # the library raises its own kinds
                raise OSError(f"it is not in the hub cache, and {reason}") from error
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(source.hub_id, revision=source.revision).sha
        return table(source, split, source.hub_id, commit), commit
    except Exception as error:  # as above
        raise OSError(first_line(error)) from error


def _lacking(folder: Path) -> list[str]:
    """The files without which a model cannot be loaded, and which a snapshot lacks."""
    index = folder / "model.safetensors.index.json"
    parts = json.loads(index.read_text())["weight_map"].values() if index.is_file() else ["model.safetensors"]
    return sorted(name for name in {"config.json", *parts} if not (folder / name).is_file())


def snapshot(model_id: str, commit: str) -> Path:
    """Where the hub's cache of this machine holds a commit of a model."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{model_id.replace('/', '--')}" / "snapshots" / commit


def wrong(manifest: Manifest) -> list[str]:
    """What is not as it was fetched, a file each, in words; every file is read."""
    return [
        f"{'changed' if path.is_file() else 'missing'}: {path}"
        for path, about in manifest.files()
        if not path.is_file() or not digest(path).items() <= about.items()
    ]


def digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.1f} kB"
