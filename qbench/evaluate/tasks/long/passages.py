"""Lost in the Middle's questions: the passage that answers, among others that do not.

The paper's distractors come from a retriever; these are passages that answer other questions, so they are
easier to tell apart, and only the position of the answer should be compared, not the level.
"""

import random
from itertools import islice
from typing import Any

from datasets import Dataset

from qbench.errors import UsageError

Row = dict[str, Any]

N_DOCUMENTS = 10
POSITIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


def among_distractors(rows: Dataset) -> Dataset:
    """`{"passages", "question", "answers", "part"}`; the answer's position cycles from row to row.

    Raises:
        UsageError: If the rows hold too few passages that do not answer a question.
    """
    gold = [next(passage for passage in row["ctxs"] if passage["isgold"]) for row in rows]
    shuffled = random.Random(0).sample(gold, len(gold))
    return Dataset.from_list(
        [
            _document(row, passage, shuffled[i:] + shuffled[:i], POSITIONS[i % len(POSITIONS)])
            for i, (row, passage) in enumerate(zip(rows, gold, strict=True))
        ]
    )


def _document(row: Row, gold: Row, others: list[Row], position: float) -> Row:
    silent = (passage for passage in others if not _answers(passage, row, gold))
    passages = list(islice(silent, N_DOCUMENTS - 1))
    if len(passages) < N_DOCUMENTS - 1:
        raise UsageError(
            f"{len(passages)} passages do not answer {row['question']!r}, {N_DOCUMENTS - 1} are needed around "
            "the one that does; give more rows"
        )
    passages.insert(round(position * (N_DOCUMENTS - 1)), gold)
    numbered = (f"[{i}] {p['title']}: {p['text'].strip()}" for i, p in enumerate(passages, start=1))
    return {
        "passages": "\n".join(numbered),
        "question": row["question"].strip(),
        "answers": row["answers"],
        "part": f"{N_DOCUMENTS} documents, {position:g}",
    }


def _answers(passage: Row, row: Row, gold: Row) -> bool:
    text = f"{passage['title']} {passage['text']}".lower()
    return passage["title"] == gold["title"] or any(answer.lower() in text for answer in row["answers"])
