"""Questions made of held-out standard-library text, for the two embedded lm-eval tasks.

`stdlib_cloze`: which of four passages goes on from this one? Three come from other packages.
`stdlib_copy`: finish an identifier whose only possible ending stands earlier in the context.
"""

import random
import re
from collections.abc import Iterator
from typing import Any

from qbench.zoo import stdlib

_CONTEXT, _CONTINUATION = 24, 10  # words
_LOOK_BACK = 600  # characters of code before the identifier
_SNAKE_CASE = re.compile(r"\b(_*[A-Za-z]{3,})(_[A-Za-z]\w{2,})\b")


def cloze(n: int = 120, seed: int = 0) -> list[dict[str, Any]]:
    """`{"context", "choices", "label", "module"}`; the right choice is at a random place."""
    rng = random.Random(seed)
    passages = [
        (module, words)
        for module, text in stdlib.load("stdlib_docs", "test").documents
        for words in (paragraph.split() for paragraph in text.split("\n\n"))
        if len(words) >= _CONTEXT + _CONTINUATION
    ]
    rng.shuffle(passages)

    def continuation(words: list[str]) -> str:
        return " ".join(words[_CONTEXT : _CONTEXT + _CONTINUATION])

    items = []
    for module, words in passages[:n]:
        others = [w for m, w in passages if m.split(".")[0] != module.split(".")[0]]
        wrong = [continuation(w) for w in rng.sample(others, 3)]
        label = rng.randrange(4)
        choices = [*wrong[:label], continuation(words), *wrong[label:]]
        context = " ".join(words[:_CONTEXT])
        items.append({"context": context, "choices": choices, "label": label, "module": module})
    return items


def copying(n: int = 80, seed: int = 0) -> list[dict[str, Any]]:
    """`{"context", "target", "module"}`; the context ends before an underscore inside an identifier.

    The identifier stands on an earlier line of the context, and no other there begins like it, so that
    whoever can copy knows the answer. Byte-level tokenizers cut at underscores, so the question is
    asked at a boundary of tokens.
    """
    documents = stdlib.load("stdlib_code", "test").documents
    items = [item | {"module": module} for module, text in documents for item in _copies(text)]
    random.Random(seed).shuffle(items)
    return items[:n]


def _copies(text: str) -> Iterator[dict[str, str]]:
    asked: set[str] = set()
    for match in _SNAKE_CASE.finditer(text):
        start, ending = match.groups()
        context = text[max(0, match.start() - _LOOK_BACK) : match.end(1)]
        earlier = context[: context.rfind("\n") + 1]
        endings = set(re.findall(rf"\b{start}(_\w+)", earlier))
        if endings == {ending} and match.group() not in asked:
            asked.add(match.group())
            yield {"context": context, "target": ending}
