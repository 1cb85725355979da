"""Retrieval that needs no files, short enough for models that read 512 tokens.

Documents go through all lengths and positions before they repeat one, so that any first few cover them.
"""

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

from datasets import Dataset

Documents = list[dict[str, str]]

POSITIONS = (0.0, 0.25, 0.5, 0.75, 1.0)

# Common words, so that any tokenizer reads much text in few tokens.
_FILLER = (
    "The first line of the file is the name of the class.",
    "This method returns a new list and does not change the old one.",
    "If the value is not set, the default value is used.",
    "Each object has a type, and the type has a name.",
    "The function is called with the name of the module.",
    "When the end of the file is read, the string is empty.",
    "The order of the items in the list is not changed.",
    "An error is raised if there is no such key.",
    "The result is the same for every object of this type.",
    "It can be used to read a file or to write one.",
)
_ADJECTIVES = ("red", "old", "new", "big", "low", "open", "last", "long", "full", "free")
_NOUNS = ("file", "line", "name", "list", "word", "time", "test", "path", "code", "port")


def passkey(
    lengths: Sequence[int] = (600, 1000, 1400), n: int = 8, seed: int = 0, **_: Any
) -> dict[str, Dataset]:
    """The only split, `test`; lm-eval passes what else it knows of the task."""
    return {"test": Dataset.from_list(passkey_documents(lengths, n, seed))}


def lines(lengths: Sequence[int] = (5, 10, 20), n: int = 8, seed: int = 0, **_: Any) -> dict[str, Dataset]:
    """The only split, `test`; lm-eval passes what else it knows of the task."""
    return {"test": Dataset.from_list(lines_documents(lengths, n, seed))}


def passkey_documents(lengths: Sequence[int] = (600, 1000, 1400), n: int = 8, seed: int = 0) -> Documents:
    """`{"prompt", "target", "part"}`: five digits inside filler of at most each length, in characters.

    `n` is the number of documents of each length and position.
    """
    rng = random.Random(seed)
    documents = []
    for _, length, position in product(range(n), lengths, POSITIONS):
        key = str(rng.randrange(10_000, 100_000))
        sentences = _filler(length, rng)
        sentences.insert(round(position * len(sentences)), f"Remember that the pass key is {key}.")
        prompt = f"{' '.join(sentences)}\n\nWhich number was to be remembered? Remember that the pass key is"
        documents.append({"prompt": prompt, "target": key, "part": f"{length} chars, {position:g}"})
    return documents


def _filler(length: int, rng: random.Random) -> list[str]:
    sentences: list[str] = []
    while True:
        sentences.append(rng.choice(_FILLER))
        if len(" ".join(sentences)) > length:
            return sentences[:-1]


def lines_documents(lengths: Sequence[int] = (5, 10, 20), n: int = 8, seed: int = 0) -> Documents:
    """`{"prompt", "target", "part"}`: the number in one of `length` lines, each with a name and a number.

    `n` is the number of documents of each length and position.
    """
    rng = random.Random(seed)
    names = [f"{adjective} {noun}" for adjective in _ADJECTIVES for noun in _NOUNS]
    documents = []
    for _, length, position in product(range(n), lengths, POSITIONS):
        chosen = rng.sample(names, length)
        numbers = [str(number) for number in rng.sample(range(10_000, 100_000), length)]
        record = "\n".join(f"The {name} has {number}." for name, number in zip(chosen, numbers, strict=True))
        asked = round(position * (length - 1))
        prompt = f"What does each one have?\n\n{record}\n\nThe {chosen[asked]} has"
        documents.append(
            {"prompt": prompt, "target": numbers[asked], "part": f"{length} lines, {position:g}"}
        )
    return documents
