"""Keep text that takes long to make in the user's cache folder, `$XDG_CACHE_HOME/qbench` or `~/.cache/qbench`.

A key must be a hash of everything that the text depends on: then nothing here can be out of date. A
file that is missing, damaged or out of reach only means that its text is made again.
"""

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

_OUT_OF_REACH = (OSError, RuntimeError)  # `Path.home` raises the second for a user without a home


def read(name: str, key: str) -> str | None:
    """The text that was written under this name and key, or None where it is not there intact."""
    try:
        digest, _, content = _path(name, key).read_bytes().partition(b"\n")
    except _OUT_OF_REACH:
        return None
    return content.decode("utf-8", "surrogatepass") if digest == _digest(key, content) else None


def write(name: str, key: str, text: str) -> None:
    """Store the text for later processes, if the cache folder can be written to."""
    content = text.encode("utf-8", "surrogatepass")
    temporary = None
    try:
        path = _path(name, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(_digest(key, content) + b"\n" + content)
        temporary.replace(path)  # at once, so that a process which reads meanwhile finds all or nothing
    except _OUT_OF_REACH:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def _path(name: str, key: str) -> Path:
    named = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and to be ignored.
    root = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
    return root / "qbench" / f"{name}-{key}"


def _digest(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\n" + content).hexdigest().encode()
