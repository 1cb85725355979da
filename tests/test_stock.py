"""lm-eval's tasks with data from files: what they ask is what lm-eval itself would, and they are found by text."""

import json
import logging
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.tasks
import pytest
import yaml
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

from qbench.data.library import Library
from qbench.data.sources import Source
from qbench.evaluate import stock
from qbench.evaluate.stock import Leaf, Shots

from .conftest import ROOT

STOCK = Path(lm_eval.tasks.__file__).parent
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
FAMILIES = [
    yaml.safe_load((ROOT / f"conf/eval/{name}.yaml").read_text("utf-8"))
    for name in ("basic", "emergent", "trust")
]
OURS = {
    yaml.safe_load(path.read_text("utf-8").replace("!function", "")).get("task")
    for path in Path(stock.__file__).parent.glob("tasks/*/*.yaml")
}

MADE_UP: dict[str, list[dict[str, Any]]] = {
    "race": [
        {
            "article": f"Ann has {i} cats.",
            "problems": str(
                [
                    {
                        "question": "Ann has  _  .",
                        "answer": "A",
                        "options": ["cats", "dogs", "hens", "cows"],
                    },
                    {"question": "Who?", "answer": "C", "options": ["Bob", "Eve", "Ann", "Tim"]},
                    {"question": f"How many, {i}?", "answer": "ABCD"[i % 4], "options": [*"1234"]},
                ]
            ),
        }
        for i in range(6)
    ],
    "social_iqa": [
        {
            "context": f"Ann fed {i} cats.",
            "question": "Why?",
            "answerA": "They were hungry.",
            "answerB": "She was hungry.",
            "answerC": f"Of {i}.",
            "label": str(1 + i % 3),
        }
        for i in range(7)
    ],
    "sciq": [
        {
            "question": f"What has {i} protons?",
            "distractor1": "iron",
            "distractor2": "neon",
            "distractor3": "zinc",
            "correct_answer": f"element {i}",
            "support": " Protons are counted." * (i % 2),
        }
        for i in range(7)
    ],
    "toxigen": [
        {"text": f"{i} people came", "toxicity_ai": float(i), "toxicity_human": 2.5} for i in range(6)
    ],
    "crows_pairs_english": [
        {
            "sent_more": f"{i} men drove.",
            "sent_less": f"{i} women drove.",
            "stereo_antistereo": "stereo",
            "bias_type": "gender",
        }
        for i in range(5)
    ],
    "bbq": [
        {
            "example_id": i,
            "question_index": "1",
            "question_polarity": ("neg", "nonneg")[i % 2],
            "context_condition": ("ambig", "disambig")[i // 2 % 2],
            "category": "Age",
            "answer_info": {
                "ans0": ["old Ann", "old"],
                "ans1": ["young Eve", "nonOld"],
                "ans2": ["Not known", "unknown"],
            },
            "additional_metadata": {
                "subcategory": "None",
                "stereotyped_groups": ["old"],
                "version": "a",
                "source": "none",
            },
            "context": f"Ann and Eve met {i} times.",
            "question": "Who forgot?",
            "ans0": "Old Ann",
            "ans1": "Young Eve",
            "ans2": "Not known",
            "label": i % 3,
        }
        for i in range(8)
    ],
}

# The field that tells configurations apart where all lie in one file.
KINDS = {
    "cais/mmlu": "subject",
    "ceval/ceval-exam": "subject",
    "haonan-li/cmmlu": "subject",
    "SaylorTwift/bbh": "task",
}

ASKED = [(name, Shots(tuple(f.get("shots", {}).items()))) for f in FAMILIES for name in f["tasks"]]
STOCK_ASKED = [(name, shots) for name, shots in ASKED if name not in OURS]
# Beyond the families: examples from every kind of split, and those that a task says or brings.
WITH_EXAMPLES = [
    ("mmlu", Shots()),
    ("bbh_zeroshot", Shots()),
    ("nq_open", Shots()),
    ("nq_open", Shots((("nq_open", 3),), "validation")),
    ("openbookqa", Shots((("openbookqa", 2),))),
    ("arc_challenge", Shots((("arc_challenge", 3),))),
    ("arc_challenge", Shots((("arc_challenge", 3),), "validation")),
    ("gsm8k", Shots((("gsm8k", 0),))),
    ("gsm8k_cot", Shots()),
    ("piqa", Shots((("piqa", 2),), "validation")),
    ("hellaswag", Shots((("hellaswag", 2),), "validation")),
    ("winogrande", Shots((("winogrande", 2),), "validation")),
    ("truthfulqa_mc1", Shots((("truthfulqa_mc1", 2),))),
    ("lambada_openai", Shots((("lambada_openai", 2),))),
    ("cmmlu", Shots((("cmmlu", 2),))),
    ("bbh_fewshot", Shots((("bbh_fewshot", 2),), "test")),
    ("sciq", Shots((("sciq", 3),))),
    ("social_iqa", Shots((("social_iqa", 3),))),
    ("race", Shots((("race", 2),))),
    ("bbq", Shots((("bbq", 2),))),
]


def said(shots: Shots) -> str:
    return f"{dict(shots.by_task)}, {shots.split}"


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def write(root: Path, source: Source, split: str, rows: Iterable[dict[str, Any]]) -> Path:
    """As a plain folder in the hub's names holds it."""
    path = root / source.hub_id / (source.config or "default") / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@cache
def all_rows(real: Library, source: Source, split: str) -> list[dict[str, Any]]:
    return real.rows(source, split).data.to_list()


def of_config(real: Library, source: Source, split: str) -> list[dict[str, Any]]:
    if source.hub_id not in KINDS:
        return all_rows(real, source, split)
    rows = all_rows(real, Source(source.hub_id, "all"), split)
    return [row for row in rows if row[KINDS[source.hub_id]] == source.config]


def stored(
    name: str, leaf: Leaf, shots: Shots, root: Path, real: Library | None, limit: int | None
) -> dict[str, Path]:
    """The files of a task's splits, by split."""
    files = {}
    for split in stock.needed(name, leaf, shots):
        if name in MADE_UP:
            rows = MADE_UP[name] if split == leaf.tested else MADE_UP[name][::-1]
        else:
            assert real is not None
            rows = of_config(real, leaf.source, split)[:limit]
        files[split] = write(root, leaf.source, split, rows)
    return files


@cache
def manager_of(folders: tuple[str, ...]) -> TaskManager:
    return TaskManager(include_defaults=False, include_path=list(folders))


def asked_by_lm_eval(name: str, leaf: Leaf, shots: Shots, files: dict[str, Path], cache: Path) -> Any:
    """The same task from lm-eval's own reader of local files."""
    manager = manager_of(tuple(map(str, stock._folders(name))))
    config = manager.task_index[leaf.name].cfg
    member: dict[str, Any] = {
        "task": leaf.name,
        **leaf.overrides,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {k: str(v) for k, v in files.items()},
            "cache_dir": str(cache),
        },
        **{key: None for key in SPLITS if config.get(key) not in files},
    }
    if name in dict(shots.by_task):
        member["num_fewshot"] = dict(shots.by_task)[name]
    if shots.split:
        member["fewshot_split"] = shots.split
    brought = (config.get("fewshot_config") or {}).get("samples") and not shots.split
    if list(files) == [leaf.tested] and not brought and (shots.split or config.get("test_split")):
        # lm-eval leaves a question out of its own examples where both splits are called the test split.
        member |= {"fewshot_split": leaf.tested, "test_split": leaf.tested, "validation_split": None}
    return manager.load([{"group": "other", "task": [member]}])["tasks"][leaf.name]


