"""Named studies: `+sweep=quickstart` stands for the axes that `sweeps/quickstart.yaml` states."""

import difflib

from omegaconf import OmegaConf

from qbench.errors import UsageError
from qbench.sweep.shipped import SWEEPS


def unfold(arguments: list[str]) -> list[str]:
    """Replace every `+sweep=<name>` by the axes of that study; what else is written overrides them.

    Raises:
        UsageError: If there is no such study, or if it was asked for without `-m`.
    """
    names = [a.removeprefix("+sweep=") for a in arguments if a.startswith("+sweep=")]
    own = [a for a in arguments if not a.startswith("+sweep=")]
    if names and not {"-m", "--multirun"} & set(own):
        raise UsageError(f"+sweep={names[0]} is a grid; write `qbench -m +sweep={names[0]}`")
    axes: dict[str, str] = {}
    for name in names:
        path = SWEEPS / f"{name}.yaml"
        if not path.is_file():
            known = sorted(p.relative_to(SWEEPS).with_suffix("").as_posix() for p in SWEEPS.rglob("*.yaml"))
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"unknown sweep {name!r}; {hint}there are {', '.join(known)}")
        axes |= {str(key): str(value) for key, value in OmegaConf.load(path).axes.items()}
    written = {a.partition("=")[0] for a in own}
    return own + [f"{key}={value}" for key, value in axes.items() if key not in written]
