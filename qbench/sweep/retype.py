"""The shortest command that gives the job of a record again, and the proof that it does."""

import re
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qbench.errors import UsageError
from qbench.job import canonical_json
from qbench.sweep.composed import config_of
from qbench.sweep.settings import Jobs
from qbench.sweep.shipped import CONF
from qbench.sweep.steps import CUSTOM
from qbench.track.records import Record, flatten

# Where and how a job ran does not make it another; `algo_name` follows from `algo`.
_NOT_SAID = {"results", "tracker", "launcher", "job", "plan", "force", "baseline", "algo_name"}
_GROUPS = ("model", "calib", "eval")
_PLAIN = re.compile(r"[A-Za-z_/][\w/.@-]*", re.ASCII)  # text that needs no quotes
_OTHERS = {"null", "true", "false", "nan", "inf"}  # what would not be text without them
_SPECIAL = re.compile(r"[\\\[\]{}(),:= \t]")


def command_of(record: Record) -> str | None:
    """A `qbench` command whose job has the record's identity; `None` where none was found.

    None is found for an algorithm of the user's own, where a file that it read has changed or is gone, or where a newer
    qbench makes another job of it.
    """
    config = record["config"]
    name = str(config["algo_name"])
    algo = name if (CONF / "algo" / f"{name}.yaml").is_file() else CUSTOM
    chosen = {"algo": algo} | {group: _choice(group, config[group]) for group in _GROUPS}
    if scheme := _scheme(config):
        chosen["scheme"] = scheme
    arguments = [f"{group}={choice}" for group, choice in chosen.items()]
    if chosen["model"] == "hf":
        arguments.append(f"model.id={_written(config['model']['id'])}")
    if config["seed"] != 0:  # first, for other keys follow it
        arguments.append(f"seed={config['seed']}")
    try:
        left = _departures(config, config_of(arguments))
        if record["identity"]["calib"] is None:
            left = {key: value for key, value in left.items() if not key.startswith("calib.")}
            arguments.remove(f"calib={chosen['calib']}")
        arguments += [f"{key}={_written(value)}" for key, value in left.items()]
        if canonical_json(Jobs().job(config_of(arguments)).identity()) != canonical_json(record["identity"]):
            return None
    except (UsageError, ValueError, NotImplementedError, OSError):
        return None
    defaults = {f"{group}={_default(group)}" for group in (*_GROUPS, "scheme")}
    return shlex.join(["qbench", *(a for a in arguments if a not in defaults)])


def _default(group: str) -> str:
    return next(str(one[group]) for one in _shipped()["defaults"] if isinstance(one, dict) and group in one)


@cache
def _shipped() -> Any:
    return OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"), resolve=False)


def _scheme(config: Mapping[str, Any]) -> str | None:
    """The file that states most of the scheme, and nothing else."""
    fitting = {}
    for path in sorted((CONF / "scheme").glob("*.yaml")):
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if all(config.get(key) == value for key, value in content.items()):
            fitting[path.stem] = len(flatten({k: v for k, v in content.items() if v != _shipped().get(k)}))
    return max(fitting, key=lambda name: fitting[name], default=None)


def _choice(group: str, section: Mapping[str, Any]) -> str:
    """The file of a group that a section departs least from; that of its name, where it has one."""
    if (CONF / group / f"{section.get('name')}.yaml").is_file():
        return str(section["name"])
    usual = _shipped().get(group) or {}

    def distance(path: Path) -> tuple[int, bool, bool, str]:
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False, throw_on_missing=False)
        stated = usual | (content or {})
        differing = sum(stated.get(key) != value for key, value in section.items())
        return differing, path.stem == "hf", path.stem != _default(group), path.stem

    return min((CONF / group).glob("*.yaml"), key=distance).stem


def _departures(config: Mapping[str, Any], usual: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What has to be said beside the choices: whole values where the usual one is no mapping."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if (not prefix and key in _NOT_SAID) or (key in usual and usual[key] == value):
            continue
        name = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(usual.get(key), dict):
            found |= _departures(value, usual[key], f"{name}.")
        elif key in usual:
            found[name] = value
        else:
            found[f"+{name}"] = value
    return found


def _written(value: Any) -> str:
    """A value in Hydra's grammar for overrides."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "[" + ",".join(_written(one) for one in value) + "]"
    if isinstance(value, dict):  # keys cannot be quoted
        return "{" + ",".join(f"{_SPECIAL.sub(_escaped, k)}:{_written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str) and (not _PLAIN.fullmatch(value) or value.lower() in _OTHERS):
        # Backslashes stand for themselves, but before a quote.
        return "'" + re.sub(r"(\\*)('|$)", _quoted, value) + "'"
    return str(value)


def _escaped(found: re.Match[str]) -> str:
    return "\\" + found[0]


def _quoted(found: re.Match[str]) -> str:
    return found[1] * 2 + ("\\'" if found[2] else "")
