"""Every command of the README is run.

The set-up commands themselves are run by `.ci/run`, which makes the environment that these tests run in from
the README's second one; here their last steps are checked, and everything else is run in an empty folder.
"""

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from qbench.track.records import RecordStore

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
SETUP = [c for c in COMMANDS if "pip install" in c]
SERVERS = [c for c in COMMANDS if c.startswith("mlflow ui")]
FROM_HUB = [c for c in COMMANDS if "model.id=facebook" in c]
PLAIN = [c for c in COMMANDS if c not in SETUP + SERVERS + FROM_HUB]


def environment() -> dict[str, str]:
    scripts = str(Path(sys.executable).parent)
    return os.environ | {"PATH": scripts + os.pathsep + os.environ["PATH"]}


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, shell=True, cwd=folder, env=environment(), capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


def test_there_are_two_set_up_commands():
    first, second = SETUP
    assert first.endswith(".venv/bin/qbench -m algo=rtn,gptq,awq wbits=4,3,2")
    assert second.endswith(".venv/bin/pytest")
    assert '".[dev]"' in second


def test_the_algorithm_of_the_readme_quantizes(llama, tokens):
    from qbench.engine import quantize
    from qbench.quant.scheme import Scheme

    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (config,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    names: dict = {"__name__": "mine"}
    exec(compile(code, "mine.py", "exec"), names)
    path, strength = (line.split(": ")[1] for line in config.splitlines()[1:3])
    mine = names[path.rpartition(".")[2]](strength=float(strength))
    assert quantize(llama, mine, Scheme.parse("w4a16g16"), tokens).errors[0] > 0


@pytest.mark.slow
def test_the_main_job_gives_the_numbers_that_the_readme_promises(folder):
    """Nine jobs and the baseline; fp < w4 < w3 < w2 for each algorithm; GPTQ and AWQ beat RTN at 3 bits."""
    import pyarrow.parquet as pq
    import torch
    from scipy import stats

    result = run("qbench -m algo=rtn,gptq,awq wbits=4,3,2", folder)
    assert result.returncode == 0, result.stderr
    store = RecordStore(folder / "results")
    nll: dict[tuple[str, int], torch.Tensor] = {}
    for record in store.all():
        samples = pq.read_table(store.path(record["fingerprint"]) / "samples.parquet").to_pylist()
        key = (record["labels"]["algo"], record["labels"]["wbits"])
        nll[key] = torch.tensor([s["value"] for s in samples if s["metric"] == "ppl/stdlib_docs"]).double()
    assert len(nll) == 10
    for algo in ("rtn", "gptq", "awq"):
        means = [nll["fp", 16].mean(), *(nll[algo, bits].mean() for bits in (4, 3, 2))]
        assert means == sorted(means), f"{algo}: fp < w4 < w3 < w2"
    for algo in ("gptq", "awq"):
        test = stats.ttest_rel(nll[algo, 3].numpy(), nll["rtn", 3].numpy(), alternative="less")
        assert test.pvalue < 0.01, f"{algo} against rtn at w3g128"


@pytest.mark.slow
@pytest.mark.parametrize("command", PLAIN)
def test_a_command_of_the_readme_runs(command, folder):
    result = run(command, folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", SERVERS)
def test_mlflow_shows_the_runs(command, folder):
    assert command.endswith("sqlite:///results/mlflow.db")
    assert (folder / "results" / "mlflow.db").exists(), "run the whole file: the grid comes first"
    port = "5077"
    server = subprocess.Popen(
        f"exec {command} --port {port}", shell=True, cwd=folder, start_new_session=True,
        env=environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as page:
                    assert page.status == 200
                    return
            except (urllib.error.URLError, OSError):
                assert time.monotonic() < deadline, "the server did not answer"
                time.sleep(0.5)
    finally:
        os.killpg(server.pid, 15)


@pytest.mark.parametrize("command", FROM_HUB)
def test_a_hub_model_out_of_reach_is_one_clear_line(command, tmp_path):
    """The command itself needs a network; without one it must say so. Its loading is tested on local folders."""
    result = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True,
        env=environment() | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "facebook/opt-125m" in result.stderr
