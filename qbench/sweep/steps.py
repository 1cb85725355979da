"""Algorithms put together on the command line: `algo.transform=quarot algo.clip=mse algo.round=gptq`.

A step is a file `conf/step/<name>.yaml`, or the dotted path of a class. What may follow what is the business of
`Pipeline`; here names become configs.
"""

import copy
import difflib
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from qbench.sweep.shipped import CONF

CUSTOM = "custom"  # the choice of `algo` that is put together by names
KINDS = ("transform", "select", "allocate", "clip", "round", "tune")
_PIPELINE = "qbench.algorithms.base.Pipeline"


def choose_custom(arguments: list[str]) -> list[str]:
    """Add `algo=custom` where a step of it is set and no algorithm was chosen."""
    keys = [a.lstrip("+").partition("=")[0] for a in arguments]
    if "algo" in keys or not {f"algo.{key}" for key in (*KINDS, "steps")} & set(keys):
        return arguments
    return [*arguments, f"algo={CUSTOM}"]


def title(choice: str, algo: dict[str, Any]) -> str:
    """What tables call an algorithm: its name, or those of its steps."""
    return "+".join(_names(algo)) or choice if choice == CUSTOM else choice


def in_full(algo: dict[str, Any]) -> dict[str, Any]:
    """An algorithm's config with the configs of its steps in place of their names.

    Raises:
        ValueError: If there is no step of a name, or options are given for a step that is not there.
    """
    if "_target_" in algo and not isinstance(algo.get("steps"), list):
        return algo
    names = _names(algo)
    options = dict(algo.get("options") or {})
    steps: dict[str, Any] = {}
    for name in names:
        steps[name if name not in steps else f"{name} {len(steps)}"] = _step(name, algo.get("seed", 0)) | (
            options.pop(name, None) or {}
        )
    if options:
        raise ValueError(f"algo.options are for {', '.join(options)}; the steps are {', '.join(names)}")
    if not steps:
        raise ValueError(
            "algo=custom has no step; set e.g. algo.transform=quarot algo.clip=mse algo.round=gptq"
        )
    return next(iter(steps.values())) if len(steps) == 1 else {"_target_": _PIPELINE, "steps": steps}


def _names(algo: dict[str, Any]) -> list[str]:
    if isinstance(algo.get("steps"), list):
        return [str(name) for name in algo["steps"]]
    found: list[str] = []
    for kind in KINDS:
        value = algo.get(kind)
        found += value if isinstance(value, list) else [str(value)] if value else []
    return found


def _step(name: str, seed: int) -> dict[str, Any]:
    if "." in name:  # a class of the user's own
        return {"_target_": name}
    config = copy.deepcopy(_shipped(name))
    return {key: seed if value == "${seed}" else value for key, value in config.items()}


@cache
def _shipped(name: str) -> dict[str, Any]:
    path = CONF / "step" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown step {name!r}; {hint}there are {', '.join(known)}")
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)  # type: ignore[return-value]
