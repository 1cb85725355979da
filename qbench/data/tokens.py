"""Text to tokens."""

import hashlib
import random
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qbench.data.corpora import Text

_TOGETHER = 256  # documents that are tokenized in one call
_TRIES = 200  # documents that are looked at for each window, at most


@lru_cache(maxsize=32)
def tokenize(text: Text, tokenizer: Any) -> Tensor:
    """The whole text in one call of the tokenizer, special tokens as it puts them; `(n_tokens,)`."""
    return tokenizer(text.text, return_tensors="pt", verbose=False).input_ids[0]


@lru_cache(maxsize=8)
def byte_ends(text: Text, tokenizer: Any) -> Tensor | None:
    """Where each token of `tokenize` ends in the text's UTF-8 bytes, `(n_tokens,)`; `None` for a tokenizer in Python,
    which does not tell.
    """
    if not tokenizer.is_fast:
        return None
    offsets = tokenizer(text.text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    points = np.frombuffer(text.text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    starts = np.concatenate(([0], np.cumsum(sizes)))
    # A special token has the span (0, 0) wherever it stands; it ends where the one before it did.
    ends = np.maximum.accumulate(starts[np.array(offsets, dtype=np.int64).reshape(-1, 2)[:, 1]])
    return torch.from_numpy(ends)


def document_tokens(text: Text, tokenizer: Any, which: Iterable[int]) -> Iterator[Tensor]:
    """Some documents, each by itself, as they are asked for; conversations in the tokenizer's chat template, if any."""
    chats = bool(text.conversations and tokenizer.chat_template)
    left = iter(which)
    while some := list(islice(left, _TOGETHER)):
        if chats:
            documents = [tokenizer.apply_chat_template(text.turns(i), tokenize=False) for i in some]
        else:
            documents = [text.documents[i] for i in some]
        # A template has put the special tokens where they belong.
        ids = tokenizer(documents, add_special_tokens=not chats, verbose=False).input_ids
        yield from (torch.tensor(one, dtype=torch.long) for one in ids)


def document_windows(text: Text, tokenizer: Any, n: int, seq_len: int, seed: int) -> Tensor:
    """Random windows, each inside a random document of more than `seq_len` tokens, `(n, seq_len)`.

    Draws as GPTQ's code does for C4 (arXiv:2210.17323), so that the same seed and tokenizer give the same windows: a
    document until one is long enough, then a place in it, by Python's generator.

    Raises:
        ValueError: If no document is long enough.
    """
    rng, windows, longest = random.Random(seed), list[Tensor](), 0
    for _ in range(_TRIES * n + 10 * len(text.documents)):
        index = rng.randint(0, len(text.documents) - 1)
        (document,) = document_tokens(text, tokenizer, [index])
        longest = max(longest, len(document))
        if len(document) > seq_len:
            start = rng.randint(0, len(document) - seq_len - 1)
            windows.append(document[start : start + seq_len])
            if len(windows) == n:
                return torch.stack(windows)
    raise ValueError(
        f"hardly any of {len(text.documents)} documents has more than {seq_len} tokens, the longest of those looked at has "
        f"{longest}; lower seq_len"
    )


def sha256(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()
