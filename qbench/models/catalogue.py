"""The catalogue: models by the names that `model=` takes, and what is known of them without asking the hub.

`catalogue.toml` is written by hand; the YAML files that Hydra reads differ in a few words, so they are made from it:
`python -m qbench.models.catalogue conf/model`. Sizes, licences and notes stay here, where they are no part of a job.
"""

import sys
import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

_TOML = Path(__file__).with_suffix(".toml")
_BYTE = 8


@dataclass(frozen=True)
class Entry:
    """A model of the catalogue.

    Attributes:
        group: The models that were published together.
        family: `model_type` of its config.
        parameters: Counted where there are dimensions, else as published, rounded.
        stored: Bits of a weight in its files.
        gated: The hub asks for an agreement first.
        remote_code: transformers has no class for it; code of its repository would run.
        attn: What its architecture has: sdpa, or transformers' own arithmetic (eager).
        revision: A commit; `None` where none was found in public code.
        config: The dimensions that `parameters` was counted from; "none" stands for null.
        source: Where the dimensions, or else the rounded size, are from.
    """

    name: str
    id: str
    group: str
    family: str
    parameters: int
    licence: str
    source: str
    stored: int = 16
    gated: bool = False
    remote_code: bool = False
    attn: str = "sdpa"
    revision: str | None = None
    note: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def embedded(self) -> bool:
        return self.id.startswith("zoo/")

    @property
    def counted(self) -> bool:
        """Whether `parameters` is exact."""
        return self.embedded or bool(self.config)

    @property
    def bytes(self) -> int:
        """Of its weight files, about."""
        return self.parameters * self.stored // _BYTE

    @property
    def dimensions(self) -> dict[str, Any]:
        """`config` as transformers takes it."""
        return {key: None if value == "none" else value for key, value in self.config.items()}

    @property
    def is_here(self) -> bool:
        """Whether its weights are on this machine: embedded, or all of them in the hub's cache at this revision."""
        return self.embedded or _is_cached(self.id, self.revision)


@cache
def entries() -> dict[str, Entry]:
    """The catalogue by name, in its own order."""
    found: dict[str, Entry] = {}
    for group in tomllib.loads(_TOML.read_text(encoding="utf-8"))["group"]:
        title, models = group.pop("title"), group.pop("models")
        for name, model in models.items():
            if name in found:
                raise ValueError(f"{_TOML}: {name} stands in it twice; give each model a name of its own")
            found[name] = Entry(name=name, group=title, **group | model)
    return found


def text(entry: Entry) -> str:
    """The YAML file of a model of the hub."""
    told = [f"{written(entry)} parameters", entry.licence] + ["gated"] * entry.gated
    told += ["only with model.trust_remote_code=true"] * entry.remote_code
    return "\n".join((
        f"# {entry.group}: {', '.join(told)}. Made from qbench/models/catalogue.toml.",
        f"id: {entry.id}",
        f"revision: {entry.revision or 'null'}",
        "dtype: auto",
        f"attn: {entry.attn}",
        "trust_remote_code: false",
        "outliers: null",
        "",
    ))  # fmt: skip


def written(entry: Entry) -> str:
    """The number of parameters: in three digits where it was counted, in those published otherwise."""
    rounded = float(f"{entry.parameters:.2e}")  # first, since 999,885,952 is 1.00B
    unit, letter = next(u for u in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if rounded >= u[0])
    return f"{rounded / unit:#.3g}".rstrip(".") + letter if entry.counted else f"{rounded / unit:g}{letter}"


def write(folder: Path) -> list[Path]:
    """Write the YAML files of all models of the hub into a folder; the embedded ones have theirs."""
    paths = []
    for entry in entries().values():
        if not entry.embedded:
            paths.append(folder / f"{entry.name}.yaml")
            paths[-1].write_text(text(entry), encoding="utf-8")
    return paths


def _is_cached(id_: str, revision: str | None) -> bool:
    import json

    from huggingface_hub import try_to_load_from_cache

    def path(name: str) -> Path | None:
        found = try_to_load_from_cache(id_, name, revision=revision)
        return Path(found) if isinstance(found, str) else None

    if path("model.safetensors"):
        return True
    if (index := path("model.safetensors.index.json")) is None:
        return False
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all(path(shard) for shard in shards)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python -m qbench.models.catalogue <folder of the YAML files, conf/model>")
    print(f"{len(write(Path(sys.argv[1])))} files in {sys.argv[1]}")