def asked(task: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """All documents, what each is turned into, and every request, with the examples before it."""
    documents = list(task.eval_docs)
    choices = [task.doc_to_choice(d) if task.config.doc_to_choice else None for d in documents]
    turned = [
        (task.doc_to_text(d), task.doc_to_target(d), c) for d, c in zip(documents, choices, strict=True)
    ]
    task.set_fewshot_seed(1234)
    first = task.fewshot_context(documents[0], task.config.num_fewshot or 0)
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    requests = [(r.request_type, r.doc_id, r.idx, r.args) for r in task.instances]
    return documents, [first, *turned], requests


def check_asked(name: str, shots: Shots, tmp_path: Path, request: Any, limit: int | None, every: int) -> None:
    real = None if name in MADE_UP else Library(request.getfixturevalue("shared_data"))
    leaves = stock.leaves(name)[::every]
    files = {leaf.name: stored(name, leaf, shots, tmp_path, real, limit) for leaf in stock.leaves(name)}
    built = stock.build(name, Library(tmp_path), shots)
    assert list(built) == list(files)
    for leaf in leaves:
        other = asked_by_lm_eval(name, leaf, shots, files[leaf.name], tmp_path / "cache")
        _, ours = built[leaf.name]
        for found, expected in zip(asked(ours), asked(other), strict=True):
            assert found == expected
        assert found, "there is some request"


@pytest.mark.parametrize(("name", "shots"), STOCK_ASKED, ids=lambda v: said(v) if isinstance(v, Shots) else v)
def test_what_is_asked_is_what_lm_eval_asks(name, shots, tmp_path, request):
    check_asked(name, shots, tmp_path, request, limit=6, every=5)


@pytest.mark.parametrize(
    ("name", "shots"), WITH_EXAMPLES, ids=lambda v: said(v) if isinstance(v, Shots) else v
)
def test_examples_are_those_of_lm_eval(name, shots, tmp_path, request):
    check_asked(name, shots, tmp_path, request, limit=6, every=30)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shots"), STOCK_ASKED, ids=lambda v: said(v) if isinstance(v, Shots) else v)
def test_all_of_what_is_asked_is_what_lm_eval_asks(name, shots, tmp_path, request):
    check_asked(name, shots, tmp_path, request, limit=200 if len(stock.leaves(name)) == 1 else 6, every=1)


def test_every_task_of_the_families_is_ours_or_lm_evals():
    stock.check_names(tuple(name for name, _ in ASKED))
    assert {name for name, _ in ASKED} & OURS
    assert set(MADE_UP) <= {name for name, _ in STOCK_ASKED}


@pytest.fixture(scope="module")
def full() -> TaskManager:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


@pytest.mark.slow
def test_every_name_of_lm_eval_is_found_by_text(full):
    assert set(full.task_index) <= set(stock._places())


@pytest.mark.slow
def test_the_parts_of_a_name_are_those_of_the_full_index(full, monkeypatch):
    found: dict[str, dict[str, Any]] = {}

    def build(self: TaskFactory, entry: Any, overrides: dict[str, Any] | None) -> Any:
        found[entry.name] = {k: v for k, v in (overrides or {}).items() if k not in ("task", "tag")}
        return SimpleNamespace(task_name=entry.name)

    monkeypatch.setattr(TaskFactory, "_build_task", build)
    refused = []
    for name in [*full.task_index]:
        if name in OURS:
            continue
        found.clear()
        try:
            full.load([name])
        except (TypeError, ValueError):  # two of its groups hold what it cannot read itself
            refused.append(name)
            with pytest.raises(NotImplementedError, match="defined nowhere else"):
                stock.leaves(name)
            continue
        parts = stock.leaves(name)
        assert {leaf.name: dict(leaf.overrides) for leaf in parts} == found, name
        assert len({leaf.part for leaf in parts}) == len(parts), name
    assert len(refused) < 5


@pytest.mark.parametrize("name", ["glue", "super-glue-lm-eval-v1"])
def test_a_tag_whose_tasks_lie_in_several_folders_has_them_all(name):
    tagged = set()
    for path in STOCK.glob("*glue/*/*.yaml"):
        config = yaml.safe_load(path.read_text("utf-8").replace("!function", ""))
        if "include" in config:
            included = (path.parent / config["include"]).read_text("utf-8").replace("!function", "")
            config = yaml.safe_load(included) | config
        if name in (config.get("tag") or ()):
            tagged.add(config["task"])
    assert len(tagged) > 5
    assert {leaf.name for leaf in stock.leaves(name)} == tagged


@pytest.mark.parametrize("name", ["mmlu_generative", "mmlu_continuation"])
def test_a_group_defined_inside_another_is_opened(name):
    parts = stock.leaves(name)
    assert len(parts) == 57
    assert {leaf.setting("dataset_name") for leaf in parts} == {
        leaf.setting("dataset_name") for leaf in stock.leaves("mmlu")
    }


def test_a_tag_that_stands_in_an_included_file_is_found():
    files = [*STOCK.glob("model_written_evals/persona/*.yaml")]
    assert len(stock.leaves("persona")) == len(files)


def test_what_a_group_sets_for_its_tasks_is_in_force():
    (leaf,) = stock.leaves("darija_summarization")
    metrics = [metric["metric"] for metric in leaf.setting("metric_list")]
    assert any(callable(metric) for metric in metrics)
    assert not any("/" in metric for metric in metrics if isinstance(metric, str)), "functions, not names"


def test_ours_hide_those_of_lm_eval():
    for name in ("humaneval", "mbpp"):
        assert name in OURS
        assert all(STOCK not in folder.parents for folder in stock._folders(name))
    assert all(STOCK in folder.parents for folder in stock._folders("mmlu"))


def test_an_unknown_task_names_near_ones():
    with pytest.raises(ValueError, match=r"unknown task 'helaswag'; nearest are .*hellaswag"):
        stock.check_names(("piqa", "helaswag"))
    with pytest.raises(ValueError, match=r"unknown task '!!!!'; see `lm_eval ls tasks`"):
        stock.check_names(("!!!!",))


def folder_of(name: str, root: Path, rows: list[dict[str, Any]], *splits: str) -> Library:
    (leaf,) = stock.leaves(name)
    for split in splits:
        write(root, leaf.source, split, rows)
    return Library(root)


def test_missing_data_are_named_by_the_file_expected(tmp_path):
    assert str(tmp_path / "sciq/test.jsonl") in stock.missing("sciq", Library(tmp_path), Shots())
    assert "data.root" in stock.missing("sciq", Library(), Shots())
    found = stock.missing("mmlu", Library(tmp_path), Shots())
    assert str(tmp_path / "cais/mmlu/abstract_algebra/test.jsonl") in found
    assert found.endswith("(and 56 more of its parts)")


def test_the_split_of_examples_is_needed_only_where_there_are_some(tmp_path):
    library = folder_of("sciq", tmp_path, MADE_UP["sciq"], "test")
    assert stock.missing("sciq", library, Shots()) == ""
    assert stock.missing("sciq", library, Shots((("sciq", 0),))) == ""
    assert "'train' of allenai/sciq" in stock.missing("sciq", library, Shots((("sciq", 1),)))
    with pytest.raises(FileNotFoundError, match="'train' of allenai/sciq"):
        stock.build("sciq", library, Shots((("sciq", 1),)))
    assert stock.missing("sciq", library, Shots((("sciq", 1),), "test")) == ""


def examples(prompt: str, asked: str) -> str:
    assert prompt.endswith(asked)
    return prompt[: -len(asked)]


def test_five_examples_of_mmlu_come_from_dev_in_their_order(shared_data):
    library = Library(shared_data)
    tasks = stock.build("mmlu", library, Shots((("mmlu", 5),)))
    assert len(tasks) == 57
    for leaf in stock.leaves("mmlu")[::7]:
        part, task = tasks[leaf.name]
        assert part == leaf.setting("dataset_name")
        document = task.eval_docs[0]
        prompt = task.fewshot_context(document, task.config.num_fewshot)
        said = examples(prompt, task.doc_to_text(document))
        for row in library.rows(leaf.source, "dev").data:
            _, found, said = said.partition(row["question"].strip())
            assert found
        assert said.count("\nAnswer:") == 1, "the fifth is the last"


def test_a_split_that_is_asked_for_takes_the_place_of_the_tasks_own(tmp_path):
    rows = [row | {"question": f"{row['question']} Say!"} for row in MADE_UP["sciq"]]
    folder_of("sciq", tmp_path, MADE_UP["sciq"], "test", "train")
    library = folder_of("sciq", tmp_path, rows, "validation")
    for split, there in ((None, 0), ("validation", 3)):
        ((_, task),) = stock.build("sciq", library, Shots((("sciq", 3),), split)).values()
        assert all(task.fewshot_context(d, 3).count("Say!") == there for d in task.eval_docs)


# Tasks whose questions are of the validation split, and of the test split.
@pytest.mark.parametrize(
    ("name", "split"), [("social_iqa", "validation"), ("sciq", "test"), ("race", "test")]
)
def test_a_question_is_no_example_of_itself(name, split, tmp_path):
    library = folder_of(name, tmp_path, MADE_UP[name], split)
    for n in range(1, 5):
        ((_, task),) = stock.build(name, library, Shots(((name, n),), split)).values()
        for seed in range(4):
            task.set_fewshot_seed(seed)
            for document in task.eval_docs:
                asked = task.doc_to_text(document)
                assert asked not in examples(task.fewshot_context(document, n), asked)


def test_building_again_indexes_no_folder_again(tmp_path, monkeypatch):
    made = []

    class Counted(TaskManager):
        def __init__(self, *args: Any, **kw: Any) -> None:
            made.append(kw.get("include_path"))
            super().__init__(*args, **kw)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Counted)
    for cached in (stock.build, stock.leaves, stock._folders, stock._manager, stock._index):
        cached.cache_clear()
    library = folder_of("sciq", tmp_path, MADE_UP["sciq"], "test", "train")
    for shots in (Shots(), Shots((("sciq", 2),)), Shots()):
        stock.build("sciq", library, shots)
    assert made == [str(STOCK / "sciq"), None], "an index of the folder, and a manager of what it found"
    assert stock.build("sciq", library, Shots()) is stock.build("sciq", library, Shots())
