"""Accuracy through lm-eval: its own tasks as they are, ours, and the embedded ones.

lm-eval renders prompts, runs requests and scores each document; standard errors are ours, from the
documents, since its own bootstrap starts a pool of processes.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch

from qbench.data.corpora import load_text
from qbench.data.library import Library
from qbench.data.overlap import Signature, signature
from qbench.evaluate import stock
from qbench.evaluate.language_model import language_model, texts_of
from qbench.evaluate.result import NOTHING, Evaluation, mean
from qbench.evaluate.stock import Shots
from qbench.zoo import tasks as embedded

# `scored` is the lm-eval metric that these tasks call accuracy: for the multiple choice it is the choice whose
# probability the context raises most (pointwise mutual information, Holtzman et al., arXiv:2104.08315), since
# plain likelihood mostly says which passage has the commoner words.
EMBEDDED: dict[str, dict[str, Any]] = {
    "stdlib_cloze": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc_mutual_info", "aggregation": "mean", "higher_is_better": True}],
    },
    "stdlib_copy": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {
                "name": "rest_of_identifier",
                "filter": [{"function": "regex", "regex_pattern": r"^(\w+)"}, {"function": "take_first"}],
            }
        ],
    },
}
EMBEDDED["stdlib_recall"] = EMBEDDED["stdlib_copy"]
_DOCUMENTS = {
    "stdlib_cloze": embedded.cloze, "stdlib_copy": embedded.copying, "stdlib_recall": embedded.recalling,
}  # fmt: skip
_SEED = 1234  # of examples: lm-eval's own
_LONG = 40  # characters: shorter texts are set phrases and answers
_ON_CPU = 32  # lm-eval finds the largest batch by running out of memory, which a CPU should not


@dataclass(frozen=True)
class Ask:
    """How tasks are run.

    Attributes:
        limit: Documents of a task, the first ones; of a group they are shared out among its parts, at least one each.
        unsafe: Whether code that the model writes may be run.
    """

    limit: int | None = None
    shots: Shots = field(default_factory=Shots)
    unsafe: bool = False


def check_names(names: tuple[str, ...]) -> None:
    """Refuse a task that neither qbench nor lm-eval has.

    Raises:
        ValueError: Naming the nearest tasks.
    """
    stock.check_names(tuple(name for name in names if name not in EMBEDDED))


def missing(name: str, library: Library, shots: Shots) -> str:
    """Which data of a task cannot be found, in words; empty where all is there."""
    return "" if name in EMBEDDED else stock.missing(name, library, shots)


def runs_code(name: str) -> bool:
    """Whether a task runs what the model writes."""
    return name not in EMBEDDED and any(leaf.setting("unsafe_code") for leaf in stock.leaves(name))


@cache
def tasks_of(name: str, library: Library, shots: Shots) -> dict[str, tuple[str, Any]]:
    """The lm-eval task objects behind a name, and the part of it that each is; building them reads the data."""
    if name not in EMBEDDED:
        return stock.build(name, library, shots)
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    documents = Dataset.from_list(_DOCUMENTS[name]())
    config = {"task": name, "custom_dataset": lambda **_: {"test": documents}, "test_split": "test"}
    return {name: ("", ConfigurableTask(config=config | EMBEDDED[name]))}


def origin(name: str, library: Library, shots: Shots) -> dict[str, Any]:
    """Where a task's documents, and examples, were found, and their SHA-256."""
    if name in EMBEDDED:
        text = load_text("stdlib_docs" if name == "stdlib_cloze" else "stdlib_code", "test")
        return {"origin": text.origin, "sha256": text.sha256}
    found = {
        (leaf.source, split): library.rows(leaf.source, split)
        for leaf in stock.leaves(name)
        if leaf.source
        for split in stock.needed(name, leaf, shots)
    }
    places = dict.fromkeys(rows.origin for rows in found.values())
    shown = [*places] if len(places) < 4 else [*list(places)[:2], f"and {len(places) - 2} more"]
    made = [repr(stock.versions()), name]  # of a task that makes its documents
    digests = " ".join([rows.sha256 for rows in found.values()] or made)
    return {"origin": ", ".join(shown) or "made", "sha256": hashlib.sha256(digests.encode()).hexdigest()}


@lru_cache(maxsize=64)
def questions(name: str, library: Library, shots: Shots, tokenizer: Any) -> Signature:
    """The texts in the documents of a task, to look for in calibration text."""
    texts = dict.fromkeys(
        value
        for _, task in tasks_of(name, library, shots).values()
        for document in task.eval_docs
        for value in document.values()
        if isinstance(value, str) and len(value) > _LONG
    )
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids if texts else []
    return signature(torch.tensor(one, dtype=torch.long) for one in ids)


