"""Data and models are brought to machines without a network, whole, and stay what they were."""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qbench.data.corpora import CORPORA, load_text
from qbench.data.library import Library
from qbench.data.provision import MANIFEST, Manifest, Piece, digest, snapshot
from qbench.data.sources import Source
from qbench.errors import UsageError
from qbench.evaluate import harness
from qbench.evaluate.plan import EvalPlan
from qbench.evaluate.stock import Shots
from qbench.zoo import WEIGHTS

from .hub import Hub

NOWHERE = "http://127.0.0.1:9"  # where nobody listens
QBENCH = [sys.executable, "-m", "qbench"]
TEXT = [{"text": f"Row {i} of a made-up text has words about files, numbers and days ."} for i in range(400)]
QUESTIONS = [
    {
        "id": str(i), "question_stem": f"What is {i} and one?", "answerKey": "B",
        "choices": {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]},
    }
    for i in range(6)
]  # fmt: skip
JOB = [
    "model=hf", "model.id=some/model", "scheme=w4a16", "calib=wikitext2", "calib.n_samples=4", "calib.seq_len=32",
    "eval.ppl=[wikitext2]", "eval.tasks=[openbookqa]", "eval.shots={openbookqa: 1}", "eval.limit=4", "eval.seq_len=64",
]  # fmt: skip


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    hub.add_data("Salesforce/wikitext", {"wikitext-2-raw-v1": {"train": TEXT, "test": TEXT[:100]}})
    hub.add_data("allenai/openbookqa", {"main": {"train": QUESTIONS[:3], "test": QUESTIONS}})
    hub.add_folder("some/model", WEIGHTS / "nano-llama")
    hub.repos["models", "some/model"]["consolidated.safetensors"] = b"the same weights for another program"
    return hub


@pytest.fixture(scope="module")
def fetched(hub, tmp_path_factory):
    """A folder and the hub's cache after a fetch, and the hub is gone."""
    place = tmp_path_factory.mktemp("fetched")
    with hub.serving():
        done = run(
            place,
            hub.environment(place / "home"),
            "data",
            "fetch",
            "-m",
            "algo=rtn,gptq",
            "data.root=data",
            *JOB,
        )
    assert done.returncode == 0, done.stderr
    for cache in (place / "home" / "datasets", *(place / "home" / "hub").glob("datasets--*")):
        shutil.rmtree(cache)
    return place


