"""The manifest of an exported checkpoint: size and SHA-256 of every file, written last."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "qbench_manifest.json"
_CHUNK = 1 << 24


def write_manifest(folder: Path) -> None:
    """Note size and SHA-256 of every file of a folder."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    part = folder / f".{MANIFEST}.part"
    part.write_text(json.dumps({"files": files}, indent=2) + "\n")
    _sync(part)
    part.rename(folder / MANIFEST)


def verify_if_listed(folder: Path) -> None:
    """As `verify`, of a folder that has a manifest.

    Raises:
        OSError: As `verify`.
    """
    if (folder / MANIFEST).is_file():
        verify(folder)


def verify(folder: Path) -> dict[str, dict[str, Any]]:
    """Compare a folder with its manifest; returns size and SHA-256 of each file that it lists.

    Raises:
        OSError: If there is none, or a file is missing, of another size or content, or not listed; names it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise OSError(f"{folder} has no {MANIFEST}: it was not exported by qbench, or not to the end")
    try:
        listed: dict[str, dict[str, Any]] = json.loads(path.read_text())["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{path} is damaged; export again") from error
    for name, about in listed.items():
        file = folder / name
        if not file.is_file():
            raise OSError(f"{file} is missing, which {MANIFEST} lists; export again")
        size = file.stat().st_size
        if size != about["bytes"]:
            raise OSError(
                f"{file} has {size} bytes, {MANIFEST} says {about['bytes']}; it was cut off or replaced, export again"
            )
        if _digest(file) != about["sha256"]:
            raise OSError(
                f"{file} is not what was exported (its SHA-256 differs from that in {MANIFEST}); export again"
            )
    weights = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.suffix in (".safetensors", ".gguf")}
    if strange := sorted(weights - listed.keys()):
        raise OSError(
            f"{folder} has {', '.join(strange)}, which {MANIFEST} does not list; remove it, or export again"
        )
    return listed


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
