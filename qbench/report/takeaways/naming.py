"""What recipes are called beside one another."""

import json
from collections.abc import Sequence

from qbench.report.takeaways.evidence import Recipe
from qbench.track.records import flatten


def named(recipes: Sequence[Recipe], labels: Sequence[str]) -> list[str]:
    """Names by these labels; where two are equal, with what else tells these recipes apart: their steps, or settings."""
    names = [" ".join(filter(None, (str(getattr(recipe, key)) for key in labels))) for recipe in recipes]
    flat = [
        {k: str(v) for part in ("algorithm", "calibration", "base") for k, v in _flat(recipe, part).items()}
        for recipe in recipes
    ]
    found = []
    for i, name in enumerate(names):
        tells = _telling([flat[j] for j, other in enumerate(names) if other == name])
        settings = [text for key in tells if (text := _setting(key, flat[i].get(key)))]
        found.append(f"{name} ({', '.join(settings)})" if settings else name)
    return found


def _telling(alike: Sequence[dict[str, str]]) -> list[str]:
    """The fewest keys that tell all of them apart, as found one by one; names of steps first."""
    keys = dict.fromkeys(key for one in alike for key in one)
    tells: list[str] = []
    groups = 1
    for key in sorted(keys, key=lambda k: (not k.endswith(".name"), k.endswith(".revision"))):
        apart = len({tuple(one.get(k) for k in (*tells, key)) for one in alike})
        if apart > groups:
            tells, groups = [*tells, key], apart
    return tells


def _setting(key: str, value: str | None) -> str:
    last = key.rpartition(".")[2]
    if last == "name":
        return value or ""
    return f"without {last}" if value is None else f"{last}={value}"


def _flat(recipe: Recipe, part: str) -> dict[str, object]:
    about = json.loads(getattr(recipe, part))
    return flatten(about, part) if about else {}
