"""Our lm-eval tasks: what a row becomes, and what an answer to it scores."""

import json
import logging
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from lm_eval.tasks import TaskManager

from qbench.errors import UsageError
from qbench.evaluate.tasks.boss import spans
from qbench.evaluate.tasks.long import answers, generated
from qbench.evaluate.tasks.xsum import summaries
from qbench.models.load import ModelRef

FOLDER = Path(generated.__file__).parents[1]
MANAGER = TaskManager(include_defaults=False, include_path=str(FOLDER))
# The tasks that run programs have their own rows and tests.
TASKS = sorted(
    name for name in MANAGER.all_subtasks if MANAGER.task_index[name].yaml_path.parent.name != "code"
)
GENERATED = ("stdlib_lines", "stdlib_passkey")
POSITIONS = ["0", "0.25", "0.5", "0.75", "1"]

KV = [[f"key-{i}", f"value-{i}"] for i in range(8)]
NEEDLES = [
    f"The number of {city} is {i}{i}{i}." for i, city in enumerate(["Oslo", "Rome", "Bonn", "Lima"], 1)
]
LINES = [f"line box-{i}: REGISTER_CONTENT is <{1000 + i}>" for i in range(8)]
PASSAGE = {"context": "Ann met Bob in Rome.", "question": "Where?", "answers": {"text": ["Rome", "in Rome"]}}

# Rows made up in the schema of each family, under the beginning of its tasks' names.
ROWS: dict[str, list[dict[str, Any]]] = {
    "advglue_sst2": [{"sentence": f"film {i}", "label": i % 2, "idx": i} for i in range(4)],
    "advglue_qqp": [{"question1": f"why {i}?", "question2": "why?", "label": i % 2} for i in range(4)],
    "advglue_mnli": [{"premise": f"{i} cats", "hypothesis": "cats", "label": i % 3} for i in range(4)],
    "advglue_qnli": [{"question": f"who {i}?", "sentence": "Ann.", "label": i % 2} for i in range(4)],
    "advglue_rte": [{"sentence1": f"{i} cats", "sentence2": "cats", "label": i % 2} for i in range(4)],
    "boss_qa": [PASSAGE | {"question": f"Where, {i}?"} for i in range(4)],
    "boss_sa": [{"Text": f"film {i}", "Label": i % 3} for i in range(4)],
    "boss_td": [{"Text": f"film {i}", "Label": i % 2} for i in range(4)],
    "boss_nli": [{"Premise": f"{i} cats", "Hypothesis": "cats", "Label": i % 3} for i in range(4)],
    "strategyqa": [
        {"input": f"Is {i} even?", "target_scores": {"Yes": 1 - i % 2, "No": i % 2}, "target": ""}
        for i in range(4)
    ],
    "self_calibration": [
        {"question": f"{i} + 1?", "subject": "sums", "choices": [str(i + k) for k in range(4)], "answer": 1}
        for i in range(12)
    ],
    "chid": [
        {
            "candidates": ["一心一意", "画蛇添足", "守株待兔"],
            "content": ["他#idiom000001#地学习，从不#idiom000002#。", "#idiom000003#不可取。"],
            "answers": {"text": ["一心一意", "画蛇添足", "守株待兔"], "candidate_id": [0, 1, 2]},
        }
    ],
    "longeval_lines": [
        {
            "prompt": "\n".join([*LINES, "", "Which? "]),
            "correct_line": LINES[i] + "\n",
            "expected_number": 1000 + i,
        }
        for i in range(8)
    ],
    "longeval_topics": [{"prompt": "We spoke. Of what? ", "topics": ["The role of art", "Tides", "Rust"]}],
    "litm_kv": [{"ordered_kv_records": KV, "key": key, "value": value} for key, value in KV],
    "litm_qa": [
        {
            "question": f"who is {i}?",
            "answers": [f"Person-{i:02}"],
            "ctxs": [{"title": f"T{i}", "text": f"{i} is Person-{i:02}.", "hasanswer": True, "isgold": True}],
        }
        for i in range(12)
    ],
    "passkey": [
        {"input": "a" * before + "74509" + "b" * (95 - before), "target": "74509", "passkey_position": 3}
        for before in (0, 30, 60, 90)
    ],
    "ruler_niah": [
        {"input": " ".join(NEEDLES) + " Which?", "outputs": ["111", "333"], "length": 3181, "index": 0}
    ],
    "xsum": [
        {"document": f"Rain fell on {i} towns.", "summary": "Heavy rain", "id": str(i)} for i in range(4)
    ],
}

