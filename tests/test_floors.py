"""The house has floors: a module imports only from its own floor or floors below."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qbench"
FLOORS = [
    "errors", "quant", "zoo", "data", "models", "calib", "algorithms", "progress", "engine", "memory", "statistics",
    "deploy", "evaluate", "job", "opening", "measure", "remade", "run", "export", "track", "report", "sweep", "cli",
    "__main__",
]  # fmt: skip
ONLY_IN = {
    "hydra": {"cli", "sweep"},
    "omegaconf": {"cli", "sweep"},
    "mlflow": {"track"},
    "pandas": {"report"},
    "matplotlib": {"report"},
    "transformers": {"models", "zoo"},
    "gptqmodel": {"deploy"},
    "lm_eval": {"evaluate"},
    "gguf": {"deploy"},
    "llama_cpp": {"deploy"},
    "rich": {"cli", "sweep", "report"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert not [n for n in nodes if isinstance(n, ast.ImportFrom) and n.level], "imports are absolute here"
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = floor_of(path)
    if here == "__init__":
        assert not imports(path)
        return
    for name in imports(path):
        root, *rest = name.split(".")
        assert here in ONLY_IN.get(root, {here}), f"{here!r} may not import {root}"
        if root == "qbench":
            assert FLOORS.index(rest[0]) <= FLOORS.index(here), f"{here!r} imports {name} from above"


def test_the_command_line_starts_without_heavy_libraries():
    """`--help`, `--cfg job` and completion must answer at once."""
    heavy = {"torch", "transformers", "mlflow", "lm_eval", "pandas", "datasets", "pydantic", "numpy"}
    code = "import sys, hydra, qbench.cli, qbench.sweep.grid, qbench.sweep.study; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not heavy & set(result.stdout.split())
