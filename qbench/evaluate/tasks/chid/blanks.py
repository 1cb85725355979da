"""ChID's passages, one document for each blank.

The other blanks of the passage hold their own idioms, so that the text on either side reads as it was written.
"""

import re
from collections.abc import Iterator
from itertools import chain, zip_longest
from typing import Any

from datasets import Dataset

_BLANK = re.compile(r"#idiom\d+#")


def one_per_blank(rows: Dataset) -> Dataset:
    """`{"before", "choices", "label"}`; a choice is an idiom with the rest of the passage."""
    return Dataset.from_list([document for row in rows for document in _documents(row)])


def _documents(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    candidates, labels = row["candidates"], row["answers"]["candidate_id"]
    n_blanks = sum(len(_BLANK.findall(passage)) for passage in row["content"])
    if n_blanks != len(labels):
        raise ValueError(
            f"a ChID row has {n_blanks} blanks and {len(labels)} answers, one for each is needed; "
            "its test split has no answers, evaluate on validation"
        )
    remaining = iter(labels)
    for passage in row["content"]:
        pieces = _BLANK.split(passage)
        here = [next(remaining) for _ in pieces[1:]]
        idioms = [candidates[label] for label in here]
        for i, label in enumerate(here):
            after = _fill(pieces[i + 1 :], idioms[i + 1 :])
            yield {
                "before": _fill(pieces[: i + 1], idioms[:i]),
                "choices": [candidate + after for candidate in candidates],
                "label": label,
            }


def _fill(pieces: list[str], idioms: list[str]) -> str:
    return "".join(chain.from_iterable(zip_longest(pieces, idioms, fillvalue="")))