# The files that hold a task's rows, where they lie beside the repository.
FILES = {
    "advglue_sst2": ["advglue/sst2_dev"],
    "advglue_sst2_clean": ["sst2/validation"],
    "advglue_qqp": ["advglue/qqp_dev"],
    "advglue_mnli": ["advglue/mnli_dev"],
    "advglue_mnli_mm": ["advglue/mnli_mm_dev"],
    "advglue_qnli": ["advglue/qnli_dev"],
    "advglue_rte": ["advglue/rte_dev"],
    "advglue_rte_clean": ["rte/validation"],
    "boss_qa_advqa": ["boss/QuestionAnswering_advqa_test"],
    "strategyqa": ["strategyqa/task"],
    "self_calibration_mmlu": [f"mmlu/test_{s}" for s in ("stem", "humanities", "social_sciences", "other")],
    "longeval_lines": [f"longctx/longeval_lines_{n}" for n in (200, 300, 500, 680)],
    "longeval_topics": [f"longctx/longeval_topics_{n}" for n in (5, 10, 20)],
    "litm_kv": ["longctx/litm_kv_75", "longctx/litm_kv_140"],
    "litm_qa": ["longctx/litm_nq_oracle"],
    "passkey": ["longctx/kivi_passkey"],
    "ruler_niah": ["longctx/ruler_niah_multikey_3_4096"],
    "xsum": ["xsum/xsum_0shot_sample"],
}


