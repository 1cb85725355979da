"""Configs of many cells, at a fraction of Hydra's price.

Hydra composes a config in 50 to 100 ms. A grid's cells are made of few parts: the section of one choice of
`algo`, of one `model`, ... So each section is composed by Hydra once for each of its own choices, with all else at its
default, plain values (`calib.n_samples=8`, `wbits=4`) are set in a copy, and a cell is put together from its sections.
Where a choice reaches beyond its section, or a section refers to others in a way that is not understood, the whole
config is composed by Hydra as ever. `tests/test_grid.py` checks that both ways agree.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from qbench.sweep.shipped import CONF

_PLAIN = (bool, int, float, str, list, type(None))
_REFERENCE = re.compile(r"\$\{\s*([\w]+)[\w.]*\s*\}")


@dataclass(frozen=True, eq=False)  # each text has one, which is equal to itself alone
class _Setting:
    """One override: the section it concerns, and the value to set where it is no more than that."""

    text: str
    section: str
    path: tuple[str, ...] = ()
    value: Any = None


@dataclass
class _Section:
    """A section as Hydra composed it, references and all.

    Attributes:
        alone: Whether composing it changed nothing outside, and all its references are understood.
        references: Top-level keys that it refers to.
    """

    content: Any
    algo: str
    alone: bool
    references: frozenset[str]


@dataclass
class _Filled:
    """A section with plain values set, and the first key that still has none."""

    section: _Section
    content: Any
    missing: str | None


@dataclass
class Composer:
    """Composes configs from overrides without sweeps.

    Everything is kept: equal overrides give the very same objects, which must not be changed.
    """

    loader: Any
    master: DictConfig
    _raw: dict[tuple[str, ...], tuple[dict[str, Any], str]] = field(default_factory=dict)
    _sections: dict[tuple[str, ...], _Section] = field(default_factory=dict)
    _filled: dict[tuple[Any, ...], _Filled] = field(default_factory=dict)
    _defaults: dict[str, _Filled] = field(default_factory=dict)
    _resolved: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    _whole: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)
    _settings: dict[str, _Setting] = field(default_factory=dict)

    def __post_init__(self) -> None:
        base = {str(k): v for k, v in OmegaConf.to_container(self.master, resolve=False).items()}  # type: ignore[union-attr]
        base.pop("hydra", None)
        self._base = base
        self._parser = OverridesParser.create(config_loader=self.loader)
        self._names = [name for name, value in base.items() if isinstance(value, dict)]
        self._groups = {path.name for path in CONF.iterdir() if path.is_dir()}

    def config(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The config as plain values; sections are shared between configs.

        Raises:
            HydraException, OmegaConfBaseException: What Hydra says of the overrides.
        """
        touched: dict[str, list[_Setting]] = {}
        for text in overrides:
            setting = self._settings.get(text)
            if setting is None:
                setting = self._settings[text] = self._read(text)
            touched.setdefault(setting.section, []).append(setting)
        found = self._untouched()
        for name, settings in touched.items():
            found[name] = self._fill(name, tuple(settings))
        if found[""].section.references or not all(found[name].section.alone for name in touched):
            return self._by_hydra(tuple(overrides))
        config = dict(found[""].content)
        referring = []
        for name in self._names:
            part = found[name]
            if part.missing is not None:
                raise MissingMandatoryValue(f"Missing mandatory value: {name}.{part.missing}")
            config[name] = part.content
            if part.section.references:
                referring.append(name)
        for name in referring:
            references = found[name].section.references
            if not references.isdisjoint(referring):
                return self._by_hydra(tuple(overrides))
            config[name] = self._resolve(name, config, references)
        config["algo_name"] = found["algo"].section.algo
        return config

    def _untouched(self) -> dict[str, _Filled]:
        """Every section as it is by default."""
        if not self._defaults:
            self._defaults = {name: self._fill(name, ()) for name in ("", *self._names)}
            if not all(part.section.alone for part in self._defaults.values()):
                raise NotImplementedError("conf/config.yaml has a reference that is not of the form ${key}")
        return dict(self._defaults)

    def _read(self, text: str) -> _Setting:
        override = self._parser.parse_override(text)
        head, *rest = str(override.key_or_group).split("@")[0].split(".")
        # A choice of `scheme` sets the plain top-level keys; what is below `scheme` is a section like any other.
        section = head if head in self._names and (rest or head != "scheme") else ""
        path = (*rest,) if section else (head, *rest)
        is_plain = not (override.is_add() or override.is_delete()) and (rest or head not in self._groups)
        value = override.value() if is_plain else None
        if is_plain and path and isinstance(value, _PLAIN) and "${" not in str(value):
            return _Setting(text, section, path, value)
        return _Setting(text, section)

    def _fill(self, name: str, settings: tuple[_Setting, ...]) -> _Filled:
        """A section with its plain values set; what has no such key is left to Hydra to refuse or to add."""
        key = (name, *settings)
        if key not in self._filled:
            section = self._section(name, tuple(s.text for s in settings if not s.path))
            content = copy.deepcopy(section.content)
            if not all(_set(content, s.path, s.value) for s in settings if s.path):
                section = self._section(name, tuple(s.text for s in settings))
                content = section.content
            self._filled[key] = _Filled(section, content, _missing(content) if name else None)
        return self._filled[key]

    def _section(self, name: str, overrides: tuple[str, ...]) -> _Section:
        key = (name, *overrides)
        if key not in self._sections:
            values, algo = self._composed(overrides)
            outer = {k: v for k, v in values.items() if k not in self._names}
            mine = values[name] if name else outer
            others = (
                {k: v for k, v in values.items() if k != name}
                if name
                else {k: values[k] for k in self._names}
            )
            text = str(mine)
            references = _REFERENCE.findall(text)
            alone = len(references) == text.count("${") and all(
                v == self._base.get(k) for k, v in others.items()
            )
            self._sections[key] = _Section(mine, algo, alone, frozenset(references))
        return self._sections[key]

    def _composed(self, overrides: tuple[str, ...]) -> tuple[dict[str, Any], str]:
        """What Hydra makes of the overrides, references unresolved, and the name of the algorithm."""
        if overrides not in self._raw:
            composed = self.loader.load_sweep_config(self.master, list(overrides))
            values: dict[str, Any] = OmegaConf.to_container(composed, resolve=False)  # type: ignore[assignment]
            del values["hydra"]
            self._raw[overrides] = values, str(composed.hydra.runtime.choices.algo)
        return self._raw[overrides]

    def _resolve(self, name: str, config: dict[str, Any], references: frozenset[str]) -> Any:
        needed = {k: config[k] for k in sorted(references) if k in config}
        key = (name, id(config[name]), *(str(v) for v in needed.values()))
        if key not in self._resolved:
            node = OmegaConf.create(needed | {name: config[name]})
            self._resolved[key] = OmegaConf.to_container(node[name], resolve=True)
        return self._resolved[key]

    def _by_hydra(self, overrides: tuple[str, ...]) -> dict[str, Any]:
        if overrides not in self._whole:
            composed = self.loader.load_sweep_config(self.master, list(overrides))
            self._whole[overrides] = plain(composed, composed.hydra.runtime.choices.algo)
        return self._whole[overrides]


def _set(tree: Any, path: tuple[str, ...], value: Any) -> bool:
    """Set a leaf that is there already; says whether it was."""
    for key in path[:-1]:
        if not isinstance(tree, dict) or key not in tree:
            return False
        tree = tree[key]
    if not isinstance(tree, dict) or path[-1] not in tree or isinstance(tree[path[-1]], dict):
        return False
    tree[path[-1]] = value
    return True


def _missing(content: dict[str, Any]) -> str | None:
    """The first key without a value."""
    for key, value in sorted(content.items()):
        if value == "???":
            return key
        if isinstance(value, dict) and (inner := _missing(value)):
            return f"{key}.{inner}"
    return None


def plain(config: DictConfig, algo: str) -> dict[str, Any]:
    """The config as plain values, with the name of the chosen algorithm beside its settings."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if key == "hydra":  # it holds interpolations that only Hydra can resolve
            continue
        if not OmegaConf.is_config(value):
            values[str(key)] = value
            continue
        for missing in sorted(OmegaConf.missing_keys(value)):  # named from the root on
            raise MissingMandatoryValue(f"Missing mandatory value: {missing}")
        values[str(key)] = OmegaConf.to_container(value, resolve=True)
    return values | {"algo_name": algo}
