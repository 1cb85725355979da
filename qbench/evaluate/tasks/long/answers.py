"""Is the answer in what the model said?"""

import re
import string
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"\d+")


def first_number(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the first number said is the one asked for."""
    number = _NUMBER.search(results[0])
    return {"exact_match": float(number is not None and number[0] == row["target"])}


def contains_any(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether one of the accepted answers was said, but for case, punctuation and articles."""
    return {"contains": float(any(_said(answer, results[0]) for answer in row["answers"]))}


def contains_all(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether all that was asked for was said, but for case, punctuation and articles."""
    return {"contains": float(all(_said(answer, results[0]) for answer in row["answers"]))}


def _said(answer: str, text: str) -> bool:
    said = _normalized(answer) or answer.lower()  # "The" is an answer too
    return said in (_normalized(text) if _normalized(answer) else text.lower())


def _normalized(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())
