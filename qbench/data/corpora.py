"""Text by name: from this machine's standard library, from `data.root`, from the hub, or from the user's own file.

How the documents of a corpus are joined and which of them are read is part of a perplexity's protocol.
"""

import difflib
import hashlib
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from qbench.data.files import read_rows
from qbench.data.library import Library
from qbench.data.sources import SUFFIXES, Source
from qbench.zoo import stdlib

Use = Literal["calibration", "test"]
Recipe = Literal["windows", "document", "pack", "truncate"]
Turns = list[dict[str, str]]  # of a conversation: role and content


@dataclass(frozen=True)
class Corpus:
    """Where a corpus is and how its rows become documents.

    Attributes:
        splits: The split that serves each use; a use without one is refused.
        field: The row's field that is the document; of no meaning where there are
        turns: which make a conversation of a row.
        join: Put between documents.
        recipe: How calibration samples are drawn (`qbench.data.calibration`), unless it is said otherwise.
        first: How many documents of the test split are read; `None` for all.
        windows: How perplexity cuts the test text: `consecutive` windows of all of it, or `random` ones, each inside a
            document that is longer (seed 0).
        most: Windows that are evaluated at most, the first ones.
    """

    source: Source
    splits: Mapping[Use, str]
    field: str = "text"
    turns: Callable[[Mapping[str, Any]], Turns] | None = None
    join: str = "\n\n"
    recipe: Recipe = "windows"
    first: int | None = None
    windows: Literal["consecutive", "random"] = "consecutive"
    most: int | None = None

    @property
    def is_random(self) -> bool:
        return self.windows == "random"


def _asked(question: str, answer: str) -> Turns:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _choice(row: Mapping[str, Any], question: str, answer: str) -> Turns:
    """A question with lettered choices."""
    options = "\n".join(f"{letter}. {row[letter]}" for letter in "ABCD")
    return _asked(f"{row[question]}\n{options}", f"{row[answer]}. {row[row[answer]]}")


def _mmlu(row: Mapping[str, Any]) -> Turns:
    letters = dict(zip("ABCD", row["choices"], strict=True))
    return _choice({**row, **letters, "answer": "ABCD"[int(row["answer"])]}, "question", "answer")


def _science(row: Mapping[str, Any]) -> Turns:
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    question = row["question"] if "question" in row else row["question_stem"]
    options = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
    return _asked(f"{question}\n{options}", f"{row['answerKey']}. {texts[labels.index(row['answerKey'])]}")


def _alpaca(row: Mapping[str, Any]) -> Turns:
    more = f"\n\n{row['input']}" if row.get("input") else ""
    return _asked(row["instruction"] + more, row["output"])


def _squad(row: Mapping[str, Any]) -> Turns:
    return _asked(f"{row['context']}\n{row['question']}", row["answers"]["text"][0])


_C4 = Source(
    "allenai/c4", "en",
    hub_files=(("train", "en/c4-train.00000-of-01024.json.gz"), ("validation", "en/c4-validation.00000-of-00008.json.gz")),
)  # fmt: skip
_BOTH: Mapping[Use, str] = {"calibration": "train", "test": "test"}
# Joining and cutting: wikitext2, ptb and c4 as in the repository of GPTQ (arXiv:2210.17323), "c4-new" for `c4`.
CORPORA: dict[str, Corpus] = {
    "wikitext2": Corpus(Source("Salesforce/wikitext", "wikitext-2-raw-v1"), _BOTH),
    "c4": Corpus(
        _C4, {"calibration": "train", "test": "validation"}, join=" ", recipe="document", first=1100, most=256
    ),
    "c4_old": Corpus(_C4, {"test": "validation"}, windows="random", most=256),
    "ptb": Corpus(Source("ptb-text-only/ptb_text_only"), _BOTH, "sentence", join=" "),
    "pileval": Corpus(
        Source("mit-han-lab/pile-val-backup"), {"calibration": "validation"}, join="", recipe="pack"
    ),
    "ultrachat": Corpus(
        Source("HuggingFaceH4/ultrachat_200k"), {"calibration": "train_sft", "test": "test_sft"},
        turns=lambda row: row["messages"], recipe="truncate",
    ),
    "alpaca": Corpus(Source("tatsu-lab/alpaca"), {"calibration": "train"}, turns=_alpaca, recipe="pack"),
    "mmlu": Corpus(
        Source("cais/mmlu", "all"), {"calibration": "dev", "test": "test"}, turns=_mmlu, recipe="pack"
    ),
    "gsm8k": Corpus(
        Source("openai/gsm8k", "main"), _BOTH, recipe="pack",
        turns=lambda row: _asked(row["question"], row["answer"]),
    ),
    "ceval": Corpus(
        Source("ceval/ceval-exam", "all"), {"calibration": "dev", "test": "val"}, recipe="pack",
        turns=lambda row: _choice(row, "question", "answer"),
    ),
    "cmmlu": Corpus(
        Source("haonan-li/cmmlu", "all"), {"calibration": "dev", "test": "test"}, recipe="pack",
        turns=lambda row: _choice(row, "Question", "Answer"),
    ),
    "arc_challenge": Corpus(Source("allenai/ai2_arc", "ARC-Challenge"), _BOTH, turns=_science, recipe="pack"),
    "openbookqa": Corpus(Source("allenai/openbookqa", "main"), _BOTH, turns=_science, recipe="pack"),
    "boss_advqa": Corpus(Source("boss", "QuestionAnswering/advqa"), _BOTH, turns=_squad, recipe="pack"),
}  # fmt: skip


