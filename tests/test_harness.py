"""Accuracy through lm-eval: its numbers, their errors from the documents, and what happens to long requests."""

import json
import logging
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from qbench.data.library import Library
from qbench.data.overlap import RUN, overlap
from qbench.evaluate import harness, stock
from qbench.evaluate.baseline import flips
from qbench.evaluate.harness import EMBEDDED, Ask, Harness
from qbench.evaluate.result import Evaluation, mean
from qbench.evaluate.stock import Shots
from qbench.models.load import ModelRef

WORDS = ["the", "value", "of", "a", "list", "is", "read", "from", "this", "file", "and", "then", "string"]


def sentence(seed: int, n: int) -> str:
    order = torch.randint(len(WORDS), (n,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in order)


# Rows in the hub's schema, by the file that a plain folder holds them in. Subjects differ in number.
SUBJECTS = {"anatomy": 7, "virology": 3, "management": 1}
MMLU = [
    {
        "question": f"{sentence(i, 6)} ({subject})?",
        "subject": subject,
        "choices": [sentence(4 * i + k, 2) for k in range(4)],
        "answer": i % 4,
    }
    for subject, n in SUBJECTS.items()
    for i in range(n)
]
SCIQ = [
    {
        "question": f"{sentence(i, 8)}?",
        "distractor1": sentence(i + 100, 2),
        "distractor2": sentence(i + 200, 1),
        "distractor3": sentence(i + 300, 4),
        "correct_answer": sentence(i + 400, 2),
        "support": sentence(i + 500, 40),
    }
    for i in range(24)
]
CROWS = [
    {
        "sent_more": sentence(i, 9 if i != 2 else 900),
        "sent_less": sentence(i + 50, 9),
        "stereo_antistereo": "stereo",
        "bias_type": "gender",
    }
    for i in range(6)
]
GSM8K = [
    {"question": f"{sentence(i, 20)}: {i} + {i}?", "answer": f"It is {2 * i}. #### {2 * i}"}
    for i in range(12)
]
TEXT = [{"page": sentence(i, 700)} for i in range(2)]
FILES = {
    "sciq/test": SCIQ,
    "sciq/train": SCIQ[12:],
    "crows_pairs/english_test": CROWS,
    "gsm8k/test": GSM8K[:4],
    "gsm8k/train": GSM8K[4:],
    "mmlu/test": MMLU,
    "mmlu/dev": MMLU,
    "wikitext_document_level/test": TEXT,
}


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Library:
    root = tmp_path_factory.mktemp("data")
    for place, rows in FILES.items():
        path = root / f"{place}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return Library(root)


@cache
def nano() -> tuple[Any, Any]:
    reference = ModelRef("zoo/nano-llama")
    return reference.load(), reference.tokenizer()


def new(batch_size: int | None = None) -> Harness:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return Harness(*nano(), batch_size)


@pytest.fixture(scope="module")
def asked() -> Harness:
    return new()


def by_lm_eval(name: str, library: Library, shots: Shots = Shots(), limit: int | None = None) -> Any:  # noqa: B008
    """What lm-eval alone says of the same documents, with its own standard errors."""
    tasks = [task for _, task in harness.tasks_of(name, library, shots).values()]
    model, tokenizer = nano()
    return simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, softmax_dtype="float32"),
        tasks=tasks,
        num_fewshot=None,
        limit=limit,
        bootstrap_iters=100,
        task_manager=TaskManager(include_defaults=False),
    )


def of(result: Evaluation, metric: str) -> list[dict[str, Any]]:
    return [sample for sample in result.samples if sample["metric"] == metric]


def test_accuracy_and_its_error_are_those_of_lm_eval(asked, library):
    found = asked.accuracy("sciq", library, Ask())
    expected = by_lm_eval("sciq", library)["results"]["sciq"]
    n = len(SCIQ)
    for metric in ("acc", "acc_norm"):
        p = found.metrics[f"{metric}/sciq"]
        assert p == pytest.approx(expected[f"{metric},none"])
        error = found.metrics[f"{metric}/sciq_stderr"]
        assert error == pytest.approx(expected[f"{metric}_stderr,none"])
        assert error == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
        assert mean("m", of(found, f"{metric}/sciq")).metrics["m"] == pytest.approx(p)
    assert 0 < found.metrics["acc/sciq"] < 1, "else its error says nothing"


