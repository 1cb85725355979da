"""Questions made of held-out standard-library text, for the embedded lm-eval tasks.

`stdlib_cloze`: which of four passages goes on from this one? Three come from other packages.
`stdlib_copy`: finish an identifier whose only possible ending stands earlier in the context.
`stdlib_recall`: the same with more and more other code between.
"""

import random
import re
from collections.abc import Iterator
from typing import Any

from qbench.zoo import stdlib

_CONTEXT, _CONTINUATION = 24, 10  # words
_LOOK_BACK = 600  # characters of code before the identifier
_BETWEEN, _QUESTION = (
    (0, 250, 500, 750),
    120,
)  # characters of code between clue and question, and of either at most
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


def recalling(n: int = 200, seed: int = 0) -> list[dict[str, Any]]:
    """`{"context", "target", "part"}`, `part` being how much other code stands between the clue and the question.

    The clue is the line in which the identifier stands; the end of the context is the last line, up to the underscore.
    What is between comes from other packages and has no word that begins like it. All distances ask the same.
    """
    rng = random.Random(seed)
    documents = stdlib.load("stdlib_code", "test").documents
    asked = []
    for item in copying(n=10_000, seed=seed):
        start = re.findall(r"[A-Za-z_]+$", item["context"])[0]
        lines = item["context"].split("\n")
        clue = next(line for line in lines[1:] + lines[:1] if f"{start}{item['target']}" in line)
        if len(lines[-1]) <= _QUESTION and len(clue) <= _QUESTION and start not in lines[-1][: -len(start)]:
            asked.append((item, start, clue, lines[-1]))
        if len(asked) == n // len(_BETWEEN):
            break
    items = []
    for item, start, clue, question in asked:
        package = item["module"].split(".")[0]
        others = [
            t for m, t in documents if m.split(".")[0] != package and start not in t and len(t) > _BETWEEN[-1]
        ]
        other = rng.choice(others)
        begin = other.index("\n", rng.randrange(len(other) - _BETWEEN[-1])) + 1
        for length in _BETWEEN:
            context = f"{clue}\n{other[begin : begin + length]}\n{question}"
            items.append({"context": context, "target": item["target"], "part": f"{length} chars"})
    return items


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
