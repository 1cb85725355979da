"""Evaluations as a user asks for them: families of tasks, dialogue, code, what is missing."""

import json
from functools import partial
from pathlib import Path

import pytest

from qbench.data.corpora import CORPORA
from qbench.evaluate.judge import Judge
from qbench.sweep.shipped import CONF
from qbench.track.records import RecordStore

from .judge_server import JudgeServer
from .test_data import write_lines

NANO = ("model=nano-llama", "tracker=none", "launcher=inline", "algo=rtn", "wbits=3")


def record(results: str = "results") -> dict:
    return list(RecordStore(Path(results)).all())[-1]


def samples() -> list[dict]:
    return RecordStore(Path("results")).samples(record()["fingerprint"])


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(
    "family",
    [
        "basic",
        "long",
        pytest.param("trust", marks=pytest.mark.slow),
        pytest.param("emergent", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("offline")
def test_a_family_gives_numbers_with_errors_and_samples_for_all_whose_data_are_there(
    family, qbench, shared_data, capfd
):
    import yaml

    asked = set(yaml.safe_load((CONF / "eval" / f"{family}.yaml").read_text())["tasks"])
    arguments = (*NANO, f"eval={family}", f"data.root={shared_data}", "eval.limit=4")
    if family in ("basic", "trust"):
        assert qbench(*arguments) == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert "lack data" in line
        assert "eval.skip_missing=true" in line
    assert qbench(*arguments, "eval.skip_missing=true") == 0
    done, err = record(), capfd.readouterr().err
    missing = set(done["left_out"])
    assert all(f"left out {task}: split " in err for task in missing)
    by_task: dict[str, set[str]] = {}
    for sample in samples():
        by_task.setdefault(sample["metric"].partition("/")[2], set()).add(sample["metric"])
    assert set(by_task) == asked - missing
    assert len(by_task) >= 4
    for metric in set().union(*by_task.values()):
        assert done["metrics"][f"{metric}_stderr"] >= 0
    assert {f"eval/{task}" for task in by_task} == set(done["data"])


@pytest.mark.usefixtures("offline")
def test_what_is_missing_later_does_not_pass_for_done(qbench, tmp_path):
    rows = [{"question": f"q{i}", "passage": "p", "idx": i, "label": i % 2} for i in range(6)]
    write_lines(tmp_path / "data" / "boolq" / "validation.jsonl", rows)
    arguments = (
        *NANO,
        "eval.ppl=[]",
        "eval.tasks=[boolq,sciq]",
        f"data.root={tmp_path}/data",
        "eval.skip_missing=true",
    )
    assert qbench(*arguments) == 0
    assert set(record()["left_out"]) == {"sciq"}
    sciq = {
        "question": "q",
        "correct_answer": "a",
        "distractor1": "b",
        "distractor2": "c",
        "distractor3": "d",
        "support": "s",
    }
    write_lines(tmp_path / "data" / "sciq" / "test.jsonl", [sciq] * 3)
    from qbench.data import library
    from qbench.evaluate import harness, stock

    for cached in (library._rows, harness.tasks_of, stock.build):  # as in another process
        cached.cache_clear()
    assert qbench(*arguments) == 0
    assert record()["left_out"] == {}
    assert "acc/sciq" in record()["metrics"]


def test_tasks_that_run_code_need_consent(qbench, tmp_path, capfd):
    rows = [
        {
            "task_id": "a",
            "prompt": "def f():",
            "entry_point": "f",
            "canonical_solution": " pass",
            "test": "def check(f): f()",
        }
    ] * 2
    write_lines(tmp_path / "data" / "humaneval" / "test.jsonl", rows)
    arguments = (*NANO, "eval.ppl=[]", "eval.tasks=[humaneval]", f"data.root={tmp_path}/data")
    assert qbench(*arguments) == 2
    assert "allow it with eval.allow_code_execution=true" in capfd.readouterr().err


QUESTIONS = [
    {"question_id": i, "category": c, "turns": [f"What is {i}?", "Why?"]}
    for i, c in enumerate(("maths", "prose"))
]


@pytest.fixture
def bench(tmp_path):
    write_lines(tmp_path / "data" / "mt_bench" / "question.jsonl", QUESTIONS)
    return (
        *NANO, "eval.ppl=[]", "eval.tasks=[]", "eval.dialogue=[mt_bench]", "eval.max_new_tokens=8",
        f"data.root={tmp_path}/data",
    )  # fmt: skip


def test_dialogue_without_a_judge_keeps_answers_and_gives_no_mark(qbench, bench, capfd):
    assert qbench(*bench) == 2
    assert "eval.plain_dialogue=true" in capfd.readouterr().err
    assert qbench(*bench, "eval.plain_dialogue=true") == 0
    assert not [m for m in record()["metrics"] if m.startswith("judge")]
    (kept,) = Path("results/dialogue").rglob("mt_bench.jsonl")
    assert len(kept.read_text().splitlines()) == 2


def test_dialogue_is_marked_by_a_judge_and_marks_are_kept(qbench, bench, monkeypatch):
    monkeypatch.setenv("QBENCH_JUDGE_KEY", "secret-of-the-judge")
    with JudgeServer() as server:
        judged = (
            *bench,
            "eval.plain_dialogue=true",
            f"judge.base_url={server.base_url}",
            "judge.model=some-judge",
        )
        assert qbench(*judged) == 0
        marks = {s["item"]: s["value"] for s in samples() if s["metric"] == "judge/mt_bench"}
        assert set(marks) == {0, 1}
        assert record()["metrics"]["judge/mt_bench"] == pytest.approx(sum(marks.values()) / 2)
        asked = len(server.requests)
        assert asked == 4
        assert qbench(*judged, "force=true") == 0
        assert len(server.requests) == asked
    everything = b"".join(p.read_bytes() for p in Path().rglob("*") if p.is_file())
    assert b"secret-of-the-judge" not in everything
    assert record()["identity"]["evaluation"]["talk"]["judge"] == "some-judge"


def test_shots_limits_and_strides_are_other_jobs_and_other_columns(qbench, tmp_path):
    rows = [{"question": f"q{i}", "passage": "p", "idx": i, "label": i % 2} for i in range(8)]
    for split in ("validation", "train"):
        write_lines(tmp_path / "data" / "boolq" / f"{split}.jsonl", rows)
    base = (
        *NANO,
        "eval.ppl=[stdlib_docs]",
        "eval.tasks=[boolq]",
        "eval.seq_len=64",
        "eval.max_windows=3",
        f"data.root={tmp_path}/data",
    )
    for more in ((), ("eval.shots={boolq: 2}",), ("eval.stride=32",), ("eval.limit=4",)):
        assert qbench(*base, *more) == 0
    assert len(list(RecordStore(Path("results")).all())) == 4
    assert qbench("tables") == 0
    header = Path("results/tables/summary.csv").read_text().splitlines()[0]
    for column in (
        "ppl/stdlib_docs [64 x 3]",
        "ppl/stdlib_docs [64 x 3 stride 32]",
        '"acc/boolq [limit 64, 2 shots]"',
        "acc/boolq [limit 4]",
    ):
        assert column in header


def test_decoding_through_the_cache_is_measured_and_text_of_ones_own_too(qbench, tmp_path):
    (tmp_path / "mine.txt").write_text("Some words about files and numbers. " * 60)
    base = (
        *NANO[:-2],
        "algo=rtn",
        "scheme=w16a16kv4",
        "eval.tasks=[]",
        "eval.seq_len=64",
        "eval.max_windows=3",
        "eval.decode_windows=3",
    )
    assert qbench(*base, "eval.ppl=[mine.txt]", "eval.decode_ppl=[mine.txt]") == 0
    metrics = record()["metrics"]
    assert metrics["decode_ppl/mine"] == pytest.approx(metrics["ppl/mine"], rel=0.02)
    assert metrics["bpb/mine"] > 0


def test_calibration_text_in_the_evaluation_text_is_warned_of(qbench, tmp_path, capfd):
    text = "".join(f"Sentence number {i} is about files, numbers and lines of text. " for i in range(200))
    (tmp_path / "leaky.txt").write_text(text)
    small = (
        "eval.tasks=[]",
        "eval.seq_len=64",
        "eval.max_windows=3",
        "calib.n_samples=8",
        "calib.seq_len=128",
    )
    gptq = (*NANO[:-2], "algo=gptq", "wbits=4", "calib=text", "calib.path=leaky.txt", *small)
    assert qbench(*gptq, "eval.ppl=[leaky.txt,stdlib_docs]") == 0
    out = capfd.readouterr().out
    assert "WARNING   calibration text occurs in evaluation text: text:leaky in leaky (" in out
    assert record()["metrics"]["calib_overlap"] > 0.3
    assert record()["data"]["calib/text:leaky"]["overlap"]["stdlib_docs"] == 0


@pytest.mark.parametrize("calib", ["self", "random", "mix"])
def test_sets_that_are_made_calibrate(calib, qbench):
    more = ("calib.mix={stdlib_docs: 1, self: 1}",) if calib == "mix" else ()
    small = ("eval=quick", "eval.max_windows=2", "calib.n_samples=4", "calib.seq_len=32")
    assert qbench(*NANO[:-2], "algo=gptq", "wbits=4", f"calib={calib}", *small, *more) == 0
    assert record()["labels"]["calib"] == {"mix": "50%self+50%stdlib_docs"}.get(calib, calib)


def test_every_calibration_set_of_a_text_has_its_config():
    named = {json.loads(json.dumps(p.stem)) for p in (CONF / "calib").glob("*.yaml")}
    serving = {name for name, corpus in CORPORA.items() if "calibration" in corpus.splits}
    assert serving - named == {"arc_challenge", "openbookqa"}


def test_tables_by_calibration_set_and_by_part(qbench, capfd):
    small = (
        "eval=quick",
        "eval.max_windows=3",
        "eval.tasks=[stdlib_recall]",
        "eval.limit=8",
        "calib.n_samples=2",
        "calib.seq_len=32",
    )
    grid = (
        "-m",
        "algo=gptq",
        "wbits=3",
        "calib=stdlib_docs,stdlib_code",
        "seed=0,1",
        "model=nano-llama",
        "tracker=none",
    )
    assert qbench(*grid, "launcher=inline", *small) == 0
    capfd.readouterr()
    assert qbench("tables", "matrix=calib") == 0
    assert "best" in capfd.readouterr().out
    assert qbench("tables", "by=part") == 0
    assert "750 chars" in capfd.readouterr().out
    assert qbench("tables", "by=colour") == 2
    assert "there are against=<algo>, matrix=calib and by=part" in capfd.readouterr().err


def test_a_file_in_the_place_of_a_split_makes_another_job(qbench, tmp_path):
    for name in "ab":
        write_lines(
            tmp_path / "data" / f"{name}.jsonl", [{"text": f"Words of {name} about files and numbers. " * 40}]
        )
    base = (
        *NANO,
        "eval.ppl=[wikitext2]",
        "eval.tasks=[]",
        "eval.seq_len=64",
        "eval.max_windows=3",
        f"data.root={tmp_path}/data",
    )
    for name in "aab":
        assert qbench(*base, f"data.files={{wikitext2/test: {name}.jsonl}}") == 0
    found = list(RecordStore(Path("results")).all())
    assert len(found) == 2
    assert len({r["data"]["eval/wikitext2"]["sha256"] for r in found}) == 2
    assert (
        qbench(*base, "data.files={wikitext2/test: a.jsonl, c4/train: b.jsonl}") == 0
    )  # which this job does not read
    assert len(list(RecordStore(Path("results")).all())) == 2


def test_texts_of_one_name_are_refused(qbench, tmp_path, capfd):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c4.txt").write_text("Words about files. " * 400)
    base = (*NANO, "eval.tasks=[]", "eval.seq_len=64")
    assert qbench(*base, "eval.ppl=[a/c4.txt]") == 2
    assert "two texts would be called 'c4' in tables" in capfd.readouterr().err


def test_forcing_a_dialogue_asks_again_and_a_judge_does_not(qbench, bench, monkeypatch):
    asked = []
    from qbench.evaluate import talk

    answer = talk.answer
    monkeypatch.setattr(talk, "answer", lambda *a, **k: asked.append(k["keep"].is_file()) or answer(*a, **k))
    plain = (*bench, "eval.plain_dialogue=true")
    assert qbench(*plain) == 0
    with JudgeServer() as server:
        assert qbench(*plain, f"judge.base_url={server.base_url}", "judge.model=some-judge") == 0
    assert qbench(*plain, "force=true") == 0
    assert asked == [False, True, False]


def test_one_block_after_another_gives_the_same_record(qbench):
    small = ("eval.seq_len=64", "eval.max_windows=3", "eval.limit=8", "eval.against_fp=true")
    metrics = []
    for streamed in ("false", "true"):
        assert qbench(*NANO, *small, f"eval.streamed={streamed}", f"results=r-{streamed}") == 0
        metrics.append(record(f"r-{streamed}")["metrics"])
    whole, streamed = metrics
    assert streamed.pop("eval_streamed") == 1
    quality = {k: pytest.approx(v, rel=1e-5, abs=1e-6) for k, v in whole.items() if "/" in k}
    assert {k: v for k, v in streamed.items() if "/" in k} == quality


def test_two_files_of_one_name_do_not_share_a_column(qbench, tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "notes.txt").write_text(f"Words of {folder} about files. " * 200)
        assert (
            qbench(
                *NANO,
                "eval.tasks=[]",
                "eval.seq_len=64",
                "eval.max_windows=3",
                f"eval.ppl=[{folder}/notes.txt]",
            )
            == 0
        )
    assert qbench("tables") == 0
    header = Path("results/tables/summary.csv").read_text().splitlines()[0]
    assert header.count("ppl/notes [64 x 3 @") == 2


def test_answers_are_there_though_the_judge_is_out_of_reach(qbench, bench, monkeypatch):
    monkeypatch.setattr("qbench.sweep.settings.Judge", partial(Judge, attempts=1))
    judged = (*bench, "eval.plain_dialogue=true", "judge.base_url=http://127.0.0.1:9/v1", "judge.model=x")
    assert qbench(*judged) == 3
    assert "the answers are in" in record()["reason"]
    (kept,) = Path("results/dialogue").rglob("mt_bench.jsonl")
    assert len(kept.read_text().splitlines()) == 2


def test_an_answer_longer_than_the_model_reads_is_refused_before(qbench, bench, capfd):
    assert qbench(*bench, "eval.plain_dialogue=true", "eval.max_new_tokens=1024") == 2
    assert "lower eval.max_new_tokens" in capfd.readouterr().err


def test_every_recipe_can_be_compared_with_the_floating_point_model(qbench, capfd):
    assert qbench("-m", "algo=rtn", "wbits=4,2", *NANO[:3], "eval=quick", "eval.max_windows=4") == 0
    capfd.readouterr()
    assert qbench("tables", "against=fp") == 0
    out = capfd.readouterr().out
    assert "w4a16g128" in out
    assert "w2a16g128" in out


def test_every_command_says_what_it_is_for(qbench, capfd):
    for command in ("tables", "data", "sensitivity", "status"):
        assert qbench(command, "--help") == 0
        assert f"`qbench {command}" in capfd.readouterr().out


def test_a_dialogue_asked_for_as_a_task_is_told_its_key(qbench, capfd):
    assert qbench(*NANO, "eval.tasks=[mt_bench]") == 2
    assert "eval.dialogue=[mt_bench]" in capfd.readouterr().err
