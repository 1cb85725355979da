"""What a record is called in a table: its labels, and the setting that tells it from others of the same labels."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from qbench.track.records import Record, flatten

Labels = tuple[str, ...]

_ALWAYS = ("model", "algo", "scheme")
# Of a calibration set's identity: which text it is. The rest is how much of it, and how it is used.
WHICH_TEXT = ("name", "recipe", "mix", "files", "path")
_SAID = ("name", "recipe", "mix")  # by the label `calib`
_GIVEN = ("files",)  # with the set's name


def label(record: Mapping[str, Any], key: str) -> str:
    """A label of a record, or a key of its config, as text; empty where there is none.

    A job that reads no calibration data has no `calib.` key: its config has what the sweep said for others.
    """
    labels = record["labels"]
    if key in labels:
        value = labels[key]
        if key == "seed" and value is None:  # no calibration data is drawn, but something else may be
            value = ", ".join(dict.fromkeys(map(str, _seeds(record).values()))) or None
    elif key.startswith("calib.") and labels["calib"] is None:
        value = None
    else:
        value = flatten(record["config"]).get(key)
    return "" if value is None else str(value)


def check_labels(records: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> None:
    """Refuse what would be an empty column, or a group of all rows.

    Raises:
        ValueError: If a key is no label, and no record's config has it.
    """
    wanted = dict.fromkeys(keys)
    for record in records:
        known = {*record["labels"], *flatten(record["config"])}
        wanted = dict.fromkeys(key for key in wanted if key not in known)
        if not wanted:
            return
    if records and wanted:
        raise ValueError(
            f"no record has a label or a key {', '.join(wanted)}; there are the labels "
            f"{', '.join(records[0]['labels'])} and keys of configs, such as calib.n_samples"
        )


def matches(text: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(text, pattern) for pattern in patterns)


def is_seed(key: str) -> bool:
    """Whether a dotted key of an identity is the seed of something that is drawn."""
    return key.rpartition(".")[2] == "seed"


def seedless(tree: Any) -> Any:
    """A part of an identity without its seeds: what draws of one recipe have in common."""
    if isinstance(tree, dict):
        return {key: seedless(value) for key, value in tree.items() if not is_seed(str(key))}
    return [seedless(one) for one in tree] if isinstance(tree, list) else tree


def is_calibration_text(key: str) -> bool:
    """Whether a dotted key of an identity says which text models are calibrated on."""
    return _is_calib(key, WHICH_TEXT)


def _is_calib(key: str, names: Sequence[str]) -> bool:
    section, _, rest = key.partition(".")
    return section == "calib" and rest.partition(".")[0] in names


def title_of(record: Mapping[str, Any]) -> str:
    """What a job is called in a sentence."""
    labels = record["labels"]
    named = [str(labels[key]) for key in ("model", "algo", "scheme", "calib") if labels[key] is not None]
    seed = label(record, "seed")
    return " ".join(named + ([f"seed {seed}"] if seed else []))


def draw_of(record: Mapping[str, Any]) -> str:
    """The seeds of a job as text, which sorts as they do; empty where nothing in it is drawn.

    Not only calibration samples are drawn: a random rotation, or the order of training samples, is luck too.
    """
    seeds = _seeds(record)
    return " ".join(f"{k}={v:08}" if isinstance(v, int) else f"{k}={v}" for k, v in seeds.items())


def _seeds(record: Mapping[str, Any]) -> dict[str, Any]:
    identity = {k: v for k, v in record["identity"].items() if k != "evaluation"}
    return {k: v for k, v in flatten(identity).items() if is_seed(k) and v is not None}


def recipe_of(record: Record) -> dict[str, Any]:
    """What a job did, as keys and values: all of its identity but seeds and the evaluation, and the Python."""
    identity = {k: v for k, v in record["identity"].items() if k not in ("scheme", "evaluation")}
    found = {key: value for key, value in flatten(identity).items() if not is_seed(key)}
    # The embedded texts change with it.
    return found | {"python": record["environment"]["versions"]["python"]}


def settings(records: Sequence[Record], named: Sequence[str]) -> dict[str, str]:
    """By fingerprint: how a job differs from others of its model, algorithm and scheme, seeds and `named` labels apart.

    Where the named labels alone would make one recipe of jobs that are not, it says how those differ.
    """
    recipes = {r["fingerprint"]: recipe_of(r) for r in records}
    ignored = (*_GIVEN, *(_SAID if "calib" in named else ()))
    shown = {key.rpartition(".")[2] for key in named}
    told = {
        name: {
            key: value
            for key, value in recipe.items()
            if not _is_calib(key, ignored) and key.rpartition(".")[2] not in shown
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
            + [f"{short(key)}={recipes[name].get(key, '-')}" for key in differing[name]]
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


def short(key: str) -> str:
    """`algorithm.steps.0.n_grid` -> `n_grid`, `calib.name` -> `calib`."""
    return "calib" if key == "calib.name" else key.rpartition(".")[2]
