"""Proposed answers to MMLU's questions, about half of them right.

A row's own text decides what is proposed, so that every model and every run judges the same.
"""

import hashlib
from typing import Any

from datasets import Dataset

_LETTERS = "ABCD"


def proposed_answers(rows: Dataset) -> Dataset:
    """`{"question", "options", "proposal", "label", "part"}`; the label is 0 where the proposal is right."""
    return Dataset.from_list([_document(row) for row in rows])


def _document(row: dict[str, Any]) -> dict[str, Any]:
    choices = row["choices"]
    options = [f"({letter}) {choice}" for letter, choice in zip(_LETTERS, choices, strict=True)]
    right = _index(row["answer"])
    digest = hashlib.sha256("\n".join([row["question"], *choices]).encode()).digest()
    # Another byte says which, so that a wrong proposal is any of the three alike.
    step = 0 if digest[0] % 2 == 0 else 1 + int.from_bytes(digest[1:9], "big") % (len(choices) - 1)
    return {
        "question": row["question"].strip(),
        "options": "\n".join(options),
        "proposal": options[(right + step) % len(choices)],
        "label": int(step != 0),
        "part": row["subject"],
    }


def _index(answer: int | str) -> int:
    """The place of the right answer, which some copies write as a letter or as text."""
    return _LETTERS.index(answer) if answer in list(_LETTERS) else int(answer)
