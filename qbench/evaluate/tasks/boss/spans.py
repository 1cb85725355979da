"""Answers that are spans of a passage, scored as SQuAD scores them (arXiv:1606.05250)."""

import re
import string
from collections import Counter
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def span_match(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match and token F1 against the nearest of the accepted answers."""
    said = _words(results[0])
    accepted = [_words(answer) for answer in row["answers"]["text"]]
    return {
        "exact_match": float(any(said == answer for answer in accepted)),
        "f1": max(_f1(said, answer) for answer in accepted),
    }


def _f1(said: list[str], answer: list[str]) -> float:
    if not said or not answer:
        return float(said == answer)
    common = sum((Counter(said) & Counter(answer)).values())
    return 2 * common / (len(said) + len(answer))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
