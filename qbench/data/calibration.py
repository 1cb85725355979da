"""Calibration sets: which text, how samples are drawn from it, how many, how long, by which seed.

A recipe makes samples of documents:

    windows   join all, cut windows at random places (GPTQ's wikitext2, arXiv:2210.17323)
    document  a random place in a random document that is longer (GPTQ's c4)
    pack      shuffle, leave out longer documents, concatenate, cut into blocks (AWQ's pileval, arXiv:2306.00978)
    truncate  shuffle, the beginnings of documents that are as long (SmoothQuant's pileval, arXiv:2211.10438, which
              also takes shorter ones; here samples are of one length)
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from qbench.data.corpora import CORPORA, Recipe, Text, check_name, load_text, own_text, versioned
from qbench.data.library import Library
from qbench.data.sources import Source
from qbench.data.tokens import document_tokens, document_windows, tokenize

Sampler = Callable[[int, int, int], Tensor]  # (n_samples, seq_len, seed) -> tokens, from the model itself

_SHUFFLE = 42  # the seed of AWQ's and SmoothQuant's code; ours is added to it
_APART = {
    "batch_size",
    "recipe",
    "path",
    "mix",
    "experts",
    "spill_above",
    "spill_folder",
}  # of what identifies
MADE = ("random", "self", "mix", "text")


@dataclass(frozen=True)
class CalibrationSet:
    """Seeded samples of a text.

    Attributes:
        name: A corpus; `random` for uniform token ids (a control), `self` for text that the floating-point model
            makes, `mix` for several sets, `text` for the user's own.
        n_samples, seq_len: How many samples, of how many tokens.
        propagate_error: Calibrate a block on the output of the quantized blocks before it.
        batch_size: Samples run together; no part of a job's identity.
        recipe: How samples are drawn; `None` for what is usual with the corpus.
        path: Of the user's text, a file or a folder.
        mix: Names and weights.
        experts: Whether experts are calibrated on the tokens that are routed to them, or each on all of them.
        spill_above: Gigabytes (10^9 bytes) above which the hidden states between two blocks are in a file, in
            `spill_folder`, that of temporary files if `None`; neither is a part of a job's identity.
    """

    name: str
    n_samples: int = 128
    seq_len: int = 2048
    propagate_error: bool = True
    seed: int = 0
    batch_size: int = 2
    recipe: Recipe | None = None
    path: str | None = None
    mix: tuple[tuple[str, float], ...] = ()
    experts: Literal["routed", "all"] = "routed"
    spill_above: float | None = None
    spill_folder: str | None = None

    def __post_init__(self) -> None:
        if self.name not in MADE:
            check_name(self.name, "calibration", "calib.name")
        for key in ("n_samples", "seq_len", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"calib.{key} is {getattr(self, key)}, it must be at least 1")
        if self.recipe is not None and (
            self.name in ("random", "self", "mix") or self.recipe not in get_args(Recipe)
        ):
            raise ValueError(
                f"calib.recipe={self.recipe} does not go with calib={self.name}; recipes of texts are "
                f"{', '.join(get_args(Recipe))}"
            )
        if (self.path is not None) != (self.name == "text"):
            raise ValueError(
                "calib=text needs calib.path=<file or folder>"
                if self.path is None
                else f"calib.path is of calib=text, not of calib={self.name}"
            )
        self._check_mix()

    def _check_mix(self) -> None:
        if bool(self.mix) != (self.name == "mix"):
            raise ValueError(
                "calib=mix needs calib.mix={<set>: <weight>, ...}"
                if not self.mix
                else f"calib.mix is of calib=mix, not of calib={self.name}"
            )
        for name, weight in self.mix:
            if name in ("mix", "text") or not (0 < weight < math.inf):
                raise ValueError(
                    f"calib.mix has {name}: {weight}; names are sets other than mix and text, weights above 0"
                )
        if self.mix and len(self._parts()) < len(self.mix):  # which checks the names too
            raise ValueError(
                f"calib.n_samples={self.n_samples} leaves some set of calib.mix without a sample; raise it, or the weights"
            )

    @property
    def label(self) -> str:
        """The name in tables: with the recipe where it is not the usual one, and what is mixed."""
        name = f"text:{own_text(self.path, 'calibration').name}" if self.path else self.name
        if self.mix:
            total = sum(weight for _, weight in self.mix)
            name = "+".join(f"{100 * weight / total:.0f}%{part}" for part, weight in sorted(self.mix))
        return name if self.recipe is None else f"{name}/{self.recipe}"

    def identity(self) -> dict[str, Any]:
        """What can change a number."""
        kept = {k: v for k, v in asdict(self).items() if k not in _APART}
        if self.experts != "routed":
            kept["experts"] = self.experts
        kept |= {"name": versioned(self.path or self.name) if self.path else versioned(self.name)}
        if self.recipe is not None:
            kept["recipe"] = self.recipe
        if self.mix:
            total = sum(weight for _, weight in self.mix)
            kept["mix"] = {versioned(name): weight / total for name, weight in self.mix}
        return kept

    def needed(self) -> Iterator[tuple[Source, str, str | None]]:
        """The splits that are read, each with its corpus; what is embedded or the user's own is not among them."""
        for part in self._parts() or (self,):
            if part.name in CORPORA:
                yield CORPORA[part.name].source, CORPORA[part.name].splits["calibration"], part.name

    def check(self, tokenizer: Any, library: Library | None = None) -> None:
        """Refuse a text that is not there or too short.

        Raises:
            ValueError, FileNotFoundError: Saying what was found and what to lower.
        """
        for part in self._parts() or (self,):
            if part.name not in ("random", "self"):
                part.tokens(tokenizer, library)

    def tokens(
        self, tokenizer: Any, library: Library | None = None, sampler: Sampler | None = None
    ) -> Tensor:
        """`(n_samples, seq_len)` tokens; the same for the same fields, tokenizer and text.

        Args:
            sampler: What makes the text of `self`.

        Raises:
            ValueError: If the text is too short.
        """
        if self.name == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return torch.randint(len(tokenizer), (self.n_samples, self.seq_len), generator=generator)
        if self.name == "self":
            assert sampler is not None, "text of the model's own needs the model"
            return sampler(self.n_samples, self.seq_len, self.seed)
        if self.mix:
            return torch.cat([part.tokens(tokenizer, library, sampler) for part in self._parts()])
        text = load_text(self.path or self.name, "calibration", library)
        try:
            return _RECIPES[self._recipe](text, tokenizer, self.n_samples, self.seq_len, self.seed)
        except ValueError as error:
            raise ValueError(f"calibration set {self.label!r}: {error}") from error

    @property
    def samples_model(self) -> bool:
        """Whether the model itself makes some of the text."""
        return self.name == "self" or any(name == "self" for name, _ in self.mix)

    @property
    def _recipe(self) -> Recipe:
        return self.recipe or (CORPORA[self.name].recipe if self.name in CORPORA else "windows")

    def _parts(self) -> tuple["CalibrationSet", ...]:
        """What is mixed, each with its share of the samples: by weight, the largest remainders rounded up."""
        total = sum(weight for _, weight in self.mix)
        mix = sorted(self.mix)
        shares = [self.n_samples * weight / total for _, weight in mix]
        counts = [math.floor(share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
        for index in by_remainder[: self.n_samples - sum(counts)]:
            counts[index] += 1
        return tuple(
            replace(self, name=name, mix=(), n_samples=count)
            for (name, _), count in zip(mix, counts, strict=True)
            if count
        )


def _windows(text: Text, tokenizer: Any, n: int, seq_len: int, seed: int) -> Tensor:
    row = tokenize(text, tokenizer)
    if len(row) < n + seq_len:
        raise ValueError(
            f"it has {len(row)} tokens, which does not make {n} different windows of {seq_len}; lower "
            "calib.n_samples or calib.seq_len"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(row) - seq_len, (n,), generator=generator)
    return torch.stack([row[start : start + seq_len] for start in starts.tolist()])


def _pack(text: Text, tokenizer: Any, n: int, seq_len: int, seed: int) -> Tensor:
    parts, found = list[Tensor](), 0
    for document in _shuffled(text, tokenizer, seed):
        if 0 < len(document) <= seq_len:
            parts.append(document)
            found += len(document)
            if found >= n * seq_len:
                return torch.cat(parts)[: n * seq_len].view(n, seq_len)
    raise _too_few(found // seq_len, n, f"blocks of {seq_len} tokens in documents no longer than that")


def _truncate(text: Text, tokenizer: Any, n: int, seq_len: int, seed: int) -> Tensor:
    parts = list[Tensor]()
    for document in _shuffled(text, tokenizer, seed):
        if len(document) >= seq_len:
            parts.append(document[:seq_len])
            if len(parts) == n:
                return torch.stack(parts)
    raise _too_few(len(parts), n, f"documents of {seq_len} tokens or more")


def _shuffled(text: Text, tokenizer: Any, seed: int) -> Iterator[Tensor]:
    """Documents in the order that shuffling a hub data set gives."""
    order = np.random.default_rng(_SHUFFLE + seed).permutation(len(text.documents))
    return document_tokens(text, tokenizer, order.tolist())


def _too_few(found: int, needed: int, what: str) -> ValueError:
    return ValueError(
        f"it has {found} {what}, {needed} were asked for; lower calib.n_samples or calib.seq_len"
    )


_RECIPES: dict[Recipe, Callable[[Text, Any, int, int, int], Tensor]] = {
    "windows": _windows, "document": document_windows, "pack": _pack, "truncate": _truncate,
}  # fmt: skip