def drops(result: Evaluation) -> Evaluation:
    """The same, with what attacks on a task's documents take away: `drop/<task>` where there is `<task>_clean` too."""
    for key in [k for k in result.metrics if k.startswith("acc/")]:
        if (clean := f"{key}_clean") in result.metrics:
            errors = [result.metrics[f"{k}_stderr"] for k in (key, clean)]
            drop = f"drop/{key.removeprefix('acc/')}"
            metrics = {
                drop: result.metrics[clean] - result.metrics[key],
                f"{drop}_stderr": math.hypot(*errors),
            }
            result += Evaluation(metrics, [])
    return result


class Harness:
    """A model under lm-eval."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | None) -> None:
        size = batch_size or ("auto" if model.device.type == "cuda" else _ON_CPU)
        self.language_model = language_model(model, tokenizer, size)

    def accuracy(self, name: str, library: Library, ask: Ask) -> Evaluation:
        """Every metric of a task that is a mean over documents, with its standard error.

        Metrics are named `acc/<task>`, `acc_norm/<task>`, `exact_match/<task>`, …; with the filter behind the
        metric where a task has several (`exact_match-strict-match/gsm8k`). A sample has its part where the task is a
        group, or its documents name one (a length, a position). `truncated/<task>` is the share of documents of which
        some request was longer than the model reads, where there are such.
        """
        from lm_eval import evaluate

        found = tasks_of(name, library, ask.shots)
        tasks = {key: task for key, (_, task) in found.items()}
        metrics = {metric: how for task in tasks.values() for metric, how in task.aggregation().items()}
        if not any(map(_is_mean, metrics.values())):
            raise NotImplementedError(
                f"task {name!r} has no metric that is a mean over documents, only {', '.join(metrics)}, "
                "which is not covered; perplexity is measured by eval.ppl"
            )
        self.language_model.truncated.clear()
        for task in tasks.values():
            # `evaluate` leaves examples to chance, and a task goes on where the last model's examples ended.
            task.set_fewshot_seed(_SEED)
        results = evaluate(
            self.language_model, {"tasks": tasks}, samples=_chosen(tasks, ask.limit), bootstrap_iters=0,
            verbosity="ERROR", confirm_run_unsafe_code=ask.unsafe,
        )  # fmt: skip
        documents = [(key, d) for key, many in results["samples"].items() for d in many]
        evaluation = self._means(name, found, documents)
        if self.language_model.truncated:
            evaluation += self._truncated(name, documents)
        return evaluation

    def _means(
        self, name: str, found: Mapping[str, tuple[str, Any]], documents: list[tuple[str, Any]]
    ) -> Evaluation:
        together = name in EMBEDDED or not stock.is_tag(name)
        rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
        several = len({d["filter"] for _, d in documents}) > 1
        numbers = _numbers(documents)
        for key, document in documents:
            part, task = found[key]
            for metric in _mean_metrics(task, document):
                label = "acc" if name in EMBEDDED else metric
                label += f"-{document['filter']}" if several else ""
                row: dict[str, Any] = {
                    "item": numbers[key, document["doc_id"]],
                    "value": float(document[metric]),
                }
                if shown := (part if together else "") or str(document["doc"].get("part") or ""):
                    row["part"] = shown
                rows.setdefault((label, name if together else key), []).append(row)
        evaluation = NOTHING
        for (label, shown), items in rows.items():
            over = None if not together or name in EMBEDDED or stock.is_weighted(name) else "part"
            evaluation += mean(f"{label}/{shown}", items, over)
        return evaluation

    def _truncated(self, name: str, documents: list[tuple[str, Any]]) -> Evaluation:
        seen: dict[tuple[str, int], bool] = {}
        for key, document in documents:
            asked = {texts_of(argument) for argument in document["arguments"]}
            seen[key, document["doc_id"]] = bool(asked & self.language_model.truncated)
        share = sum(seen.values()) / len(seen)
        return Evaluation({f"truncated/{name}": share}, [])


def _numbers(documents: list[tuple[str, Any]]) -> dict[tuple[str, int], int]:
    """One number for each document of a group: its own where there is one task, else from its text, for ever the same."""
    keys = dict.fromkeys((key, d["doc_id"]) for key, d in documents)
    if len({key for key, _ in keys}) == 1:
        return {key: key[1] for key in keys}
    return {key: int(hashlib.sha256(f"{key[0]} {key[1]}".encode()).hexdigest()[:15], 16) for key in keys}


def _chosen(tasks: Mapping[str, Any], limit: int | None) -> dict[str, list[int]] | None:
    """Which documents of each task are asked: the first ones, shared out among the tasks."""
    if limit is None:
        return None
    each = math.ceil(limit / len(tasks))
    return {key: list(range(min(each, len(task.eval_docs)))) for key, task in tasks.items()}


def _mean_metrics(task: Any, document: Mapping[str, Any]) -> Iterable[str]:
    """The metrics that are means over documents; others cannot be made from single documents."""
    aggregation = task.aggregation()
    return [m for m in document["metrics"] if _is_mean(aggregation.get(m))]


def _is_mean(aggregation: Any) -> bool:
    return getattr(aggregation, "__name__", "") == "mean"
