"""Questions made of held-out standard-library text, for the two embedded lm-eval tasks.

`stdlib_cloze`: which of four passages goes on from this one? Three come from other modules.
`stdlib_copy`: complete an assignment whose right-hand side repeats an identifier of the context.
"""

import keyword
import random
import re
from typing import Any

from qbench.zoo import stdlib

_WORDS = 16  # of context and of each continuation
_COPIED = re.compile(r"(?:^|\n)[ \t]+self\._?(\w{4,}) = (\w+)(?=\n)")


def cloze(n: int = 160, seed: int = 0) -> list[dict[str, Any]]:
    """`{"context", "choices", "label", "module"}`; the right choice is at a random place."""
    rng = random.Random(seed)
    passages = [
        (module, words)
        for module, text in stdlib.load("stdlib_docs", "test").documents
        for words in (paragraph.split() for paragraph in text.split("\n\n"))
        if len(words) >= 2 * _WORDS
    ]
    rng.shuffle(passages)
    items = []
    for module, words in passages[:n]:
        others = [w for m, w in passages if m.split(".")[0] != module.split(".")[0]]
        wrong = [" ".join(w[_WORDS : 2 * _WORDS]) for w in rng.sample(others, 3)]
        label = rng.randrange(4)
        choices = [*wrong[:label], " ".join(words[_WORDS : 2 * _WORDS]), *wrong[label:]]
        context = " ".join(words[:_WORDS])
        items.append({"context": context, "choices": choices, "label": label, "module": module})
    return items


def copying(n: int = 120, seed: int = 0) -> list[dict[str, Any]]:
    """`{"context", "target", "module"}`; the context ends before the identifier, which it holds already."""
    rng = random.Random(seed)
    items = []
    for module, text in stdlib.load("stdlib_code", "test").documents:
        for match in _COPIED.finditer(text):
            name, target = match.groups()
            context = text[max(0, match.start(2) - 800) : match.start(2)].rstrip(" ")
            seen = re.search(rf"\b{re.escape(target)}\b", context)
            if name == target and seen and not keyword.iskeyword(target):
                items.append({"context": context, "target": target, "module": module})
    rng.shuffle(items)
    return items[:n]
