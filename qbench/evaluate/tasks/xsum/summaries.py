"""XSum's rows, from the hub or with HELM's prompt around the article, and ROUGE of each summary."""

import re
from functools import cache
from typing import Any

from datasets import Dataset

_HELM = re.compile(r"^###\nArticle: (.*?)\n\nSummarize the above article in 1 sentence\.\n$", re.DOTALL)
_METRICS = ("rouge1", "rouge2", "rougeL")


def articles(rows: Dataset) -> Dataset:
    """`{"document", "summary"}`."""
    return Dataset.from_list([_document(row) for row in rows])


def _document(row: dict[str, Any]) -> dict[str, str]:
    if "document" in row:
        return {"document": row["document"].strip(), "summary": row["summary"].strip()}
    framed = _HELM.match(row["article"])
    if framed is None:
        raise ValueError(
            f"an article begins with {row['article'][:20]!r}, HELM's prompt begins with '###\\nArticle: '; "
            "give the bare article as `document` and its summary as `summary`"
        )
    return {"document": framed[1].strip(), "summary": row["summary_gt"].strip()}


def rouge(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """F-measure, between 0 and 1, of Porter-stemmed words (Lin, "ROUGE", 2004)."""
    scores = _scorer().score(row["summary"], results[0])
    return {metric: scores[metric].fmeasure for metric in _METRICS}


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    return RougeScorer(_METRICS, use_stemmer=True)
