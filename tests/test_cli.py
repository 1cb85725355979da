"""The command, as a user types it; most tests call it in this process, with the smallest model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qbench.models.load import ModelRef
from qbench.track.records import RecordStore

SMALL = ["model=nano-llama", "eval.max_windows=4", "eval.tasks=[]", "calib.n_samples=4", "calib.seq_len=64",
         "launcher=inline"]  # fmt: skip
QUIET = [*SMALL, "tracker=none"]


def records() -> list[dict]:
    return list(RecordStore(Path("results")).all())


def test_one_job_leaves_one_record_and_shows_a_table(qbench, capfd):
    assert qbench("algo=gptq", "wbits=3", *QUIET) == 0
    (record,) = records()
    assert (
        record["labels"] | {"algo": "gptq", "scheme": "w3a16g128", "calib": "stdlib_docs"} == record["labels"]
    )
    wanted = {"ppl/stdlib_docs", "ppl/stdlib_docs_stderr", "calib_time_s", "eval_time_s", "peak_mem_calib_mb",
              "peak_mem_eval_mb", "bits_per_weight", "block_error_mean"}  # fmt: skip
    assert wanted <= record["metrics"].keys()
    assert len(record["block_errors"]) == 4
    assert len(record["data"]["calib/stdlib_docs"]["sha256"]) == 64
    assert record["environment"]["command"].startswith("qbench algo=gptq wbits=3 model=nano-llama")
    assert {"torch", "transformers", "qbench"} <= record["environment"]["versions"].keys()
    out = capfd.readouterr().out
    assert "w3a16g128" in out
    assert "results/records" in out
    assert "qbench tables" in out


def test_a_grid_runs_every_cell_and_the_baseline_once(qbench, capfd):
    assert qbench("-m", "algo=rtn,gptq", "wbits=4,3", *QUIET) == 0
    cells = [(r["labels"]["algo"], r["labels"]["wbits"]) for r in records()]
    assert cells == [("fp", 16), ("rtn", 4), ("rtn", 3), ("gptq", 4), ("gptq", 3)]
    assert "5 run, 0 already done" in capfd.readouterr().out


def test_the_same_command_again_does_nothing_and_says_so(qbench, capfd):
    command = ("-m", "algo=rtn", "wbits=4,3", *QUIET)
    qbench(*command)
    before = {p: p.stat().st_mtime_ns for p in Path("results/records").rglob("*.json")}
    assert qbench(*command) == 0
    captured = capfd.readouterr()
    assert "0 run, 3 already done" in captured.out
    assert "3 of 3 jobs are recorded already" in captured.err
    assert before == {p: p.stat().st_mtime_ns for p in Path("results/records").rglob("*.json")}


def test_force_runs_again(qbench):
    qbench("algo=rtn", *QUIET)
    (first,) = records()
    qbench("algo=rtn", "force=true", *QUIET)
    (second,) = records()
    assert second["started"] > first["started"]
    assert second["metrics"]["ppl/stdlib_docs"] == first["metrics"]["ppl/stdlib_docs"]


def test_no_baseline_where_none_is_wanted(qbench):
    qbench("-m", "algo=rtn", "wbits=4", "baseline=false", *QUIET)
    assert [r["labels"]["algo"] for r in records()] == ["rtn"]


BAD = {
    "unknown algorithm": (["algo=gtpq"], "unknown algo 'gtpq'; did you mean gptq?"),
    "unknown model": (["model=micro-lama"], "did you mean micro-llama"),
    "unknown scheme": (["scheme=w4a16g12"], "did you mean w4a16g128"),
    "misspelt key": (["wbit=4"], "unknown key 'wbit'; did you mean wbits"),
    "misspelt inner key": (["calib.n_sample=4"], "did you mean calib.n_samples"),
    "misspelt hyperparameter": (["algo=gptq", "algo.dampp=1"], "did you mean algo.damp"),
    "added hyperparameter": (["algo=gptq", "+algo.nonsense=1"], "unexpected keyword argument 'nonsense'"),
    "bits out of range": (["wbits=9"], "integer grids have 1 to 8 bits, 9 were asked for"),
    "bits that are no number": (["wbits=four"], "wbits='four': input should be a valid integer"),
    "group size": (["group_size=100"], "group_size=100 does not divide the 128 inputs of self_attn.q_proj"),
    "calibration too small": (["algo=gptq", "calib.n_samples=1000000"], "lower calib.n_samples"),
    "no calibration": (["algo=gptq", "calib.n_samples=0"], "calib.n_samples is 0, it must be at least 1"),
    "missing folder": (["model=hf", "model.id=./nowhere"], "model folder 'nowhere' does not exist"),
    "no model id": (["model=hf"], ": model.id has no value"),
    "smoothquant without activations": (["algo=smoothquant"], "SmoothQuant needs activation bits"),
    "gptq without weights": (["algo=gptq", "wbits=16", "abits=8"], "GPTQ works on weights"),
    "group size zero": (["group_size=0"], "group_size is 0, it must be positive"),
    "hyperparameter of the wrong type": (["algo=gptq", "algo.damp=much"], "value of the wrong type"),
    "unknown attention": (["model.attn=fast"], "model.attn='fast': input should be"),
    "KV without sdpa": (["kvbits=4", "model.attn=eager"], "quantization inside attention needs model.attn=sdpa"),
    "unknown device": (["device=gpu"], "not a device of torch"),
    "two results folders": (["-m", "results=a,b"], "one for a whole sweep"),
    "an empty grid": (["-m", "seed=range(0)"], "the grid is empty"),
    "nothing to quantize": (["wbits=16"], "has nothing to quantize"),
    "hyperparameter out of range": (["algo=gptq", "algo.damp=0"], "damp is 0"),
    "unknown corpus": (["eval.ppl=[wikitext3]"], "eval.ppl is 'wikitext3', which is not known; did you mean wikitext2"),
    "no device": (["device=cuda"], "sees 0 CUDA devices"),
    "a window longer than the model reads": (["eval.seq_len=4096"], "reads at most 512 tokens"),
    "a sweep without -m": (["algo=rtn,gptq"], "-m"),
    "a study without -m": (["+sweep=quickstart"], "qbench -m +sweep=quickstart"),
    "unknown study": (["-m", "+sweep=quickstar"], "did you mean quickstart"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_exit_code_2(case, qbench, capfd, monkeypatch):
    if case == "no device" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    loaded = []
    monkeypatch.setattr(ModelRef, "load", lambda self: loaded.append(self))
    arguments, message = BAD[case]
    small = [a for a in QUIET if a.partition("=")[0] not in {b.partition("=")[0] for b in arguments}]
    assert qbench(*small, *arguments) == 2
    captured = capfd.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("qbench: ")
    assert message in lines[0]
    assert not captured.out
    assert not loaded


def test_in_a_sweep_a_bad_cell_is_reported_and_the_others_run(qbench, capfd):
    assert qbench("-m", "algo=rtn,gtpq", "wbits=4,3", *QUIET) == 2
    assert [r["labels"]["algo"] for r in records()] == ["fp", "rtn", "rtn"]
    captured = capfd.readouterr()
    assert "skipped algo=gtpq wbits=4 and 1 more: unknown algo 'gtpq'" in captured.err
    assert "3 run, 0 already done, 2 skipped" in captured.out


def test_a_sweep_leaves_out_what_does_not_go_together_and_says_how_much_and_why(qbench, capfd):
    assert qbench("-m", "algo=rtn,smoothquant", "wbits=4,3,9", *QUIET) == 0
    assert [r["labels"]["algo"] for r in records()] == ["fp", "rtn", "rtn"]
    captured = capfd.readouterr()
    assert "pruned 2 of 6 cells: SmoothQuant needs activation bits" in captured.err
    assert "pruned 2 of 6 cells: integer grids have 1 to 8 bits, 9 were asked for" in captured.err
    assert "3 run, 0 already done, 4 pruned" in captured.out


def test_a_grid_of_which_nothing_is_left_is_bad_input(qbench, capfd):
    assert qbench("-m", "algo=smoothquant", "wbits=4,3", *QUIET) == 2
    assert "nothing is left of the grid: SmoothQuant needs activation bits" in capfd.readouterr().err


def test_a_hyperparameter_of_one_algorithm_concerns_its_cells_alone(qbench, capfd):
    assert qbench("-m", "algo=rtn,gptq", "algo.damp=0.05", "wbits=4", *QUIET) == 2
    assert [r["labels"]["algo"] for r in records()] == ["fp", "gptq"]
    assert records()[1]["identity"]["algorithm"]["damp"] == 0.05
    assert "skipped algo=rtn: unknown key 'algo.damp'; the chosen algo has no damp" in capfd.readouterr().err


def test_a_metric_that_is_not_finite_fails_the_job_and_not_the_sweep(qbench, monkeypatch):
    monkeypatch.setattr("qbench.measure.size_metrics", lambda *_: {"bits_per_weight": float("nan")})
    assert qbench("algo=rtn", *QUIET) == 3
    assert records()[0]["reason"] == "FloatingPointError: not finite: bits_per_weight"


def test_jobs_of_one_model_follow_one_another(qbench, monkeypatch):
    loads = []
    load = ModelRef.load
    monkeypatch.setattr(ModelRef, "load", lambda self: loads.append(self.name) or load(self))
    small = [a for a in QUIET if not a.startswith("model=")]
    assert qbench("-m", "algo=rtn", "wbits=4,3", "model=nano-llama,micro-opt", *small) == 0
    assert loads == ["nano-llama", "micro-opt"]


def test_a_model_in_half_precision_runs_through_every_algorithm(qbench):
    assert qbench("-m", "algo=rtn,gptq,awq", "wbits=4", "model.dtype=bfloat16", *QUIET) == 0
    assert {r["status"] for r in records()} == {"done"}
    assert qbench("algo=smoothquant", "scheme=w8a8", "model.dtype=bfloat16", *QUIET) == 0


def test_a_job_that_fails_leaves_a_record_with_its_reason_and_the_sweep_goes_on(qbench, capfd, monkeypatch):
    from qbench.algorithms.gptq import GPTQ

    def fail(self, block):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(GPTQ, "process", fail)
    assert qbench("-m", "algo=gptq,rtn", "wbits=4", *QUIET) == 3
    status = {r["labels"]["algo"]: r for r in records()}
    assert status["gptq"]["reason"] == "RuntimeError: out of luck"
    assert "process" in status["gptq"]["traceback"]
    assert status["rtn"]["status"] == "done"
    assert "failed: RuntimeError: out of luck" in capfd.readouterr().out
    monkeypatch.undo()


def test_a_failed_job_is_run_again_by_the_same_command(qbench, monkeypatch):
    from qbench.algorithms.rtn import RTN

    with monkeypatch.context() as patch:
        patch.setattr(RTN, "process", lambda self, block: 1 / 0)
        assert qbench("algo=rtn", *QUIET) == 3
    assert qbench("algo=rtn", *QUIET) == 0
    assert [r["status"] for r in records()] == ["done"]


def test_tables_are_written_from_the_records(qbench, capfd):
    qbench("-m", "algo=rtn", "wbits=4,2", *QUIET)
    assert qbench("tables") == 0
    assert "w2a16g128" in capfd.readouterr().out
    names = {p.name for p in Path("results/tables").iterdir()}
    assert {"summary.csv", "summary.md", "summary.tex", "ppl-stdlib_docs.md"} <= names


def test_tables_without_records_say_what_to_do(qbench, capfd):
    assert qbench("tables") == 2
    assert "no records under" in capfd.readouterr().err


def test_sync_restores_what_mlflow_lost(qbench):
    from mlflow.tracking import MlflowClient

    def runs(name="mlflow"):
        client = MlflowClient(tracking_uri=f"sqlite:///{Path.cwd()}/results/{name}.db")
        experiment = client.get_experiment_by_name("qbench")
        found = client.search_runs([experiment.experiment_id])
        return sorted((r.info.run_name, r.info.status, sorted(r.data.metrics.items())) for r in found)

    assert qbench("-m", "algo=rtn,gptq", "wbits=4", *SMALL) == 0
    before = runs()
    assert len(before) == 4
    assert {status for _, status, _ in before} == {"FINISHED"}
    # In processes of their own: this one has the lost database open.
    Path("results/mlflow.db").rename("results/lost.db")
    for _ in range(2):
        subprocess.run([sys.executable, "-m", "qbench", "sync"], check=True)
    Path("results/mlflow.db").rename("results/restored.db")
    assert runs("restored") == before


def test_what_ran_without_mlflow_is_mirrored_by_the_same_command_with_it(qbench):
    from mlflow.tracking import MlflowClient

    qbench("-m", "algo=rtn", "wbits=4", *QUIET)
    qbench("-m", "algo=rtn", "wbits=4", *SMALL)
    client = MlflowClient(tracking_uri=f"sqlite:///{Path.cwd()}/results/mlflow.db")
    assert len(client.search_runs([client.get_experiment_by_name("qbench").experiment_id])) == 3


def test_a_failure_that_was_never_mirrored_does_not_replace_the_run_that_mended_it(qbench, monkeypatch):
    from mlflow.tracking import MlflowClient

    from qbench.algorithms.rtn import RTN

    with monkeypatch.context() as patch:
        patch.setattr(RTN, "process", lambda self, block: 1 / 0)
        assert qbench("algo=rtn", *QUIET) == 3
    assert qbench("algo=rtn", *SMALL) == 0
    client = MlflowClient(tracking_uri=f"sqlite:///{Path.cwd()}/results/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("qbench").experiment_id])
    assert [r.info.status for r in runs] == ["FINISHED"]


def test_a_sweep_goes_on_without_mlflow(qbench, capfd):
    Path("file").touch()
    assert qbench("algo=rtn", *SMALL, "tracker.uri=sqlite:///file/mlflow.db") == 0
    assert len(records()) == 1
    assert "`qbench sync` mirrors later" in capfd.readouterr().err


def test_tracker_none_needs_no_mlflow(qbench, monkeypatch):
    for name in [n for n in sys.modules if n == "mlflow" or n.startswith("mlflow.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert qbench("algo=rtn", *QUIET) == 0


def test_a_hub_layout_folder_gives_the_same_numbers_as_the_embedded_model(qbench, tmp_path):
    """The sharded folder that `save_pretrained` writes, as a hub model is stored."""
    ref = ModelRef("zoo/nano-llama")
    folder = tmp_path / "some-model"
    ref.load().save_pretrained(folder, max_shard_size="1MB")
    ref.tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    qbench("algo=gptq", "wbits=3", *QUIET)
    assert qbench("algo=gptq", "wbits=3", *QUIET, "model=hf", f"model.id={folder}") == 0
    first, second = (r["metrics"]["ppl/stdlib_docs"] for r in records())
    assert first == second


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_incomplete_model_folder_is_refused(missing, qbench, tmp_path, capfd):
    folder = tmp_path / "some-model"
    ref = ModelRef("zoo/nano-llama")
    ref.load().save_pretrained(folder)
    (folder / missing).unlink()
    assert qbench("algo=rtn", *QUIET, "model=hf", f"model.id={folder}") == 2
    assert "needs config.json and *.safetensors" in capfd.readouterr().err


def test_wikitext2_comes_from_data_root(qbench, shared_data):
    small = ["model=nano-llama", "tracker=none", "eval.seq_len=512", "eval.max_windows=8"]
    assert qbench("algo=rtn", "eval=wikitext2", f"data.root={shared_data}", *small) == 0
    (record,) = records()
    # Worse than on its own kind of text, and far better than the uniform distribution over 3072 tokens.
    assert 30 < record["metrics"]["ppl/wikitext2"] < 3000
    assert record["data"]["eval/wikitext2"]["origin"] == "file wikitext2/wikitext-2-raw-v1_test.jsonl"


@pytest.mark.slow
def test_killing_the_sweep_loses_at_most_the_running_job(tmp_path):
    command = [sys.executable, "-m", "qbench", "-m", "algo=rtn,gptq,awq", "wbits=4,3", *QUIET]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    store = RecordStore(tmp_path / "results")

    def done() -> dict[str, str]:
        return {r["fingerprint"]: r["started"] for r in store.all()} if store.records.is_dir() else {}

    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(done()) < 2:
        assert process.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = done()
    assert 2 <= len(before) < 7
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    after = done()
    assert len(after) == 7
    assert before.items() <= after.items(), "a job that was done has run again"
    assert f"{7 - len(before)} run, {len(before)} already done" in result.stdout
    for path in store.records.glob("[!.]*"):
        assert json.loads((path / "record.json").read_text())["status"] == "done"
        assert (path / "samples.parquet").is_file()


def test_help_names_the_choices_and_the_first_commands():
    result = subprocess.run(
        [sys.executable, "-m", "qbench", "--help"], capture_output=True, text=True, check=True
    )
    for text in ("gptq", "micro-llama", "qbench -m algo=rtn,gptq,awq wbits=4,3,2", "w4a16g128"):
        assert text in result.stdout
