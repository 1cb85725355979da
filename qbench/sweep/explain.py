"""One line for an error of Hydra: what was written, what is needed, what comes near."""

import difflib
import re

from omegaconf import OmegaConf

from qbench.sweep.shipped import CONF


def explain(error: Exception) -> str:
    """Hydra spreads its message over several lines and ends with a hint for developers; this is one line."""
    text = str(error)
    if match := re.search(r"Could not find '([\w-]+)/([^']*)'", text):
        group, choice = match.groups()
        choices = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        near = difflib.get_close_matches(choice, choices, n=3, cutoff=0.6)
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
