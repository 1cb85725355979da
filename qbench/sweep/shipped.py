"""Where the YAML files are that come with qbench."""

from pathlib import Path


def folder(name: str) -> Path:
    """`conf` or `sweeps`: inside the package as a wheel has it, beside the package as the repository has it."""
    package = Path(__file__).parents[1]
    return package / name if (package / name).is_dir() else package.parent / name


CONF, SWEEPS = folder("conf"), folder("sweeps")
