"""Command line to cells: the product of all axes, each cell composed by itself.

A cell that cannot be composed (an unknown choice, a misspelt key) is kept with its problem, so that
the others can run.
"""

import difflib
import itertools
import re
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from qbench.errors import UsageError
from qbench.sweep.shipped import CONF


@dataclass(frozen=True)
class Cell:
    """One point of the grid: a composed config as plain values, or the problem with it.

    Attributes:
        name: What tells this cell from the others: the values of the swept keys.
    """

    name: str
    config: dict[str, Any] | None = None
    problem: str | None = None


def held_back(arguments: list[str]) -> list[str]:
    """The arguments of a sweep with all that is ours packed into one for the sweeper.

    Hydra would apply them to one config before it calls the sweeper, where `algo.damp=0.05` beside
    `algo=rtn,gptq` is an error that ends the sweep; here it concerns the cells of one algorithm.
    """
    ours = [a for a in arguments if "=" in a and not a.lstrip("+~").startswith(("-", "hydra"))]
    quoted = ",".join("'" + a.replace("\\", "\\\\").replace("'", "\\'") + "'" for a in ours)
    return [a for a in arguments if a not in ours] + [f"hydra.sweeper.arguments=[{quoted}]"]


def expand(arguments: list[str], loader: Any, master: DictConfig) -> list[Cell]:
    """Every combination of the swept values, in the order in which they were written.

    Raises:
        UsageError: If the arguments cannot be read, or leave no cell.
    """
    try:
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
    except HydraException as error:
        raise UsageError(explain(error)) from error
    axes = [_values(override) for override in parsed]
    if not all(axes):
        raise UsageError(
            "the grid is empty: " + ", ".join(a for a, v in zip(arguments, axes, strict=True) if not v)
        )
    swept = [i for i, values in enumerate(axes) if len(values) > 1]
    return [
        _compose(" ".join(point[i] for i in swept), list(point), loader, master)
        for point in itertools.product(*axes)
    ]


def _values(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    key = override.get_key_element()
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _compose(name: str, overrides: list[str], loader: Any, master: DictConfig) -> Cell:
    try:
        config = loader.load_sweep_config(master, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        return Cell(name, problem=explain(error))
    return cell_of(name, config, config.hydra.runtime.choices.algo)


def cell_of(name: str, config: DictConfig, algo: str) -> Cell:
    """A composed config as a cell; `algo` is the name of the chosen algorithm."""
    try:
        return Cell(name, plain(config, algo))
    except OmegaConfBaseException as error:
        return Cell(name, problem=explain(error))


def plain(config: DictConfig, algo: str) -> dict[str, Any]:
    """The config as plain values, with the name of the chosen algorithm beside its settings."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if key == "hydra":  # it holds interpolations that only Hydra can resolve
            continue
        if not OmegaConf.is_config(value):
            values[str(key)] = value
            continue
        for missing in sorted(OmegaConf.missing_keys(value)):
            raise MissingMandatoryValue(f"Missing mandatory value: {key!s}.{missing}")
        values[str(key)] = OmegaConf.to_container(value, resolve=True)
    return values | {"algo_name": algo}


def explain(error: Exception) -> str:
    """One line for an error of Hydra: what was written, what is needed, what comes near.

    Hydra spreads its message over several lines and ends with a hint for developers.
    """
    text = str(error)
    if match := re.search(r"Could not find '([\w-]+)/([^']*)'", text):
        group, choice = match.groups()
        choices = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        near = difflib.get_close_matches(choice, choices, n=3, cutoff=0.5)
        return (
            f"unknown {group} {choice!r}; "
            + (f"did you mean {' or '.join(near)}? " if near else "")
            + f"There are {', '.join(choices)}"
        )
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        return f"unknown key {key!r}; " + _nearest_key(key)
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{match[1]} has several values; a grid is written `qbench -m {match[1]}`"
    if match := re.search(r"Missing mandatory value: ([\w.]+)", text):
        example = " (for example model.id=facebook/opt-125m)" if match[1] == "model.id" else ""
        return f"{match[1]} has no value; set {match[1]}=...{example}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2])


def _nearest_key(key: str) -> str:
    base = OmegaConf.load(CONF / "config.yaml")
    groups = [path.name for path in CONF.iterdir() if path.is_dir()]
    keys = [str(k) for k in base if k not in ("defaults", "hydra")] + groups
    head, _, tail = key.partition(".")
    if tail and head in groups:
        inner = {str(k) for path in (CONF / head).glob("*.yaml") for k in OmegaConf.load(path)}
        if tail in inner:
            return f"the chosen {head} has no {tail}"
        near = difflib.get_close_matches(tail, sorted(inner), n=2, cutoff=0.5)
        return (f"did you mean {' or '.join(f'{head}.{n}' for n in near)}? " if near else "") + (
            f"{head} has {', '.join(sorted(inner - {'_target_'}))}; write +{key}=... to add a key"
        )
    near = difflib.get_close_matches(head, keys, n=2, cutoff=0.5)
    return (f"did you mean {' or '.join(near)}? " if near else "") + f"there are {', '.join(sorted(keys))}"
