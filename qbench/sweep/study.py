"""Named studies: `+sweep=quickstart` stands for the axes that `sweeps/quickstart.yaml` states.

A study is a table of a paper, or several: the grid of jobs behind it, at a scale that needs no downloads and at the
paper's own (`scale=paper`), and the tables and figures that are made of their records (`qbench tables <study>`).
`+sweep=llm_qbench` stands for all studies of the folder.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_args

from omegaconf import OmegaConf
from yaml import YAMLError

from qbench.errors import UsageError
from qbench.report.spec import FigureSpec, TableSpec
from qbench.sweep.shipped import SWEEPS

Scale = Literal["embedded", "paper"]
Axes = dict[str, Any]
MULTIRUN = {"-m", "--multirun"}
_KEYS = {"title", "source", "axes", "paper", "exclude", "tables", "figures"}


_HOLD: dict[str, type] = {"tables": dict, "figures": dict, "exclude": list}
_NAMES: dict[type, str] = {dict: "mapping from names", list: "list"}


@dataclass(frozen=True)
class Study:
    """One YAML file of `sweeps/`.

    Attributes:
        name: Its path below `sweeps/`, as in `+sweep=<name>`.
        title: What the paper calls the table.
        source: The paper; empty for studies of our own.
        grids: By scale: the values of each key, as on the command line. A grid is their product, and the study all
            of its grids together.
        exclude: Cells to leave out: each a mapping from labels (`algo`, `scheme`, `wbits`, `calib`, ...) or keys
            (`calib.n_samples`) to one value or several, which the cell must all meet.
        tables: What is made of the records, by name of the file.
        figures: The same for figures.
    """

    name: str
    title: str
    source: str
    grids: Mapping[Scale, tuple[Axes, ...]]
    exclude: tuple[dict[str, Any], ...]
    tables: Mapping[str, TableSpec]
    figures: Mapping[str, FigureSpec]

    @property
    def algorithms(self) -> list[str]:
        """The algorithms of all its grids."""
        values = [axes["algo"] for grids in self.grids.values() for axes in grids if "algo" in axes]
        return list(dict.fromkeys(algo for value in values for algo in str(value).split(",")))


@dataclass(frozen=True)
class Part:
    """Arguments whose values are crossed with one another, and which of the cells to leave out."""

    arguments: list[str]
    exclude: tuple[dict[str, Any], ...] = ()


def parts(arguments: list[str]) -> list[Part]:
    """What a command's `key=value` arguments ask for, with every `+sweep=` replaced by what that study states.

    What is typed beside it wins over the study; several studies are run one after another.

    Raises:
        UsageError: If there is no such study, or it was asked for without `-m`.
    """
    names = [a.removeprefix("+sweep=") for a in arguments if a.startswith("+sweep=")]
    scales = [a.removeprefix("scale=") for a in arguments if a.startswith("scale=")]
    own = [a for a in arguments if not a.startswith(("+sweep=", "scale="))]
    if scales and (not names or scales[-1] not in get_args(Scale)):
        raise UsageError(f"scale={scales[-1]}: there are embedded and paper, beside +sweep=<study>")
    if not names:
        return [Part(own)]
    if not MULTIRUN & set(own):
        raise UsageError(f"+sweep={names[0]} is a grid; write `qbench -m +sweep={names[0]}`")
    scale: Scale = "paper" if "paper" in scales[-1:] else "embedded"
    written = {a.lstrip("+").partition("=")[0] for a in own}
    found = []
    for name in names:
        those = studies(name)
        if not any(study.grids[scale] for study in those):
            there = ", ".join(known for known, grids in those[0].grids.items() if grids)
            raise UsageError(f"{name} has no scale={scale}; there is {there}")
        for study in those:
            for axes in study.grids[scale]:
                theirs = [f"{key}={value}" for key, value in axes.items() if key.lstrip("+") not in written]
                found.append(Part(own + theirs, study.exclude))
    return found


def studies(name: str) -> list[Study]:
    """The study of that name, or all of a folder's.

    Raises:
        UsageError: If there is none, or a file says something else than a study should.
    """
    if (SWEEPS / f"{name}.yaml").is_file():
        return [_read(SWEEPS / f"{name}.yaml")]
    if name and (SWEEPS / name).is_dir():
        return [_read(path) for path in sorted((SWEEPS / name).glob("*.yaml"))]
    near = difflib.get_close_matches(name, known := names(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"unknown study {name!r}; {hint}there are {', '.join(known)}")


def names() -> list[str]:
    """All studies, and the folders that stand for all of theirs."""
    found = {path.relative_to(SWEEPS).with_suffix("").as_posix() for path in SWEEPS.rglob("*.yaml")}
    return sorted(found | {name.rpartition("/")[0] for name in found if "/" in name})


def _read(path: Path) -> Study:
    name = path.relative_to(SWEEPS).with_suffix("").as_posix()
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
    except YAMLError as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not {"title", "axes", "tables"} <= content.keys() <= _KEYS:
        raise UsageError(f"{path} says {list(content)}; a study has title, axes and tables, may have {_KEYS}")
    try:
        for key, kind in _HOLD.items():
            if not isinstance(content.get(key, kind()), kind):
                raise ValueError(f"{key} is {content[key]!r}, a {_NAMES[kind]} is needed")
        embedded, paper = (list(_grids(content.get(key))) for key in ("axes", "paper"))
        return Study(
            name=name,
            title=content["title"],
            source=content.get("source", ""),
            grids={"embedded": tuple(embedded), "paper": tuple(_over(embedded, paper))},
            exclude=tuple(content.get("exclude", ())),
            tables={key: TableSpec.of(about) for key, about in content["tables"].items()},
            figures={key: FigureSpec.of(about) for key, about in content.get("figures", {}).items()},
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: {error}; docs/studies.md has an example") from error


def _grids(content: Any) -> Iterator[Axes]:
    for axes in content if isinstance(content, list) else [content] if content else []:
        yield {key: _written(value) for key, value in axes.items()}


def _over(embedded: list[Axes], paper: list[Axes]) -> Iterator[Axes]:
    """The paper's grids: what they state over what the embedded ones do; one over all, or each over its own.

    Raises:
        ValueError: If there are several of both, in unequal numbers.
    """
    if len(paper) > 1 and len(paper) != len(embedded):
        raise ValueError(
            f"{len(embedded)} grids and {len(paper)} of the paper; write one of the paper, or as many"
        )
    for own, over in zip_longest(embedded, paper, fillvalue=paper[0] if paper else None):
        if over is not None and own is not None:
            yield {key: value for key, value in (own | over).items() if value != "null"}


def _written(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
