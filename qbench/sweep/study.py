"""Named studies: `+sweep=quickstart` stands for the axes that `sweeps/quickstart.yaml` states."""

import difflib
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import OmegaConf

from qbench.errors import UsageError
from qbench.sweep.shipped import SWEEPS


@dataclass(frozen=True)
class Study:
    """One YAML file of `sweeps/`.

    Attributes:
        axes: The values of each key, as on the command line; the grid is their product.
        exclude: Cells to leave out: each a mapping from labels (`algo`, `scheme`, `wbits`, `calib`, ...) or keys
            (`calib.n_samples`) to one value or several, which the cell must all meet.
        tables: The files of `qbench tables` that it is for.
    """

    axes: dict[str, str | int | float | bool]
    tables: list[str]
    exclude: list[dict[str, Any]] = field(default_factory=list)


def named(arguments: list[str]) -> list[str]:
    """The studies that a command asks for."""
    return [a.removeprefix("+sweep=") for a in arguments if a.startswith("+sweep=")]


def unfold(arguments: list[str]) -> list[str]:
    """Replace every `+sweep=<name>` by the axes of that study; what else is written overrides them.

    Raises:
        UsageError: If there is no such study, or if it was asked for without `-m`.
    """
    own = [a for a in arguments if not a.startswith("+sweep=")]
    axes: dict[str, str] = {}
    for name in named(arguments):
        if not {"-m", "--multirun"} & set(own):
            raise UsageError(f"+sweep={name} is a grid; write `qbench -m +sweep={name}`")
        axes |= {key: str(value) for key, value in load(name).axes.items()}
    written = {a.partition("=")[0] for a in own}
    return own + [f"{key}={value}" for key, value in axes.items() if key not in written]


def load(name: str) -> Study:
    """Read a study.

    Raises:
        UsageError: If there is none of that name, or its file says something else than a study should.
    """
    path = SWEEPS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.relative_to(SWEEPS).with_suffix("").as_posix() for p in SWEEPS.rglob("*.yaml"))
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"unknown sweep {name!r}; {hint}there are {', '.join(known)}")
    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    keys = {one.name for one in fields(Study)}
    if not isinstance(content, dict) or not {"axes", "tables"} <= content.keys() <= keys:
        raise UsageError(f"{path} says {list(content)}; a study has axes and tables, and may have exclude")
    return Study(**content)
