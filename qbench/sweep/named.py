"""Which records are of the recipes that `key=value` arguments name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from qbench.data.corpora import short
from qbench.errors import UsageError
from qbench.sweep.explain import explain
from qbench.sweep.shipped import CONF
from qbench.sweep.steps import choose_custom
from qbench.track.records import Record

_RECIPES = ("algo", "scheme")  # sections whose choices are compared
# How, where and on what a job runs: no part of a recipe.
_APART = {
    "results",
    "tracker",
    "launcher",
    "job",
    "plan",
    "force",
    "baseline",
    "device",
    "model",
    "eval",
    "judge",
    "data",
}


@dataclass(frozen=True)
class Named:
    """Arguments, read.

    Attributes:
        values: By key: what it may be; choices of `algo`, `scheme` and `calib` by name.
        base: The arguments that are the same for all recipes.
        texts: That `eval.ppl` asks for; empty where it does not.
    """

    values: dict[str, tuple[Any, ...]]
    base: tuple[str, ...]
    texts: tuple[str, ...] = ()

    def holds(self, record: Record) -> bool:
        """Whether the record's recipe is among those named; the floating-point model always is."""
        if record["labels"]["algo"] == "fp":
            return True
        config, is_calibrated = record["config"], record["labels"]["calib"] is not None
        return all(
            any(_fits(config, key, value) for value in values)
            for key, values in self.values.items()
            if is_calibrated or key.partition(".")[0] not in ("calib", "seed")
        )


def named(arguments: Sequence[str]) -> Named:
    """Read what is not one of the command's own keys.

    Raises:
        UsageError: If something cannot be read, or has several values and may have one.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(choose_custom([*arguments]))
    except HydraException as error:
        raise UsageError(explain(error)) from error
    values: dict[str, tuple[Any, ...]] = {}
    base: list[str] = []
    texts: tuple[str, ...] = ()
    for override in parsed:
        key = override.get_key_element().lstrip("+~")
        section = key.partition(".")[0]
        if key == "sweep":
            raise UsageError("+sweep= is for `qbench -m`; name recipes by algo= and scheme=")
        if section in _APART:
            if override.is_sweep_override():
                raise UsageError(f"{override.input_line}: {key} is one for all recipes; give a single value")
            base.append(str(override.input_line))
            asked = override.value()
            if key == "eval.ppl" and isinstance(asked, list):
                texts = tuple(short(str(text)) for text in asked)
            continue
        values[key] = tuple(_values(override))
        if section not in _RECIPES and not override.is_sweep_override():
            base.append(str(override.input_line))
    return Named(values, tuple(base), texts)


def _values(override: Override) -> list[Any]:
    if not override.is_sweep_override():
        return [override.value()]
    parser = OverridesParser.create()
    return [parser.parse_override(f"key={text}").value() for text in override.sweep_string_iterator()]


def _fits(config: dict[str, Any], key: str, value: Any) -> bool:
    if key == "algo":
        return bool(config["algo_name"] == value)
    if key in ("scheme", "calib"):
        path = CONF / key / f"{value}.yaml"
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False) if path.is_file() else {}
        if key == "calib":
            return bool(config["calib"]["name"] == content.get("name"))
        return bool(content) and all(config.get(k) == v for k, v in content.items())
    found: Any = config
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return key.startswith("algo.")  # an algorithm without this hyperparameter
        found = found[part]
    return bool(found == value)
