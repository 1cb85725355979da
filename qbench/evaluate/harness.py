"""Accuracy through lm-eval: stock tasks as they are, and the two embedded ones.

lm-eval renders prompts, runs requests and scores each document; standard errors are ours, from the
documents, since its own bootstrap starts a pool of processes.
"""

import difflib
import math
from functools import cache
from typing import Any

from qbench.evaluate.result import NOTHING, Evaluation
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
_DOCUMENTS = {"stdlib_cloze": embedded.cloze, "stdlib_copy": embedded.copying}


def check_names(names: tuple[str, ...]) -> None:
    """Refuse a task that neither qbench nor lm-eval has; slow (seconds) where a stock task is named.

    Raises:
        ValueError: Naming the nearest tasks.
    """
    for name in names:
        if name not in EMBEDDED and name not in (stock := _manager().all_tasks):
            near = difflib.get_close_matches(name, [*EMBEDDED, *stock], n=3)
            raise ValueError(
                f"unknown task {name!r}; "
                + (f"nearest are {', '.join(near)}" if near else "see `lm_eval ls tasks`")
            )


@cache
def _manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(verbosity="ERROR")


def prepare(names: tuple[str, ...]) -> None:
    """Build the named tasks, which reads their data."""
    for name in names:
        _task(name)


@cache
def _task(name: str) -> dict[str, Any]:
    """The lm-eval task objects behind a name; building them reads the data, so they are kept."""
    if name not in EMBEDDED:
        return dict(_manager().load([name])["tasks"])
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    documents = Dataset.from_list(_DOCUMENTS[name]())
    config = {"task": name, "custom_dataset": lambda **_: {"test": documents}, "test_split": "test"}
    return {name: ConfigurableTask(config=config | EMBEDDED[name])}


def accuracy(
    model: Any, tokenizer: Any, names: tuple[str, ...], *, limit: int | None = None, batch_size: int = 8
) -> Evaluation:
    """Every metric of the named tasks that is a mean over documents, with its standard error.

    Metrics are named `acc/<task>`, `acc_norm/<task>`, `exact_match/<task>`, …; with the filter behind the
    metric where a task has several (`exact_match-strict-match/gsm8k`).
    """
    if not names:
        return NOTHING
    from lm_eval import evaluate

    tasks = {key: task for name in names for key, task in _task(name).items()}
    results = evaluate(
        _language_model(model, tokenizer, batch_size),
        {"tasks": tasks}, limit=limit, bootstrap_iters=0, verbosity="ERROR",
    )  # fmt: skip
    evaluation = NOTHING
    for name, documents in results["samples"].items():
        for metric, filter_ in _means(tasks[name], documents):
            values = [(d["doc_id"], float(d[metric])) for d in documents if d["filter"] == filter_]
            if name in EMBEDDED:
                label = "acc"
            elif len({d["filter"] for d in documents}) > 1:
                label = f"{metric}-{filter_}"
            else:
                label = metric
            evaluation += _mean(f"{label}/{name}", values)
    return evaluation


def _means(task: Any, documents: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The (metric, filter) pairs that are means over documents; others cannot be made from single documents."""
    aggregation = task.aggregation()
    return [
        (metric, filter_)
        for filter_ in dict.fromkeys(d["filter"] for d in documents)
        for metric in documents[0]["metrics"]
        if getattr(aggregation.get(metric), "__name__", "") == "mean"
    ]


def _language_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Quiet(HFLM):
        """lm-eval's model without its own progress bars, which it shows whatever the environment says."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    return Quiet(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")


def _mean(key: str, values: list[tuple[int, float]]) -> Evaluation:
    n = len(values)
    mean = sum(v for _, v in values) / n
    variance = sum((v - mean) ** 2 for _, v in values) / max(1, n - 1)
    samples = [{"metric": key, "item": item, "value": float(value)} for item, value in values]
    return Evaluation({key: float(mean), f"{key}_stderr": math.sqrt(variance / n)}, samples)
