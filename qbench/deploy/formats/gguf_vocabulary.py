"""A tokenizer as llama.cpp has it: byte-level BPE, or the BPE of SentencePiece with bytes to fall back on.

llama.cpp knows how a text is cut before BPE by name alone. The name is found by asking: whichever of the known ways cuts
a difficult text as the tokenizer does. A tokenizer that none of them equals is refused.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Regex, pre_tokenizers

from qbench.errors import Unsuitable

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPACE = "▁"
_PROBES = (
    "It's 12345 o'clock; WE'LL see, they'Re here.\n\n\n  def f(x):\n\t\treturn x**2  # 3.14159\r\n",
    "naïve Straße café 東京は2024年です。 привет, мир! ١٢٣ ½ 👩\u200d🔬🎉", "a_b-c/d\\e {}[]() ... !?!? \n \n\t",
    " x", "  two  spaces ", "\u00a0\u3000x\u200b",
)  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of its tokenizer.

    Attributes:
        kind: llama.cpp's name of the algorithm: `gpt2` (byte-level BPE), `llama` (SentencePiece).
        pre: How a text is cut before.
        tokens, types: Of every row of the embedding.
        merges: Of `gpt2`, best first.
        scores: Of `llama`, highest first.
        special: Ids of special tokens by their names in `GGUFWriter`.
        begins, ends: Whether a text begins or ends with one of them.
        prefix: Whether a text is read with a space before it.
    """

    kind: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    scores: list[float]
    special: dict[str, int]
    begins: bool
    ends: bool
    prefix: bool
    template: str | None

    def write(self, file: GGUFWriter) -> None:
        file.add_tokenizer_model(self.kind)
        file.add_tokenizer_pre(self.pre)
        file.add_token_list(self.tokens)
        file.add_token_types(self.types)
        if self.kind == "gpt2":
            file.add_token_merges(self.merges)
        else:
            file.add_token_scores(self.scores)
        for name, number in self.special.items():
            getattr(file, f"add_{name}_token_id")(number)
        file.add_add_bos_token(self.begins)
        file.add_add_eos_token(self.ends)
        file.add_add_space_prefix(self.prefix)
        if self.template is not None:
            file.add_chat_template(self.template)


def vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """Read a fast tokenizer; `size` are the rows of the embedding.

    Raises:
        Unsuitable: If llama.cpp has no tokenizer that makes the same tokens; says what it lacks.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _not(f"{type(tokenizer).__name__} is written in Python", "convert it to a tokenizer.json")
    spec = json.loads(backend.to_str())
    model = spec["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        raise _not(f"it is of type {model['type']}", "BPE without dropout and prefixes of subwords is read")
    vocab, added = backend.get_vocab(with_added_tokens=True), spec["added_tokens"]
    if len(vocab) > size or max(vocab.values()) >= size:
        raise _not(f"it has {max(vocab.values()) + 1} tokens, and the embedding {size} rows", "resize it")
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    kind = "llama" if model.get("byte_fallback") else "gpt2"
    pre, prefix = ("default", _prefixed(backend)) if kind == "llama" else (_cut(backend, spec), False)
    begins, ends = _ends(tokenizer)
    template, types = tokenizer.chat_template, _types(vocab, added, model, size)
    return Vocabulary(
        kind, pre, _tokens(vocab, size), types,
        [" ".join(pair) for pair in pairs] if kind == "gpt2" else [],
        _scores(model["vocab"], pairs, types) if kind == "llama" else [],
        _special(tokenizer), begins, ends, prefix, template if isinstance(template, str) else None,
    )  # fmt: skip


def _not(found: str, need: str) -> Unsuitable:
    return Unsuitable(
        "llama.cpp has no tokenizer that equals the model's", f"{found}; {need}, or use --to hf"
    )


def _tokens(vocab: Mapping[str, int], size: int) -> list[str]:
    by_number = {number: token for token, number in vocab.items()}
    return [by_number.get(i, f"[PAD{i}]") for i in range(size)]


def _types(
    vocab: Mapping[str, int], added: list[dict[str, Any]], model: Mapping[str, Any], size: int
) -> list[TokenType]:
    types = [TokenType.UNUSED] * size
    for number in vocab.values():
        types[number] = TokenType.NORMAL
    if model.get("byte_fallback"):
        for byte in range(256):
            types[vocab[f"<0x{byte:02X}>"]] = TokenType.BYTE
    for token in added:
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if model.get("unk_token") is not None:
        types[vocab[model["unk_token"]]] = TokenType.UNKNOWN
    return types


def _special(tokenizer: Any) -> dict[str, int]:
    found = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    return {name: int(number) for name, number in found.items() if number is not None}


def _ends(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a text gets a first and a last token."""
    bare, whole = (tokenizer("a", add_special_tokens=with_them)["input_ids"] for with_them in (False, True))
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
    if at is None:
        raise _not("it changes a text's tokens where it adds special ones", "none but the ends may be added")
    first, last = whole[:at], whole[at + len(bare) :]
    if first not in ([], [tokenizer.bos_token_id]) or last not in ([], [tokenizer.eos_token_id]):
        raise _not(f"it puts {first} and {last} around a text", "only bos and eos can be")
    return bool(first), bool(last)


