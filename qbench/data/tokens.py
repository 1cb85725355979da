"""Text to tokens."""

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qbench.data.corpora import Text


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


@lru_cache(maxsize=8)
def document_tokens(text: Text, tokenizer: Any) -> tuple[Tensor, ...]:
    """Each document by itself; conversations through the tokenizer's chat template where it has one."""
    if text.conversations and tokenizer.chat_template:
        documents = text.rendered(lambda turns: tokenizer.apply_chat_template(turns, tokenize=False))
        ids = tokenizer(documents, add_special_tokens=False, verbose=False).input_ids  # the template has them
    else:
        ids = tokenizer(list(text.documents), verbose=False).input_ids
    return tuple(torch.tensor(one, dtype=torch.long) for one in ids)


def document_windows(documents: tuple[Tensor, ...], n: int, seq_len: int, seed: int) -> Tensor:
    """Random windows, each inside a random document of more than `seq_len` tokens, `(n, seq_len)`.

    Raises:
        ValueError: If no document is long enough.
    """
    long = [document for document in documents if len(document) > seq_len]
    if not long:
        longest = max(map(len, documents), default=0)
        raise ValueError(
            f"no document has more than {seq_len} tokens, the longest of {len(documents)} has {longest}; lower seq_len"
        )
    generator = torch.Generator().manual_seed(seed)
    windows = []
    for index in torch.randint(len(long), (n,), generator=generator).tolist():
        start = int(torch.randint(len(long[index]) - seq_len, (), generator=generator))
        windows.append(long[index][start : start + seq_len])
    return torch.stack(windows)


def sha256(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()
