"""The windows of a text that a perplexity is of."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qbench.data.corpora import CORPORA, Text
from qbench.data.tokens import byte_ends, document_windows, tokenize


@dataclass(frozen=True)
class Windows:
    """The windows of a text, and which of their predictions count.

    Attributes:
        tokens: `(n_windows, seq_len)`.
        scored: How many of each window's last predictions count, `(n_windows,)`: all `seq_len − 1` where windows do not
            overlap.
        n_bytes: Of the text that they predict, `(n_windows,)`; `None` where the tokenizer does not tell.
    """

    tokens: Tensor
    scored: Tensor
    n_bytes: Tensor | None = None

    @classmethod
    def apart(cls, tokens: Tensor) -> "Windows":
        """Windows by themselves, `(n_windows, seq_len)`."""
        return cls(tokens, torch.full((len(tokens),), tokens.shape[1] - 1))

    @classmethod
    def consecutive(cls, tokens: Tensor, seq_len: int, ends: Tensor | None = None) -> "Windows":
        """Windows of `tokens`, `(n,)`, one after another; a shorter last one is dropped."""
        n_windows = len(tokens) // seq_len
        windows = tokens[: n_windows * seq_len].view(n_windows, seq_len)
        if ends is None:
            return cls.apart(windows)
        ends = ends[: n_windows * seq_len].view(n_windows, seq_len)
        return cls(windows, cls.apart(windows).scored, ends[:, -1] - ends[:, 0])

    @classmethod
    def sliding(cls, tokens: Tensor, seq_len: int, stride: int, ends: Tensor | None = None) -> "Windows":
        """Windows of `tokens`, `(n,)`, that begin every `stride` tokens; each token is predicted once, with at least
        `seq_len − stride` tokens before it but at the very beginning.

        Args:
            ends: Where each token ends in the text's bytes, `(n,)`.
        """
        starts = torch.arange(0, len(tokens) - seq_len + 1, stride)
        scored = torch.full((len(starts),), stride)
        scored[0] = seq_len - 1
        lasts = starts + seq_len - 1
        n_bytes = None if ends is None else ends[lasts] - ends[lasts - scored]
        return cls(tokens.unfold(0, seq_len, stride), scored, n_bytes)

    def __getitem__(self, which: Tensor) -> "Windows":
        """Some of the windows."""
        n_bytes = None if self.n_bytes is None else self.n_bytes[which]
        return Windows(self.tokens[which], self.scored[which], n_bytes)

    def __len__(self) -> int:
        return len(self.tokens)


def evaluation_windows(
    text: Text, tokenizer: Any, seq_len: int, most: int | None = None, stride: int | None = None
) -> Windows:
    """The windows that a perplexity is of, as the corpus's protocol cuts them.

    Args:
        most: Take at most so many, evenly spread: the first ones would be about one subject.
        stride: Windows overlap and begin every so many tokens; `None` for windows that do not.

    Raises:
        ValueError: If there are fewer than two, which have no standard error.
    """
    windows = _protocol(text, tokenizer, seq_len, stride)
    if len(windows) < 2:
        raise ValueError(
            f"{text.name} has {len(tokenize(text, tokenizer))} tokens, fewer than two windows of {seq_len}; lower "
            "eval.seq_len"
        )
    n = len(windows)
    asked = CORPORA[text.corpus].most if text.corpus is not None else None
    if asked is not None and stride is None and n < asked and (most is None or most > n):
        raise ValueError(
            f"{text.name} is {asked} windows of {seq_len} tokens, what was found makes {n} ({text.origin}); set "
            f"eval.max_windows={n} or fewer, which stands in the metric's name, or give the whole text"
        )
    return windows if most is None or most >= n else windows[torch.linspace(0, n - 1, most).round().long()]


def _protocol(text: Text, tokenizer: Any, seq_len: int, stride: int | None) -> Windows:
    corpus = CORPORA[text.corpus] if text.corpus is not None else None
    most = corpus.most if corpus is not None else None
    if corpus is not None and corpus.is_random:
        assert most is not None, "random windows are counted"
        return Windows.apart(document_windows(text, tokenizer, most, seq_len, seed=0))
    tokens, ends = tokenize(text, tokenizer), byte_ends(text, tokenizer)
    if most is not None:
        tokens, ends = tokens[: most * seq_len], None if ends is None else ends[: most * seq_len]
    if stride is not None and len(tokens) >= seq_len:
        return Windows.sliding(tokens, seq_len, stride, ends)
    return Windows.consecutive(tokens, seq_len, ends)