def run(place, environment, *arguments):
    return subprocess.run(
        [*QBENCH, *arguments], cwd=place, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_what_was_fetched_is_all_that_its_jobs_need(hub, fetched):
    environment = hub.environment(fetched / "home", offline=True)
    done = run(fetched, environment, "algo=gptq", "data.root=data", "tracker=none", *JOB)
    assert done.returncode == 0, done.stderr
    record = json.loads(next(fetched.glob("results/records/*/record.json")).read_text())
    origins = {key: about["origin"] for key, about in record["data"].items() if key.startswith("eval/")}
    folder = "allenai/openbookqa/main"
    assert origins == {
        "eval/wikitext2": "file Salesforce/wikitext/wikitext-2-raw-v1/test.parquet",
        "eval/openbookqa": f"file {folder}/test.parquet, file {folder}/train.parquet",
    }


@pytest.mark.slow
def test_the_fetched_rows_are_those_of_the_hub(hub, fetched):
    library = Library(fetched / "data")
    for hub_id, config, split, rows in (
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", TEXT), ("allenai/openbookqa", "main", "test", QUESTIONS),
    ):  # fmt: skip
        assert list(library.rows(Source(hub_id, config), split).data) == rows
    manifest = Manifest.of(fetched / "data")
    assert {about["revision"] for about in manifest.data.values()} == {
        hub.commit("datasets", name) for name in ("Salesforce/wikitext", "allenai/openbookqa")
    }
    (model,) = manifest.models.values()
    assert model["commit"] == hub.commit("models", "some/model")
    assert set(model["files"]) == set(hub.repos["models", "some/model"]) - {"consolidated.safetensors"}


@pytest.mark.slow
def test_a_fetch_that_is_repeated_brings_what_is_lacking_alone(hub, fetched, tmp_path):
    place = tmp_path / "again"
    shutil.copytree(fetched, place, symlinks=True)
    gone = place / "data" / "allenai" / "openbookqa" / "main" / "train.parquet"
    before = digest(gone)
    gone.rename(gone.with_name("train.parquet.part"))  # as a kill leaves it
    hub.asked.clear()
    with hub.serving():
        environment = hub.environment(place / "home")
        done = run(place, environment, "data", "fetch", "algo=gptq", "data.root=data", *JOB)
    assert done.returncode == 0, done.stderr
    got = [request for request in hub.asked if request.startswith("GET") and "/resolve/" in request]
    assert not [request for request in got if "wikitext" in request or ".safetensors" in request]
    assert [request for request in got if "openbookqa" in request]
    assert digest(gone)["bytes"] == before["bytes"]
    verified = run(place, environment, "data", "verify", "data.root=data")
    assert verified.returncode == 0
    assert "files of " in verified.stdout
    assert "are as they were fetched" in verified.stdout


@pytest.mark.slow
def test_a_fetch_that_was_killed_goes_on(hub, tmp_path):
    arguments = [*QBENCH, "data", "fetch", "algo=gptq", "data.root=data", *JOB]
    with hub.serving():
        environment = hub.environment(tmp_path / "home")
        hub.asked.clear()
        hub.stalling = "/datasets/allenai/openbookqa"
        killed = subprocess.Popen(arguments, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not any(hub.stalling in request for request in hub.asked):
            assert time.monotonic() < deadline, "the second data set was not asked for"
            time.sleep(0.05)
        killed.kill()
        killed.wait()
        hub.stalling = ""
        (first,) = Manifest.of(tmp_path / "data").data
        written = (tmp_path / "data" / first).stat().st_mtime_ns
        done = run(tmp_path, environment, *arguments[len(QBENCH) :])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / first).stat().st_mtime_ns == written
    assert len(Manifest.of(tmp_path / "data").data) == 4
    assert not [*(tmp_path / "data").rglob("*.part")]


@pytest.mark.slow
@pytest.mark.parametrize("failing", [None, 500], ids=["out of reach", "out of order"])
def test_a_fetch_names_each_thing_that_could_not_be_had(failing, tmp_path):
    began = time.monotonic()
    with Hub(failing=failing).serving() as hub:
        environment = hub.environment(tmp_path / "home")
        environment |= {} if failing else {"HF_ENDPOINT": NOWHERE}
        done = run(tmp_path, environment, "data", "fetch", "data.root=data", "algo=gptq", *JOB)
    assert done.returncode == 3
    lines = done.stderr.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("qbench: ") and "could not be had: " in line for line in lines[:5])
    for what in (
        "Salesforce/wikitext (wikitext-2-raw-v1), split train",
        "allenai/openbookqa",
        "model some/model",
    ):
        assert what in done.stderr
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_job_whose_corpus_is_out_of_reach_ends_soon_with_one_line(tmp_path):
    environment = Hub(endpoint=NOWHERE).environment(tmp_path / "home")
    began = time.monotonic()
    done = run(tmp_path, environment, "algo=rtn", "eval.ppl=[wikitext2]")
    assert time.monotonic() - began < 20
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("qbench: wikitext2: split 'test' of Salesforce/wikitext")
    assert f"{NOWHERE} cannot be reached" in line


@pytest.mark.slow
@pytest.mark.parametrize("lacking", ["model.safetensors", "config.json"])
def test_a_model_that_qbench_could_not_load_is_not_had(lacking, hub, tmp_path):
    model = hub.repos["models", "some/model"]
    other = Hub({("models", "some/model"): {path: c for path, c in model.items() if path != lacking}})
    with other.serving():
        arguments = ("data.root=data", "model=hf", "model.id=some/model")
        done = run(tmp_path, other.environment(tmp_path / "home"), "data", "fetch", *arguments)
    assert done.returncode == 3
    assert f"model some/model could not be had: it lacks {lacking}" in done.stderr


def kept(root: Path) -> Manifest:
    """A manifest of one file."""
    path = root / "some" / "set" / "default" / "test.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"rows of a split")
    manifest = Manifest(root, {"some/set/default/test.parquet": digest(path)})
    manifest.save()
    return manifest


@pytest.mark.parametrize("content", [b"rows of a spliT", b"rows", None], ids=["changed", "cut off", "gone"])
def test_a_file_that_is_not_as_it_was_fetched_is_named(content, qbench, tmp_path, capsys):
    ((path, _),) = kept(tmp_path / "data").files()
    assert qbench("data", "verify", f"data.root={tmp_path / 'data'}") == 0
    assert capsys.readouterr().out == "1 files of 0.0 kB are as they were fetched\n"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert qbench("data", "verify", f"data.root={tmp_path / 'data'}") == 3
    assert f"{'missing' if content is None else 'changed'}: {path}" in capsys.readouterr().err