@pytest.mark.parametrize("name", ["sciq", "gsm8k"])
def test_examples_are_the_same_for_every_model_and_those_of_lm_eval(name, library, monkeypatch):
    shots = Shots(((name, 2),))
    prompts = []

    def heard(self: Any, requests: Any, **_: Any) -> list[Any]:
        prompts[-1] += [request.args[0] for request in requests]
        return [(0.0, False) if name == "sciq" else "" for _ in requests]

    monkeypatch.setattr(HFLM, "loglikelihood" if name == "sciq" else "generate_until", heard)
    for batch_size in (1, 2):
        prompts.append([])
        new(batch_size).accuracy(name, library, Ask(shots=shots))
    prompts.append([])
    by_lm_eval(name, library, shots)
    assert prompts[0] == prompts[1] == prompts[2]


def test_filters_stand_behind_the_metric(asked, library):
    found = asked.accuracy("gsm8k", library, Ask(1, Shots((("gsm8k", 0),))))
    expected = by_lm_eval("gsm8k", library, Shots((("gsm8k", 0),)), limit=1)["results"]["gsm8k"]
    for filtered in ("strict-match", "flexible-extract"):
        assert found.metrics[f"exact_match-{filtered}/gsm8k"] == expected[f"exact_match,{filtered}"]


@pytest.fixture(scope="module")
def subjects(library) -> dict[str, tuple[str, Any]]:
    """Three of MMLU's parts, as the group that they are of."""
    with pytest.MonkeyPatch.context() as patch:
        every = stock.leaves("mmlu")
        few = tuple(leaf for leaf in every if leaf.part in SUBJECTS)
        patch.setattr(stock, "leaves", lambda name: few)
        return stock.build.__wrapped__("mmlu", library, Shots())


@pytest.fixture
def three(subjects, monkeypatch):
    monkeypatch.setattr(harness, "tasks_of", lambda *_: subjects)


@pytest.mark.usefixtures("three")
def test_a_groups_mean_is_over_its_documents(asked, library):
    found = asked.accuracy("mmlu", library, Ask())
    samples = of(found, "acc/mmlu")
    assert len(samples) == len(MMLU)
    assert {part: [s["part"] for s in samples].count(part) for part in SUBJECTS} == SUBJECTS
    values = torch.tensor([sample["value"] for sample in samples], dtype=torch.float64)
    assert found.metrics["acc/mmlu"] == pytest.approx(values.mean().item())
    assert found.metrics["acc/mmlu_stderr"] == pytest.approx(values.std().item() / len(values) ** 0.5)


@pytest.mark.usefixtures("three")
def test_a_groups_mean_is_over_its_tasks_where_it_says_so(asked, library, monkeypatch):
    monkeypatch.setattr(stock, "is_weighted", lambda name: False)
    found = asked.accuracy("mmlu", library, Ask())
    samples = of(found, "acc/mmlu")
    parts = [[s["value"] for s in samples if s["part"] == part] for part in SUBJECTS]
    assert found.metrics["acc/mmlu"] == pytest.approx(sum(sum(p) / len(p) for p in parts) / len(parts))


@pytest.mark.usefixtures("three")
def test_the_parts_of_a_tag_stand_alone(asked, library, monkeypatch):
    monkeypatch.setattr(stock, "is_tag", lambda name: True)
    found = asked.accuracy("mmlu", library, Ask())
    metrics = {k for k in found.metrics if not k.endswith("_stderr")}
    assert metrics == {f"acc/mmlu_{subject}" for subject in SUBJECTS}


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize(
    ("limit", "counts"), [(1, (1, 1, 1)), (3, (1, 1, 1)), (6, (2, 2, 1)), (99, (7, 3, 1))]
)
def test_a_limit_is_shared_out_among_the_parts(asked, library, limit, counts):
    samples = of(asked.accuracy("mmlu", library, Ask(limit)), "acc/mmlu")
    assert tuple([s["part"] for s in samples].count(part) for part in SUBJECTS) == counts


@pytest.mark.usefixtures("three")
def test_a_documents_number_is_its_own_and_stays(asked, library):
    every, some = (of(asked.accuracy("mmlu", library, Ask(limit)), "acc/mmlu") for limit in (None, 3))
    numbers = [sample["item"] for sample in every]
    assert len(set(numbers)) == len(numbers)
    values = {sample["item"]: sample for sample in every}
    assert all(values[sample["item"]] == sample for sample in some)
    again = of(new().accuracy("mmlu", library, Ask()), "acc/mmlu")
    assert again == every