@dataclass(frozen=True)
class Text:
    """The documents of one corpus for one use.

    Attributes:
        documents: In their order; conversations in plain words.
        conversations: The same as turns, where they are such.
        corpus: By whose protocol it is read; `None` for the user's own text, whatever it is called.
        origin: Where they were found, for the log and the record.
    """

    name: str
    use: Use
    documents: tuple[str, ...]
    join: str
    origin: str
    conversations: tuple[tuple[tuple[str, str], ...], ...] = ()
    corpus: str | None = None

    @property
    def text(self) -> str:
        return self.join.join(self.documents)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def turns(self, index: int) -> Turns:
        """A conversation."""
        return [{"role": role, "content": content} for role, content in self.conversations[index]]


def known(use: Use = "test") -> list[str]:
    """The corpora that serve a use."""
    return [*stdlib.NAMES, *(name for name, corpus in CORPORA.items() if use in corpus.splits)]


def is_file(name: str) -> bool:
    """Whether a name is the path of the user's own text."""
    return name.endswith((".txt", ".md", *SUFFIXES)) or "/" in name or Path(name).is_dir()


def check_name(name: str, use: Use, key: str) -> None:
    """Refuse what is neither a corpus nor a path.

    Raises:
        ValueError: Naming the nearest corpus.
    """
    if is_file(name) or name in known(use):
        return
    near = difflib.get_close_matches(name, known(use), n=1)
    why = "has no text for it" if name in CORPORA else "is not known"
    raise ValueError(
        f"{key} is {name!r}, which {why}; "
        + (f"did you mean {near[0]}? " if near and near[0] != name else "")
        + f"there are {', '.join(known(use))}, or the path of a text"
    )


def short(name: str) -> str:
    """The name in metrics and tables: a path's last part without suffix."""
    return Path(name).name.partition(".")[0] if is_file(name) else name


def versioned(name: str) -> str:
    """The name as it stands in a job's identity: embedded text changes with the Python version, a file by its content."""
    if is_file(name):
        return f"{short(name)}@{hashlib.sha256(own_text(name, 'test').text.encode()).hexdigest()[:16]}"
    return f"{name}@{platform.python_version()}" if name.startswith("stdlib_") else name


@cache
def load_text(name: str, use: Use, library: Library | None = None) -> Text:
    """The text of a corpus.

    Raises:
        ValueError: If the name is not known, or the corpus does not serve the use.
        FileNotFoundError: If the corpus is neither local nor on a hub that can be reached; names what was
            looked for.
    """
    if name in stdlib.NAMES:
        corpus = stdlib.load(name, use)
        return Text(name, use, (corpus.text,), "\n\n", "standard library of this Python")
    check_name(name, use, "corpus")
    if is_file(name):
        return own_text(name, use)
    ours = CORPORA[name]
    rows = (library or Library()).rows(ours.source, ours.splits[use], name)
    first = ours.first if use == "test" else None
    data = rows.data.select(range(first)) if first is not None and first < len(rows.data) else rows.data
    if ours.turns is None:
        _check_field(ours.field, data.column_names, rows.origin)
        return Text(name, use, tuple(data[ours.field]), ours.join, rows.origin, corpus=name)
    talks = tuple(tuple((t["role"], t["content"]) for t in ours.turns(row)) for row in data)
    documents = tuple("\n".join(content for _, content in talk) for talk in talks)
    return Text(name, use, documents, ours.join, rows.origin, talks, name)


@cache
def own_text(path: str, use: Use) -> Text:
    """The user's text: a file, or all such files of a folder; rows have a field `text`.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If rows have no such field.
    """
    place = Path(path).expanduser()
    files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
    files = [p for p in files if p.name.endswith((".txt", ".md", *SUFFIXES))]
    if not files or not files[0].is_file():
        raise FileNotFoundError(
            f"text {path!r} was not found; give a file or a folder of .txt, .md, {', '.join(SUFFIXES)}"
        )
    documents: list[str] = []
    for file in files:
        if file.name.endswith((".txt", ".md")):
            documents.append(file.read_text(encoding="utf-8"))
            continue
        for row in read_rows(file):
            _check_field("text", list(row), str(file))
            documents.append(row["text"])
    return Text(short(path), use, tuple(documents), "\n\n", f"file {place.name}")


def _check_field(field: str, columns: list[str], origin: str) -> None:
    if field not in columns:
        raise ValueError(f"{origin} has the fields {', '.join(columns)}; {field!r} is needed")
