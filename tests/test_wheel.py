"""The wheel: everything that a user needs is inside."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (path,) = out.glob("*.whl")
    return path


def test_it_holds_configs_studies_and_models(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in ("conf/config.yaml", "conf/algo/gptq.yaml", "sweeps/quickstart.yaml",
                 "zoo/weights/micro-llama/model.safetensors"):  # fmt: skip
        assert f"qbench/{name}" in names
    assert "hydra_plugins/qbench_sweeper.py" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_it_works_after_installation_in_an_empty_folder(wheel, tmp_path):
    """A fresh environment that sees this one's libraries, but not the checkout."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    site = next((venv / "lib").glob("python*/site-packages"))
    # A path in a .pth file is added as it is: .pth files in there, such as an editable install's, do not count.
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    subprocess.run([venv / "bin/pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    where = subprocess.run(
        [venv / "bin/python", "-c", "import qbench; print(qbench.__file__)"],
        cwd=empty, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(venv)
    for command in (
        ["algo=rtn", "wbits=4"],
        ["-m", "+sweep=quickstart", "algo=rtn", "eval.limit=8"],
        ["tables"],
    ):
        result = subprocess.run(
            [venv / "bin/qbench", *command], cwd=empty, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert "w4a16g128" in result.stdout