def test_the_batch_size_changes_no_accuracy(library):
    found = [
        {
            **new(size).accuracy("sciq", library, Ask()).metrics,
            **new(size).accuracy("stdlib_cloze", library, Ask(12)).metrics,
            **new(size).accuracy("stdlib_copy", library, Ask(4)).metrics,
        }
        for size in (1, 5, None)
    ]
    assert found[0] == found[1] == found[2]


def long_and_short(lengths: list[int], root: Path) -> Library:
    rows = [SCIQ[i] | {"support": sentence(i, n)} for i, n in enumerate(lengths)]
    (root / "sciq").mkdir()
    (root / "sciq/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Library(root)


def test_documents_longer_than_the_model_reads_are_counted(asked, tmp_path):
    model, tokenizer = nano()
    most = model.config.max_position_embeddings
    library = long_and_short([10, 20 * most, most // 4, 2 * most, *range(most - 100, most, 10)], tmp_path)
    found = asked.accuracy("sciq", library, Ask())
    ((_, task),) = harness.tasks_of("sciq", library, Shots()).values()
    # A request's last token is only predicted, so one more fits than the model reads.
    over = [
        any(len(tokenizer(f"{task.doc_to_text(d)} {c}").input_ids) > most + 1 for c in task.doc_to_choice(d))
        for d in task.eval_docs
    ]
    assert 2 < sum(over) < len(over) - 2
    assert found.metrics["truncated/sciq"] == sum(over) / len(over)


def test_nothing_is_said_of_truncation_where_there_is_none(asked, library):
    asked.accuracy("crows_pairs_english", library, Ask())
    assert "truncated/sciq" not in asked.accuracy("sciq", library, Ask(4)).metrics


def test_documents_that_share_a_context_are_counted_apart(asked, library):
    """All of these have an empty one; one sentence of one of six is long."""
    found = asked.accuracy("crows_pairs_english", library, Ask())
    assert found.metrics["truncated/crows_pairs_english"] == 1 / 6


@pytest.mark.parametrize("called", ["max_gen_toks", "max_new_tokens"])
def test_a_request_for_as_much_text_as_the_model_reads_leaves_half_of_it_for_the_question(called, library):
    model, _ = nano()
    most = model.config.max_position_embeddings
    shown = []

    def generate(context: torch.Tensor, max_length: int, *_: Any, **__: Any) -> torch.Tensor:
        shown.append((context.shape[1], max_length - context.shape[1]))
        return context

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(harness.EMBEDDED, "stdlib_copy", EMBEDDED["stdlib_copy"] | {
            "generation_kwargs": {"until": ["\n"], "do_sample": False, called: 2 * most}
        })  # fmt: skip
        patch.setitem(
            harness._DOCUMENTS, "stdlib_copy",
            lambda: [{"context": sentence(i, n), "target": "a"} for i, n in enumerate((5, most // 8, 3 * most))],
        )  # fmt: skip
        harness.tasks_of.cache_clear()
        subject = new(1)
        patch.setattr(subject.language_model, "_model_generate", generate)
        found = subject.accuracy("stdlib_copy", library, Ask())
    harness.tasks_of.cache_clear()
    assert {room for _, room in shown} == {most // 2}
    assert max(length for length, _ in shown) == most // 2
    assert found.metrics["truncated/stdlib_copy"] == 1 / 3


def test_a_task_without_a_mean_over_documents_is_refused(asked, library):
    with pytest.raises(
        NotImplementedError, match="no metric that is a mean over documents, only word_perplexity"
    ):
        asked.accuracy("wikitext", library, Ask())


def test_windows_of_a_text_are_read(asked, library):
    """They come without the words they are tokens of."""
    ((_, task),) = harness.tasks_of("wikitext", library, Shots()).values()
    task.build_all_requests()
    values = asked.language_model.loglikelihood_rolling(task.instances)
    assert len(values) == len(TEXT)
    assert all(value < 0 for value in values)


def test_a_drop_is_the_clean_accuracy_less_the_attacked():
    values = {"acc/t": (0.25, 0.03), "acc/t_clean": (0.75, 0.04), "acc/other": (0.5, 0.1)}
    metrics = {k: v for k, (v, _) in values.items()} | {f"{k}_stderr": e for k, (_, e) in values.items()}
    found = harness.drops(Evaluation(metrics, []))
    assert found.metrics == metrics | {"drop/t": 0.5, "drop/t_stderr": pytest.approx(0.05)}
    assert harness.drops(found).metrics == found.metrics


def answers(*values: float, name: str = "t", metric: str = "acc") -> Evaluation:
    return mean(f"{metric}/{name}", [{"item": i, "value": v} for i, v in enumerate(values)])


def test_flips_are_answers_lost_and_won():
    before, now = answers(1, 1, 0, 0, 1, 0), answers(1, 0, 1, 0, 0, 0)
    found = flips(now, before)
    m = found.metrics
    assert (m["flips/t"], m["right_to_wrong/t"], m["wrong_to_right/t"]) == pytest.approx(
        (3 / 6, 2 / 6, 1 / 6)
    )
    assert m["flips/t"] == pytest.approx(m["right_to_wrong/t"] + m["wrong_to_right/t"])
    lost = m["right_to_wrong/t"] - m["wrong_to_right/t"]
    assert before.metrics["acc/t"] - now.metrics["acc/t"] == pytest.approx(lost)
    assert [s["value"] for s in of(found, "flips/t")] == [0, 1, 1, 0, 1, 0]
    assert set(flips(now, now).metrics.values()) == {0.0}


def test_flips_are_of_right_and_wrong_alone():
    both = answers(0.5, 1) + answers(1, 0, metric="exact")
    assert flips(answers(0.5, 1), answers(1, 1)) == Evaluation({}, [])
    assert flips(both, both + Evaluation({}, [])).metrics["flips/t"] == 0


def test_flips_against_other_documents_are_refused():
    with pytest.raises(AssertionError, match="asked other documents"):
        flips(answers(1, 0, 1), answers(1, 0))


@pytest.mark.usefixtures("three")
def test_flips_of_a_group_compare_documents_whatever_their_part(asked, library):
    before = asked.accuracy("mmlu", library, Ask())
    assert flips(before, before).metrics["flips/mmlu"] == 0
    turned = Evaluation({}, [s | {"value": 1 - s["value"]} for s in before.samples])
    assert flips(turned, before).metrics["flips/mmlu"] == 1


def test_a_second_model_tokenizes_nothing_anew(library, monkeypatch):
    model, tokenizer = nano()
    first = Harness(model, tokenizer, 4)
    found = first.accuracy("sciq", library, Ask())
    calls = []
    encode = HFLM.tok_encode
    monkeypatch.setattr(HFLM, "tok_encode", lambda self, *a, **kw: calls.append(a) or encode(self, *a, **kw))
    assert Harness(model, tokenizer, 4).accuracy("sciq", library, Ask()) == found
    assert calls == []


def test_kept_tokens_are_not_changed_by_who_uses_them(asked):
    once = asked.language_model.tok_encode("the list is read")
    once.append(-1)
    assert asked.language_model.tok_encode("the list is read") == once[:-1]


def test_calibration_text_that_holds_a_document_is_found(library):
    _, tokenizer = nano()
    questions = harness.questions("sciq", library, Shots(), tokenizer)
    seen = tokenizer(f"{sentence(7, 30)}. {SCIQ[3]['support']}. {sentence(8, 30)}").input_ids
    other = tokenizer(sentence(9001, 200)).input_ids
    n = min(len(seen), len(other))
    assert n > RUN
    assert overlap(torch.tensor([seen[:n], other[:n]]), questions) == 0.5


def test_short_answers_are_no_document(library):
    _, tokenizer = nano()
    assert not harness.questions("mmlu_anatomy", library, Shots(), tokenizer)


def test_documents_are_told_apart_by_all_files_they_come_from(library, tmp_path):
    few, none = Shots((("sciq", 2),)), Shots()
    before = {shots: harness.origin("sciq", library, shots) for shots in (none, few)}
    assert before[none]["origin"] == "file sciq/test.jsonl"
    assert before[few]["origin"] == "file sciq/test.jsonl, file sciq/train.jsonl"
    (tmp_path / "sciq").mkdir()
    for split in ("test", "train"):
        text = (library.root / f"sciq/{split}.jsonl").read_text()
        (tmp_path / f"sciq/{split}.jsonl").write_text(
            text if split == "test" else text.replace("string", "bytes")
        )
    changed = Library(tmp_path)
    assert harness.origin("sciq", changed, none)["sha256"] == before[none]["sha256"]
    assert harness.origin("sciq", changed, few)["sha256"] != before[few]["sha256"]


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_tasks_need_no_data(name, asked):
    assert harness.missing(name, Library(), Shots()) == ""
    assert len(harness.origin(name, Library(), Shots())["sha256"]) == 64
    found = asked.accuracy(name, Library(), Ask(3))
    assert len(of(found, f"acc/{name}")) == 3