@cache
def _ways() -> dict[tuple[str, bool], Any]:
    """How llama.cpp cuts a text, by its name and whether whole tokens come before merges."""
    split, levels = pre_tokenizers.Split, pre_tokenizers.ByteLevel
    plain, cut = levels(add_prefix_space=False), levels(add_prefix_space=False, use_regex=False)
    llama3, qwen2 = Regex(_LETTERS + r"\p{N}{1,3}" + _REST), Regex(_LETTERS + r"\p{N}" + _REST)
    in_order = pre_tokenizers.Sequence
    return {
        ("gpt-2", False): plain,
        ("llama-bpe", True): in_order([split(llama3, "isolated"), cut]),
        ("qwen2", False): in_order([split(qwen2, "isolated"), cut]),
        ("smollm", False): in_order([pre_tokenizers.Digits(individual_digits=True), plain]),
    }


def _cut(backend: Any, spec: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts a text."""
    # Text that is composed already, as nearly all is, is its own NFC; llama.cpp composes none.
    if (spec["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        raise _not(f"it normalizes text ({spec['normalizer']['type']})", "llama.cpp does not")
    wanted, whole = _pieces(backend.pre_tokenizer), bool(spec["model"].get("ignore_merges"))
    for (name, first), way in _ways().items():
        if first == whole and _pieces(way) == wanted:
            return name
    names = ", ".join(name for name, _ in _ways())
    raise _not("it cuts text in a way of its own", f"known are those of {names}")


def _pieces(way: Any) -> list[list[str]]:
    return [] if way is None else [[piece for piece, _ in way.pre_tokenize_str(text)] for text in _PROBES]


def _prefixed(backend: Any) -> bool:
    """Whether SentencePiece's text begins with a space; spaces are all that it may change."""
    found = [_spaced(backend, text) for text in _PROBES]
    plain = [text.replace(" ", _SPACE) for text in _PROBES]
    for prefix in (True, False):
        if found == [_SPACE * prefix + text for text in plain]:
            return prefix
    raise _not("it changes text before it cuts it", "only spaces may become ▁, with one before the text")


def _spaced(backend: Any, text: str) -> Any:
    """A text as merges meet it; `None` where it is cut before."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
        return text
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return pieces[0] if len(pieces) == 1 else None


def _scores(vocab: Mapping[str, int], pairs: list[tuple[str, str]], types: list[TokenType]) -> list[float]:
    """Scores by which llama.cpp, which joins whatever two pieces make a token, joins them in the order of the merges."""
    ranks: dict[str, list[int]] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), []).append(rank)
    known = set(pairs)
    for token in (token for token, number in vocab.items() if types[number] == TokenType.NORMAL):
        if missing := next((p for p in _halves(token, vocab) if p not in known), None):
            raise _not(
                f"it does not merge {missing[0]!r} and {missing[1]!r}", "every two pieces of a token must be"
            )
    if any(found[-1] - found[0] >= len(found) for found in ranks.values()):
        raise _not("its merges are not ordered by what they make", "SentencePiece's are")
    scores = [0.0] * len(types)
    for token, number in vocab.items():
        scores[number] = -float(ranks[token][0]) if token in ranks else 0.0
    return scores


def _halves(token: str, vocab: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    for i in range(1, len(token)):
        if token[:i] in vocab and token[i:] in vocab:
            yield token[:i], token[i:]