def build(name: str, rows: list[dict[str, Any]] | None = None) -> Any:
    """The task on `rows`, the same in every split that it names."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    override: dict[str, Any] = {"task": name}
    if rows is not None:
        config = MANAGER.task_index[name].cfg
        splits = {config["test_split"], config.get("fewshot_split", config["test_split"])}
        data = Dataset.from_list(rows)
        override["custom_dataset"] = lambda **_: dict.fromkeys(splits, data)
    # `TaskManager.load` forgets the file of a task that is named with overrides.
    return MANAGER._factory.build(MANAGER.task_index[name], overrides=override, registry=MANAGER.task_index)


@cache
def task_on_made_up_rows(name: str) -> Any:
    if name in GENERATED:
        return build(name)
    return build(name, ROWS[max((family for family in ROWS if name.startswith(family)), key=len)])


def real_rows(shared_data: Path, name: str) -> list[dict[str, Any]]:
    # Not splitlines, which also cuts at separators that a JSON string may hold.
    lines = [line for f in FILES[name] for line in (shared_data / f"{f}.jsonl").open(encoding="utf-8")]
    # A column of words and numbers together, which a data set cannot hold.
    return [{k: v for k, v in json.loads(line).items() if k != "random_idx"} for line in lines]


def parts(task: Any) -> list[str]:
    return list(task.eval_docs["part"])


def scores(task: Any, document: dict[str, Any], *, right: bool) -> dict[str, float]:
    """What the gold answer scores, or a wrong one."""
    if task.OUTPUT_TYPE == "generate_until":
        gold = task.doc_to_target(document)
        return task.process_results(document, [f" {gold}\n" if right else " 7 nonsense"])
    choices, gold = task.doc_to_choice(document), task.doc_to_target(document)
    said = gold if right else (gold + 1) % len(choices)
    return task.process_results(
        document, [(-1.0 if i == said else -99.0, False) for i in range(len(choices))]
    )


def check_documents(task: Any, documents: list[dict[str, Any]]) -> None:
    metrics = [metric["metric"] for metric in task.config.metric_list]
    for document in documents:
        prompt = task.fewshot_context(document, 0)
        assert prompt.strip()
        assert prompt == prompt.rstrip(), "tokenizers join the space to the word that follows"
        if task.OUTPUT_TYPE == "multiple_choice":
            choices = task.doc_to_choice(document)
            assert task.doc_to_target(document) in range(len(choices))
            assert len(set(choices)) == len(choices)
        assert scores(task, document, right=True) == pytest.approx(dict.fromkeys(metrics, 1.0))
        assert scores(task, document, right=False) == dict.fromkeys(metrics, 0.0)


def test_all_families_are_found():
    assert {family for family in ROWS if any(name.startswith(family) for name in TASKS)} == set(ROWS)
    assert len([name for name in TASKS if name.startswith("advglue_")]) == 12
    assert len([name for name in TASKS if name.startswith("boss_")]) == 16


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_begins_with_its_source(path):
    assert path.read_text("utf-8").startswith("# ")


@pytest.mark.parametrize("name", TASKS)
def test_the_right_answer_scores_one_and_a_wrong_one_zero(name):
    task = task_on_made_up_rows(name)
    check_documents(task, list(task.eval_docs))


@pytest.mark.parametrize("name", FILES)
def test_the_right_answer_scores_one_and_a_wrong_one_zero_on_real_rows(name, shared_data):
    rows = real_rows(shared_data, name)
    task = build(name, rows)
    check_documents(task, list(task.eval_docs)[:60])
    assert len(task.eval_docs) == len(rows)


@pytest.mark.parametrize("name", TASKS)
def test_every_metric_is_a_mean_over_documents(name):
    task = task_on_made_up_rows(name)
    assert {function.__name__ for function in task.aggregation().values()} == {"mean"}
    assert set(task.higher_is_better().values()) == {True}


@pytest.mark.parametrize("name", TASKS)
def test_the_data_is_named_or_made(name):
    config = task_on_made_up_rows(name).config
    assert (config.dataset_path is None) == (name in GENERATED)
    assert config.test_split


WITH_EXAMPLES = [name for name in TASKS if "fewshot_split" in MANAGER.task_index[name].cfg]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_come_with_their_answers_and_before_the_question(name):
    task = task_on_made_up_rows(name)
    task.set_fewshot_seed(0)
    document = task.eval_docs[0]
    asked = task.fewshot_context(document, 0)
    prompt = task.fewshot_context(document, 2)
    assert prompt.endswith(asked)
    assert len(prompt[: -len(asked)].strip().split("\n\n")) >= 2
    if task.config.fewshot_split == task.config.test_split:
        assert prompt.count(asked) == 1, "a document is no example of itself"


@pytest.mark.parametrize("name", [name for name in TASKS if name.endswith("_clean")])
def test_clean_text_is_asked_about_as_attacked_text_is(name):
    clean, attacked = (task_on_made_up_rows(n).config for n in (name, name.removesuffix("_clean")))
    for key in ("doc_to_text", "doc_to_choice", "doc_to_target", "metric_list"):
        assert clean[key] == attacked[key]


def test_the_hub_and_big_bench_give_the_same_questions():
    ours = task_on_made_up_rows("strategyqa").eval_docs
    hub = build(
        "strategyqa",
        [
            {
                "inputs": f"Q: Is {i} even?\nA:",
                "multiple_choice_targets": ["No", "Yes"],
                "multiple_choice_scores": [i % 2, 1 - i % 2],
            }
            for i in range(4)
        ],
    )
    assert list(ours) == list(hub.eval_docs)


def test_a_letter_and_a_number_name_the_same_answer():
    rows = ROWS["self_calibration"]
    documents = [
        list(build("self_calibration_mmlu", [r | {"answer": a} for r in rows]).eval_docs) for a in "1B"
    ]
    assert documents[0] == documents[1] == list(task_on_made_up_rows("self_calibration_mmlu").eval_docs)


def test_a_proposal_is_right_exactly_where_its_label_says_so():
    for row, document in zip(
        ROWS["self_calibration"], task_on_made_up_rows("self_calibration_mmlu").eval_docs, strict=True
    ):
        proposed = document["proposal"].split(") ", 1)[1]
        assert (proposed == row["choices"][row["answer"]]) == (document["label"] == 0)
        assert document["part"] == "sums"


def test_about_half_of_the_proposals_are_right_and_the_wrong_ones_are_even(shared_data):
    rows = real_rows(shared_data, "self_calibration_mmlu")
    documents = build("self_calibration_mmlu", rows).eval_docs
    n = len(documents)
    assert abs(sum(documents["label"]) / n - 0.5) < 4 * (0.25 / n) ** 0.5
    steps = Counter(
        ("ABCD".index(document["proposal"][1]) - row["answer"]) % 4
        for row, document in zip(rows, documents, strict=True)
    )
    for step in (1, 2, 3):
        assert abs(steps[step] / n - 1 / 6) < 4 * (5 / 36 / n) ** 0.5
    assert len(set(documents["part"])) == 57


def test_a_blank_is_filled_and_the_others_keep_their_own_idioms():
    task = task_on_made_up_rows("chid")
    documents = list(task.eval_docs)
    assert [document["label"] for document in documents] == [0, 1, 2]
    for document in documents:
        passage = document["before"] + document["choices"][document["label"]]
        assert passage in ("他一心一意地学习，从不画蛇添足。", "守株待兔不可取。")
    assert documents[1]["before"] == "他一心一意地学习，从不"
    assert documents[2]["before"] == ""


def test_blanks_without_answers_are_refused():
    row = ROWS["chid"][0] | {"answers": {"text": ["一心一意"], "candidate_id": [0]}}
    with pytest.raises(ValueError, match="3 blanks and 1 answers, one for each is needed"):
        build("chid", [row])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("longeval_lines", [f"8 lines, {p}" for p in POSITIONS[:4] for _ in range(2)]),
        ("longeval_topics", ["3 topics, 0"]),
        ("litm_kv", [f"8 keys, {p}" for p in POSITIONS[:4] for _ in range(2)]),
        ("litm_qa", [f"10 documents, {p}" for p in [*POSITIONS, *POSITIONS, "0", "0.25"]]),
        ("passkey", [f"100 chars, {p}" for p in POSITIONS[:4]]),
        ("ruler_niah", ["4096 tokens, 0"]),
        ("stdlib_lines", [f"{n} lines, {p}" for n in (5, 10, 20) for p in POSITIONS] * 8),
        ("stdlib_passkey", [f"{n} chars, {p}" for n in (600, 1000, 1400) for p in POSITIONS] * 8),
    ],
)
def test_a_part_is_a_length_and_a_position(name, expected):
    assert parts(task_on_made_up_rows(name)) == expected


def test_real_rows_have_the_lengths_their_files_are_named_by(shared_data):
    for name, unit, lengths in [
        ("longeval_lines", "lines", (200, 300, 500, 680)),
        ("longeval_topics", "topics", (5, 10, 20)),
        ("litm_kv", "keys", (75, 140)),
        ("ruler_niah", "tokens", (4096,)),
    ]:
        found = {part.split(",")[0] for part in parts(build(name, real_rows(shared_data, name)))}
        assert found == {f"{n} {unit}" for n in lengths}
    assert set(parts(build("passkey", real_rows(shared_data, "passkey")))) <= {
        f"44215 chars, {p}" for p in ("0.25", "0.5")
    }


@pytest.mark.parametrize("real", [False, True], ids=["made up", "real"])
def test_one_passage_in_ten_answers_and_stands_where_its_part_says(real, request):
    rows = real_rows(request.getfixturevalue("shared_data"), "litm_qa") if real else ROWS["litm_qa"]
    for row, document in zip(rows, build("litm_qa", rows).eval_docs, strict=True):
        passages = document["passages"].split("\n[")
        assert len(passages) == 10
        gold = row["ctxs"][0]["text"].strip()
        (place,) = (i for i, passage in enumerate(passages) if passage.endswith(gold))
        assert place == round(float(document["part"].split(", ")[1]) * 9)
        said = [p for p in passages if any(answer.lower() in p.lower() for answer in row["answers"])]
        assert len(said) <= 1


def test_too_few_passages_are_refused():
    with pytest.raises(UsageError, match=r"8 passages do not answer 'who is 0\?', 9 are needed"):
        build("litm_qa", ROWS["litm_qa"][:9])


@pytest.mark.parametrize("make", [generated.passkey_documents, generated.lines_documents])
def test_made_documents_are_seeded_and_answered_once(make):
    documents = make()
    assert documents == make()
    assert documents != make(seed=1)
    for document in documents:
        assert document["prompt"].count(document["target"]) == 1
        assert len(document["target"]) == 5


def test_a_key_stands_where_its_part_says():
    for document in generated.passkey_documents(n=1):
        length, position = document["part"].split(" chars, ")
        text, question = document["prompt"].split("\n\n")
        assert int(length) - 70 <= len(text) - len(" Remember that the pass key is 12345.") <= int(length)
        assert "pass key" in question
        # A sentence of the filler has at most 64 characters.
        place = text.index("Remember") / (len(text) - len("Remember that the pass key is 12345."))
        assert place == pytest.approx(float(position), abs=65 / int(length))


def test_the_asked_line_stands_where_its_part_says():
    for document in generated.lines_documents(n=1):
        n, position = document["part"].split(" lines, ")
        lines = document["prompt"].split("\n\n")[1].split("\n")
        assert len(lines) == len({line.rsplit(" ", 1)[0] for line in lines}) == int(n)
        question = document["prompt"].split("\n\n")[2]
        (place,) = (i for i, line in enumerate(lines) if line.startswith(question + " "))
        assert place == round(float(position) * (int(n) - 1))


@pytest.mark.parametrize("make", [generated.passkey_documents, generated.lines_documents])
def test_the_embedded_models_can_read_the_made_documents_whole(make):
    tokenizer = ModelRef("zoo/micro-llama").tokenizer()
    longest = max(len(tokenizer(document["prompt"]).input_ids) for document in make())
    assert longest <= 512 - 12


def test_lengths_and_number_of_made_documents_are_options_of_the_data_set():
    task = MANAGER._factory.build(
        MANAGER.task_index["stdlib_passkey"],
        overrides={"dataset_kwargs": {"lengths": [300], "n": 1}},
        registry=MANAGER.task_index,
    )
    assert parts(task) == [f"300 chars, {p}" for p in POSITIONS]


def test_only_the_first_number_counts():
    row = {"target": "2416"}
    for said, right in [
        ("The number is <2416>.", 1),
        ("2416 or 7", 1),
        ("7 or 2416", 0),
        ("24161", 0),
        ("", 0),
    ]:
        assert answers.first_number(row, [said]) == {"exact_match": right}


def test_case_articles_and_punctuation_do_not_count():
    row = {"answers": ["The U.S. Army", "navy"]}
    assert answers.contains_any(row, ["It was, I think, us army."]) == {"contains": 1.0}
    assert answers.contains_all(row, ["It was, I think, us army."]) == {"contains": 0.0}
    assert answers.contains_all(row, ["NAVY and a U.S. army"]) == {"contains": 1.0}


def test_the_nearest_accepted_answer_counts():
    row = {"answers": {"text": ["Rome", "the city of Rome"]}}
    assert spans.span_match(row, ["A city of Rome!"]) == {"exact_match": 1.0, "f1": 1.0}
    # Two words of two and three are common: 2 * 2 / (2 + 3).
    assert spans.span_match(row, ["of Rome"]) == {"exact_match": 0.0, "f1": pytest.approx(0.8)}
    assert spans.span_match(row, [""]) == {"exact_match": 0.0, "f1": 0.0}


def test_rouge_counts_words_pairs_and_the_longest_common_subsequence():
    found = summaries.rouge({"summary": "the police killed the gunman"}, ["The gunman police killed"])
    # Four of five words; two of four pairs, of three said; "the police killed" in order.
    assert found == pytest.approx({"rouge1": 8 / 9, "rouge2": 4 / 7, "rougeL": 6 / 9})


def test_helm_prompts_are_taken_off_the_article():
    framed = "###\nArticle: Rain fell.\n\nSummarize the above article in 1 sentence.\n"
    (document,) = build("xsum", [{"article": framed, "summary_gt": "Rain"}]).eval_docs
    assert document == {"document": "Rain fell.", "summary": "Rain"}
    with pytest.raises(ValueError, match="begins with 'Rain fell', HELM's prompt begins"):
        build("xsum", [{"article": "Rain fell", "summary_gt": "Rain"}])
