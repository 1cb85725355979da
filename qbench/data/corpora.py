"""Text by name: from a folder, from the hub, or from this machine's standard library.

A corpus is looked for in this order: embedded; under `data.root` as one plain file per split; under
`data.root` in the hub's layout; in the hub's local cache; on the hub.
"""

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from qbench.errors import first_line
from qbench.zoo import stdlib

Use = Literal["calibration", "test"]


@dataclass(frozen=True)
class Source:
    """Where a hub data set is and how its rows become text.

    Attributes:
        splits: The hub split that serves each use.
        join: Put between rows.
    """

    hub_id: str
    config: str
    splits: dict[Use, str]
    field: str = "text"
    join: str = "\n\n"


# Protocols: perplexity joins the raw rows and tokenizes once (arXiv:2210.17323 and its repository).
SOURCES = {
    "wikitext2": Source("Salesforce/wikitext", "wikitext-2-raw-v1", {"calibration": "train", "test": "test"}),
}


@dataclass(frozen=True)
class Text:
    """The text of one corpus for one use.

    Attributes:
        origin: Where it was found, for the log and the record.
    """

    name: str
    use: Use
    text: str
    origin: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def known() -> list[str]:
    return [*stdlib.NAMES, *SOURCES]


def versioned(name: str) -> str:
    """The name as it stands in a job's identity: embedded text changes with the Python version."""
    return f"{name}@{platform.python_version()}" if name.startswith("stdlib_") else name


def plain_file(name: str, use: Use, root: Path) -> Path:
    """The path under `root` of a split kept as one JSON-lines file."""
    source = SOURCES[name]
    return root / name / f"{source.config}_{source.splits[use]}.jsonl"


@cache
def load_text(name: str, use: Use, root: Path | None = None) -> Text:
    """The text of a corpus.

    Raises:
        ValueError: If the name is not known.
        FileNotFoundError: If the corpus is neither local nor on a hub that can be reached; names what was
            looked for.
    """
    if name in stdlib.NAMES:
        corpus = stdlib.load(name, use)
        return Text(name, use, corpus.text, "standard library of this Python")
    if name not in SOURCES:
        raise ValueError(f"unknown corpus {name!r}; known are {', '.join(known())}")
    source = SOURCES[name]
    if root is not None and plain_file(name, use, root).is_file():
        path = plain_file(name, use, root)
        with path.open(encoding="utf-8") as lines:  # not splitlines(): it also cuts at U+2028 inside a string
            text = source.join.join(json.loads(line)[source.field] for line in lines)
        return Text(name, use, text, f"file {path.name}")
    rows, origin = _hub_rows(name, use, root)
    return Text(name, use, source.join.join(rows), origin)


def _hub_rows(name: str, use: Use, root: Path | None) -> tuple[Sequence[str], str]:
    import datasets  # here, since embedded corpora need none of it

    source = SOURCES[name]
    local = root / source.hub_id if root is not None else None
    place = str(local) if local is not None and local.is_dir() else source.hub_id
    try:
        rows = datasets.load_dataset(place, source.config, split=source.splits[use])
    except Exception as error:  # the library raises its own kinds for a hub out of reach, and plain ones
        looked = (
            f"{plain_file(name, use, root)} (one JSON object a line, field {source.field!r}), {local}, "
            if root
            else ""
        )
        raise FileNotFoundError(
            f"corpus {name!r} ({use}) was not found: looked for {looked}the local hub cache and "
            f"{source.hub_id} on the hub ({first_line(error)}); set data.root to "
            "a folder that holds it, or use an embedded corpus: " + ", ".join(stdlib.NAMES)
        ) from error
    return rows[source.field], "hub layout" if place != source.hub_id else f"hub {source.hub_id}"
