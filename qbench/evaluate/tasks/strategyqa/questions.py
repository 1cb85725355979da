"""StrategyQA's rows, as BIG-bench's repository writes them and as the hub does."""

import re
from typing import Any

from datasets import Dataset

# The hub's inputs already hold BIG-bench's own prompt around the question.
_FRAME = re.compile(r"^\s*Q:\s*|\s*A:\s*$")


def yes_or_no(rows: Dataset) -> Dataset:
    """`{"question", "label"}`; the label is 0 for yes and 1 for no."""
    return Dataset.from_list([_document(row) for row in rows])


def _document(row: dict[str, Any]) -> dict[str, Any]:
    if "target_scores" in row:
        question, scores = row["input"], row["target_scores"]
    else:
        question = row["inputs"]
        scores = dict(zip(row["multiple_choice_targets"], row["multiple_choice_scores"], strict=True))
    return {"question": _FRAME.sub("", question).strip(), "label": int(scores["No"] > scores["Yes"])}
