"""`qbench models`: the catalogue, what of it is here, and what it takes to get the rest."""

import difflib
from collections.abc import Callable

from qbench.errors import UsageError
from qbench.models.catalogue import Entry, entries, written

_FEW = 12  # entries of which every note is told
_UNPINNED = "no"
_KEYS: dict[str, Callable[[Entry], str]] = {
    "family": lambda entry: entry.family,
    "gated": lambda entry: _yes(entry.gated),
    "remote": lambda entry: _yes(entry.remote_code),
    "pinned": lambda entry: _yes(entry.revision is not None),
    "here": lambda entry: _yes(entry.is_here),
}


def models(arguments: list[str]) -> int:
    """`qbench models [<word> …] [family=…] [gated=yes | no] [remote=…] [pinned=…] [here=…]`: models that have a name here.

    Words are looked for in names, hub ids, families and licences; what fits all of them is listed. Any other model of the
    hub, or a folder, runs as `model=hf model.id=…`. Nothing is asked of the hub: what is gated, and the estimated size of a
    download, are as known when the catalogue was written.
    """
    found = _chosen(arguments)
    from rich.table import Table

    from qbench.cli.reports import console

    grid = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("model", "hub id", "family", "size", "where", "licence", "access", "pinned"):
        grid.add_column(column, overflow="fold", no_wrap=column in ("model", "size", "where", "pinned"))
    for entry in found:
        grid.add_row(
            entry.name, entry.id, entry.family, written(entry), _where(entry), entry.licence, _access(entry),
            entry.revision[:7] if entry.revision else "" if entry.embedded else _UNPINNED,
        )  # fmt: skip
    out = console()
    out.print(grid)
    for line in ["", *_notes(found), *_next(found)]:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _chosen(arguments: list[str]) -> list[Entry]:
    """The entries that fit every argument.

    Raises:
        UsageError: If an argument fits none, or no entry fits them all.
    """
    everything = list(entries().values())
    found = everything
    for argument in arguments:
        if not (fitting := [entry for entry in everything if _fits(entry, argument)]):
            raise UsageError(_unknown(argument, everything))
        found = [entry for entry in found if entry in fitting]
    if not found:
        raise UsageError(f"no model is all of {', '.join(arguments)}; leave one of them out")
    return found


def _fits(entry: Entry, argument: str) -> bool:
    key, equals, value = argument.partition("=")
    if not equals:
        spoken = (entry.name, entry.id, entry.family, entry.group, entry.licence)
        return any(argument.casefold() in text.casefold() for text in spoken)
    if key not in _KEYS:
        raise UsageError(
            f"`qbench models` filters by words and {', '.join(f'{k}=' for k in _KEYS)}; got {argument!r}"
        )
    return _KEYS[key](entry) == value


def _unknown(argument: str, everything: list[Entry]) -> str:
    key, equals, _ = argument.partition("=")
    if equals:
        known = sorted({_KEYS[key](entry) for entry in everything})
        return f"no model has {argument}; {key} is one of {', '.join(known)}"
    near = difflib.get_close_matches(argument, [entry.name for entry in everything], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    groups = ", ".join(dict.fromkeys(entry.group for entry in everything))
    return (
        f"no model fits {argument!r}; {hint}there are {groups}; any other model runs as "
        "model=hf model.id=<hub id or folder>"
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _where(entry: Entry) -> str:
    if entry.embedded:
        return "embedded"
    return "here" if entry.is_here else f"to fetch, {_bytes(entry.bytes)}"


def _bytes(n: int) -> str:
    return f"{n / 1e9:.0f} GB" if n >= 1e10 else f"{n / 1e9:.1f} GB"


def _access(entry: Entry) -> str:
    return ", ".join(["gated"] * entry.gated + ["remote code"] * entry.remote_code)


def _notes(found: list[Entry]) -> list[str]:
    """What is particular about a few, and what the marks of the table mean for all of them."""
    lines = []
    if len(found) <= _FEW:
        for note in dict.fromkeys(entry.note for entry in found if entry.note):
            lines.append(f"{', '.join(entry.name for entry in found if entry.note == note)}: {note}")
    if gated := [entry for entry in found if entry.gated]:
        lines.append(
            f"gated: agree to the terms on the model's page (https://huggingface.co/{gated[0].id}), then `hf auth login` "
            "or HF_TOKEN=<token>"
        )
    if any(entry.remote_code for entry in found):
        lines.append(
            "remote code: transformers has no such architecture; code of the model's repository runs on this machine, "
            "only with model.trust_remote_code=true"
        )
    if any(entry.revision is None and not entry.embedded for entry in found):
        lines.append("not pinned: the newest commit is loaded; model.revision=<commit> pins another")
    return lines


def _next(found: list[Entry]) -> list[str]:
    first = found[0]
    remote = " model.trust_remote_code=true" * first.remote_code
    lines = [f"qbench model={first.name} algo=gptq{remote}"]
    if any(not entry.embedded for entry in found):
        lines.append(
            "any other model of the hub, or a folder: qbench model=hf model.id=<hub id or folder> algo=gptq"
        )
    return lines