def test_models_are_verified_where_the_hubs_cache_is(qbench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = snapshot("some/model", "abc")
    assert folder.is_relative_to(tmp_path / "cache")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    files = {"config.json": digest(folder / "config.json")}
    about = {"id": "some/model", "revision": None, "commit": "abc", "files": files}
    Manifest(tmp_path, {}, {"some/model@": about}).save()
    assert qbench("data", "verify", f"data.root={tmp_path}") == 0
    (folder / "config.json").write_text("[]")
    assert qbench("data", "verify", f"data.root={tmp_path}") == 3
    assert "config.json" in capsys.readouterr().err


def test_a_manifest_is_what_was_saved(tmp_path):
    manifest = kept(tmp_path)
    assert Manifest.of(tmp_path) == manifest
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(UsageError, match=r"qbench-data.json cannot be read \(JSONDecodeError.*; delete it"):
        Manifest.of(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "data.root=."], "run `qbench data fetch data.root=. …` first"),
        (["verify"], "data.root is not set"),
        (["fetch"], "data.root is not set"),
        (["fetch", "data.root=.", "algo=rtn,gptq"], "algo has 2 values; write -m for a grid"),
        (["fetch", "-m", "data.root=a,b", "eval.ppl=[ptb]"], "data.root is one for a whole fetch"),
        (["fetch", "data.root=/dev/null/a"], "data.root=/dev/null/a cannot be written (Not a directory)"),
        (["fetch", "data.root=.", "calib=nowhere"], "nowhere"),
        (["fetch", "data.root=.", "--force"], "knows no option --force"),
        (["show"], "followed by list, fetch, verify; got show"),
        ([], "got nothing"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, message, qbench, capsys):
    assert qbench("data", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_jobs_on_embedded_data_need_nothing(qbench, tmp_path, capsys):
    assert qbench("data", "fetch", "-m", "algo=rtn,gptq", "data.root=data") == 0
    assert "0 of 0 are there" in capsys.readouterr().err
    assert json.loads((tmp_path / "data" / MANIFEST).read_text()) == {"data": {}, "models": {}}


def test_the_users_own_files_are_not_fetched(qbench, tmp_path, capsys):
    place = tmp_path / "data" / "mine.jsonl"
    place.parent.mkdir()
    place.write_text('{"text": "some words"}\n')
    arguments = ("data.root=data", "algo=rtn", "eval.ppl=[wikitext2]", "eval.tasks=[]")
    assert qbench("data", "fetch", *arguments, "data.files={wikitext2/test: mine.jsonl}") == 0
    assert "is there (file mine.jsonl)" in capsys.readouterr().err


def test_the_list_names_every_corpus_and_asks_no_hub(qbench, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    folder = tmp_path / "data" / "gsm8k"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("{}\n")
    assert qbench("data", "list", f"data.root={tmp_path / 'data'}") == 0
    out = capsys.readouterr().out
    names = {line.split()[0] for line in out.splitlines() if line[:1].strip()}
    assert {*CORPORA, "stdlib_docs", "stdlib_cloze", "mt_bench", "ceval-valid"} <= names
    assert "file gsm8k/test.jsonl" in out
    assert "missing: gsm8k" not in out


@pytest.fixture
def read(monkeypatch):
    """Every split that is asked for."""
    asked = dict[tuple[Source, str], None]()

    def note(self, source, split, name=None):
        asked[source, split] = None
        raise FileNotFoundError("noted")

    monkeypatch.setattr(Library, "rows", note)
    load_text.cache_clear()
    return asked


@pytest.mark.parametrize(
    "name", ["mmlu", "ceval-valid", "openbookqa", "mbpp", "boss_sa_sst5", "stdlib_cloze"]
)
@pytest.mark.parametrize("shots", [(), 3])
def test_a_plan_lists_what_its_tasks_read(name, shots, read):
    by_task = Shots(((name, shots),) if shots else ())
    harness.missing(name, Library(), by_task)
    assert {(source, split) for source, split, _ in EvalPlan(tasks=(name,), shots=by_task).needed()} == {
        *read
    }


@pytest.mark.parametrize("name", CORPORA)
def test_a_plan_lists_what_its_texts_read(name, read):
    for use in CORPORA[name].splits:
        read.clear()
        with pytest.raises(FileNotFoundError, match="noted"):
            load_text(name, use, Library())
        assert [(s, split) for s, split, _ in EvalPlan(ppl=(name,), split=use).needed()] == [*read]


def test_a_grid_needs_what_any_of_its_cells_does(qbench, capsys):
    """Cells that cannot be are not among them, nor calibration text where an algorithm reads none."""
    models = "model.id=a/b,c/d model.revision=v1"
    grid = "algo=gptq,rtn wbits=4,16 abits=16 calib=c4 eval.ppl=[ptb] eval.split=calibration,test"
    assert qbench("data", "fetch", "-m", "data.root=data", "model=hf", *models.split(), *grid.split()) == 3
    lines = capsys.readouterr().err.splitlines()
    found = {line.partition(": ")[2].partition(": ")[2].partition(" could not")[0] for line in lines[:-1]}
    assert found == {
        "data set ptb-text-only/ptb_text_only, split train", "data set ptb-text-only/ptb_text_only, split test",
        "data set allenai/c4 (en), split train", "model a/b (v1)", "model c/d (v1)",
    }  # fmt: skip


def test_a_mixture_needs_all_its_texts(qbench, capsys):
    mixture = ["calib=mix", "calib.mix={wikitext2: 1, pileval: 2, random: 1, stdlib_docs: 1}"]
    assert qbench("data", "fetch", "data.root=data", "algo=gptq", *mixture) == 3
    err = capsys.readouterr().err
    assert "1 of 2: data set Salesforce/wikitext (wikitext-2-raw-v1), split train could not be had: " in err
    assert "2 of 2: data set mit-han-lab/pile-val-backup, split validation could not be had: " in err
    assert "HF_HUB_OFFLINE is set" in err


def test_tasks_that_may_be_left_out_are_fetched_too(qbench, capsys):
    arguments = ("data.root=data", "eval.tasks=[piqa, stdlib_copy]", "eval.skip_missing=true")
    assert qbench("data", "fetch", *arguments) == 3
    assert "1 of 1: data set baber/piqa, split validation could not be had" in capsys.readouterr().err


def test_a_fetched_configuration_is_read_whole_though_its_rows_do_not_name_it(tmp_path):
    from datasets import Dataset

    piece = Piece(Source("haonan-li/cmmlu", "anatomy"), "dev")
    rows = [{"Question": "where?", "Answer": "A"}, {"Question": "who?", "Answer": "B"}]
    (tmp_path / piece.path).parent.mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(tmp_path / piece.path)
    library = Library(tmp_path)
    assert library.under_root(piece.source, piece.split) == f"file {piece.path}"
    assert list(library.rows(piece.source, piece.split).data) == rows


def test_a_copy_of_the_hubs_repository_is_left_as_it_is(hub, tmp_path):
    """Its files have the hub's names, and its card says which is which."""
    for path, content in hub.repos["datasets", "Salesforce/wikitext"].items():
        place = tmp_path / "Salesforce" / "wikitext" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    source, manifest = CORPORA["wikitext2"].source, Manifest(tmp_path)
    assert Piece(source, "test").fetch(Library(tmp_path), manifest) == "is there (folder Salesforce/wikitext)"
    assert not manifest.data
    assert not Library(tmp_path).under_root(source, "validation")


def test_what_is_in_the_hubs_cache_alone_is_still_written_into_the_folder(hub, tmp_path):
    """Other machines see the folder, not the cache."""
    code = """
from pathlib import Path
from qbench.data.corpora import CORPORA
from qbench.data.library import Library
from qbench.data.provision import Manifest, Piece
library, source = Library(Path("data")), CORPORA["wikitext2"].source
print(library.on_machine(source, "test") or "nowhere")
{}
"""
    look, fetch = (
        "library.rows(source, 'test')",
        "print(Piece(source, 'test').fetch(library, Manifest(Path('data'))))",
    )
    said = []
    with hub.serving():
        for line, offline in ((look, False), (fetch, True), ("", True)):
            done = subprocess.run(
                [sys.executable, "-c", code.format(line)], cwd=tmp_path, capture_output=True, text=True, check=True,
                env=hub.environment(tmp_path / "home", offline=offline),
            )  # fmt: skip
            said += done.stdout.splitlines()
    path = Piece(CORPORA["wikitext2"].source, "test").path
    assert said[:2] == ["nowhere", "hub cache Salesforce/wikitext"]
    assert said[2].startswith("100 rows, ")
    assert said[3] == f"file {path}"
