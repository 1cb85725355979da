"""What a record is called in a table: its labels, and the setting that tells it from others of the same labels."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from qbench.track.records import Record, flatten

Labels = tuple[str, ...]

_ALWAYS = ("model", "algo", "scheme")
_CALIB = ("calib.name", "calib.recipe", "calib.mix")  # what the label `calib` says
_DRAW = "calib.seed"


def label(record: Mapping[str, Any], key: str) -> str:
    """A label of a record, or a key of its config, as text; empty where there is none.

    A job that reads no calibration data has no `calib.` key: its config has what the sweep said for others.
    """
    labels = record["labels"]
    if key in labels:
        value = labels[key]
    elif key.startswith("calib.") and labels["calib"] is None:
        value = None
    else:
        value = flatten(record["config"]).get(key)
    return "" if value is None else str(value)


def matches(text: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(text, pattern) for pattern in patterns)


def recipe_of(record: Record) -> dict[str, Any]:
    """What a job did, as keys and values: all of its identity but the draw and the evaluation, and the Python."""
    identity = {k: v for k, v in record["identity"].items() if k not in ("scheme", "evaluation")}
    found = {key: value for key, value in flatten(identity).items() if key != _DRAW}
    # The embedded texts change with it.
    return found | {"python": record["environment"]["versions"]["python"]}


def settings(records: Sequence[Record], named: Sequence[str]) -> dict[str, str]:
    """By fingerprint: how a job differs from others of its model, algorithm and scheme, seeds and `named` labels apart.

    Where the named labels alone would make one recipe of jobs that are not, it says how those differ.
    """
    recipes = {r["fingerprint"]: recipe_of(r) for r in records}
    ignored = ("calib.files", *(_CALIB if "calib" in named else ()))  # files go with the set's name
    shown = {key.rpartition(".")[2] for key in named}
    told = {
        name: {
            key: value
            for key, value in recipe.items()
            if not key.startswith(ignored) and key.rpartition(".")[2] not in shown
        }
        for name, recipe in recipes.items()
    }
    differing = _differing(records, _ALWAYS, told)
    # Jobs of one row must differ in nothing else: neither in these labels, nor in what was just left out.
    for name, keys in _differing(records, (*named, *_ALWAYS, "calib"), recipes).items():
        differing[name] |= dict.fromkeys(keys)
    unnamed = {r["fingerprint"]: {key: label(r, key) for key in _ALWAYS if key not in named} for r in records}
    apart = _differing(records, tuple(named), unnamed)
    return {
        name: ", ".join(
            [f"{key}={unnamed[name][key]}" for key in apart[name]]
            + [f"{_short(key)}={recipes[name].get(key, '-')}" for key in differing[name]]
        )
        for name in recipes
    }


def _differing(
    records: Sequence[Record], alike: Sequence[str], told: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, None]]:
    """By fingerprint: the keys in which the records that are alike in these labels differ."""
    groups: dict[Labels, list[str]] = {}
    for record in records:
        groups.setdefault(tuple(label(record, key) for key in alike), []).append(record["fingerprint"])
    found: dict[str, dict[str, None]] = {}
    for group in groups.values():
        keys = dict.fromkeys(key for name in group for key in told[name])
        differing = dict.fromkeys(
            key for key in keys if len({str(told[name].get(key, "-")) for name in group}) > 1
        )
        found |= {name: dict(differing) for name in group}
    return found


def _short(key: str) -> str:
    """`algorithm.steps.0.n_grid` -> `n_grid`, `calib.name` -> `calib`."""
    return "calib" if key == "calib.name" else key.rpartition(".")[2]
