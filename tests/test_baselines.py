"""What the floating-point model says is computed once, whoever asks, and what is compared with it."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from qbench.evaluate.baseline import Baseline, Baselines, flips
from qbench.evaluate.evaluator import Evaluator
from qbench.evaluate.result import Evaluation
from qbench.track.records import RecordStore

SMALL = (
    "model=nano-llama", "tracker=none", "eval.against_fp=true", "eval.seq_len=64", "eval.max_windows=4",
    "eval.limit=8", "calib.n_samples=2", "calib.seq_len=64",
)  # fmt: skip


def made_up(value: float = 1.0) -> Baseline:
    samples = [{"metric": "ppl/text", "item": i, "value": value} for i in range(3)]
    return Baseline(Evaluation({"ppl/text": value}, samples), torch.arange(6.0).view(1, 2, 3))


def records() -> list[dict]:
    return list(RecordStore(Path("results")).all())


def test_a_sweep_evaluates_the_floating_point_model_once_for_each_evaluation_set(qbench, monkeypatch):
    asked = []
    for name in ("_text_baseline", "_task_baseline"):
        make = getattr(Evaluator, name)
        monkeypatch.setattr(
            Evaluator, name, lambda self, text, make=make: asked.append(text) or make(self, text)
        )
    grid = ("-m", "algo=rtn,gptq", "wbits=8,6,5,4,3", "seed=0,1,2", "launcher=inline")
    assert qbench(*grid, *SMALL) == 0
    assert len(records()) == 21  # rounding to nearest has no seed: 5 + 15, and floating point
    sets = ["stdlib_docs", "stdlib_code", "stdlib_cloze", "stdlib_copy"]
    assert sorted(asked) == sorted(sets)
    assert (
        qbench("algo=awq", "wbits=4", "launcher=inline", *SMALL) == 0
    )  # another process would find them too
    assert sorted(asked) == sorted(sets)


@pytest.mark.slow
def test_several_workers_share_them(qbench):
    assert qbench("-m", "algo=rtn", "wbits=8,5,4,3", "launcher.workers=2", *SMALL) == 0
    made = list(Path("results/baselines").glob("*.json"))
    assert len(made) == 4
    assert len(list(Path("results/baselines").glob(".*"))) == 0


def test_the_floating_point_job_says_that_nothing_changed(qbench):
    assert qbench("-m", "algo=rtn", "wbits=3", "launcher=inline", *SMALL) == 0
    fp, rtn = records()
    for text in ("stdlib_docs", "stdlib_code"):
        assert fp["metrics"][f"kl/{text}"] == 0
        assert fp["metrics"][f"agreement/{text}"] == 1
        assert rtn["metrics"][f"kl/{text}"] > 0
        assert 0.3 < rtn["metrics"][f"agreement/{text}"] < 1
    assert fp["metrics"]["flips/stdlib_cloze"] == 0
    m = rtn["metrics"]
    for task in ("stdlib_cloze", "stdlib_copy"):
        assert m[f"flips/{task}"] == pytest.approx(m[f"right_to_wrong/{task}"] + m[f"wrong_to_right/{task}"])
        gained = m[f"wrong_to_right/{task}"] - m[f"right_to_wrong/{task}"]
        assert m[f"acc/{task}"] - fp["metrics"][f"acc/{task}"] == pytest.approx(gained)
    plain = [a for a in SMALL if "against_fp" not in a]
    assert qbench("algo=fp", "launcher=inline", *plain) == 0
    alone = records()[-1]["metrics"]  # evaluated by itself, without a baseline
    assert {k: v for k, v in fp["metrics"].items() if k in alone and "/" in k} == {
        k: v for k, v in alone.items() if "/" in k
    }


def test_a_baseline_is_found_again_as_it_was(tmp_path):
    kept = Baselines(tmp_path).get({"text": "a"}, made_up)
    again = Baselines(tmp_path)
    found = again.get({"text": "a"}, lambda: pytest.fail("it was made already"))
    assert again.made == 0
    assert found.evaluation == kept.evaluation
    assert torch.equal(found.hidden, kept.hidden)
    assert again.get({"text": "b"}, lambda: made_up(2.0)).evaluation.metrics == {"ppl/text": 2.0}


def test_without_a_folder_it_is_kept_in_memory():
    baselines = Baselines()
    baselines.get({"text": "a"}, made_up)
    baselines.get({"text": "a"}, lambda: pytest.fail("it was made already"))
    assert baselines.made == 1


def test_a_baseline_whose_making_failed_is_made_by_the_next(tmp_path):
    def fail() -> Baseline:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        Baselines(tmp_path).get({"text": "a"}, fail)
    assert Baselines(tmp_path).get({"text": "a"}, made_up).evaluation.metrics == {"ppl/text": 1.0}


def test_a_half_written_baseline_does_not_count(tmp_path):
    Baselines(tmp_path).get({"text": "a"}, made_up)
    (about,) = tmp_path.glob("*.json")
    about.unlink()  # as where a process was killed between the two files
    assert Baselines(tmp_path).get({"text": "a"}, lambda: made_up(3.0)).evaluation.metrics == {
        "ppl/text": 3.0
    }


def _slowly(folder: str, mark: str) -> None:
    import time

    def make() -> Baseline:
        with Path(mark).open("a") as file:
            file.write("made\n")
        time.sleep(0.5)
        return made_up()

    Baselines(Path(folder)).get({"text": "a"}, make)


def test_who_comes_second_waits_for_the_first(tmp_path):
    context = multiprocessing.get_context("spawn")
    arguments = (str(tmp_path / "baselines"), str(tmp_path / "mark"))
    workers = [context.Process(target=_slowly, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert (tmp_path / "mark").read_text() == "made\n"


def answers(*values: float, metric: str = "acc/task") -> Evaluation:
    return Evaluation({}, [{"metric": metric, "item": i, "value": v} for i, v in enumerate(values)])


def test_flips_count_answers_that_changed_and_which_way():
    found = flips(answers(1, 0, 0, 1, 1), answers(1, 1, 1, 0, 1)).metrics
    assert {k: v for k, v in found.items() if not k.endswith("stderr")} == {
        "flips/task": 0.6, "right_to_wrong/task": 0.4, "wrong_to_right/task": pytest.approx(0.2),
    }  # fmt: skip
    assert not flips(answers(0.5, 1), answers(1, 1)).metrics  # no answer is half right
    with pytest.raises(AssertionError, match="other documents"):
        flips(answers(1, 0), answers(1, 0, 1))


def test_baselines_of_other_protocols_are_others(qbench):
    assert qbench("algo=rtn", "wbits=4", "launcher=inline", *SMALL) == 0
    before = len(list(Path("results/baselines").glob("*.json")))
    assert qbench("algo=rtn", "wbits=4", "launcher=inline", *SMALL, "eval.max_windows=3") == 0
    after = [json.loads(p.read_text()) for p in Path("results/baselines").glob("*.json")]
    assert len(after) == before + 2  # the two texts; the tasks are asked the same


def test_baselines_in_memory_are_those_asked_for_last(monkeypatch):
    monkeypatch.setattr("qbench.evaluate.baseline._KEPT_UP_TO", 2 * made_up().n_bytes)
    baselines = Baselines()
    for text in "abcb":
        baselines.get({"text": text}, made_up)
    assert baselines.made == 3
    baselines.get({"text": "a"}, made_up)
    assert baselines.made == 4
