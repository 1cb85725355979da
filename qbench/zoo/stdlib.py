"""Two corpora that every user has: the Python standard library's prose and its source.

`stdlib_docs` is the English prose of docstrings (and of `pydoc`'s help topics), `stdlib_code` the
source with its docstrings taken out. Both are read from the library of the running interpreter, so
they differ a little between Python versions: `Corpus.sha256` is what a record keeps.

A module belongs to one split, chosen by a hash of its name. Test text is settled first; whatever
nearly repeats it is then removed from calibration, and whatever repeats either from train.

Building takes seconds, so what was built is kept in the user's cache folder, under a hash of all that
it is made from.
"""

import ast
import hashlib
import inspect
import json
import os
import re
import sys
import sysconfig
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from qbench.zoo import cache as disk

Split = Literal["test", "calibration", "train"]
SPLITS: tuple[Split, ...] = ("test", "calibration", "train")
NAMES = ("stdlib_docs", "stdlib_code")

# Tests are not documentation, `encodings` is tables, and the rest depends on the build.
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
# Some distributions package these apart, so they may not decide what the test text is.
_TRAIN_ONLY = {
    "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "tkinter", "turtle", "turtledemo", "venv",
}  # fmt: skip
_SHARE = {"test": 0.13, "calibration": 0.16}
_SALT = "m"  # packages are few and large: with this salt the shares of text come near those of names
_SHINGLE = 8  # words; a text is a near-duplicate when half of its shingles were seen before
_REPEATED = 0.5
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BLOCKS = (ast.stmt, ast.excepthandler, ast.match_case)  # every node that can have a statement below it
_THIS_FILE = Path(__file__).read_bytes()  # on import: later it may no longer be the code that runs

Documents = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Corpus:
    """Text of one split, in documents.

    Attributes:
        documents: `(module name, text)` in the order of the names.
    """

    name: str
    split: Split
    documents: Documents

    @property
    def text(self) -> str:
        return "\n\n".join(text for _, text in self.documents)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@cache
def load(name: str, split: Split) -> Corpus:
    """Read one split of `stdlib_docs` or `stdlib_code`.

    Raises:
        FileNotFoundError: If this interpreter's standard library is not there as source files.
    """
    if name not in NAMES:
        raise ValueError(f"unknown corpus {name!r}; the embedded ones are {', '.join(NAMES)}")
    return Corpus(name, split, _documents(name, split))


@cache
def _documents(name: str, split: Split) -> Documents:
    sources = [(module, path.read_bytes()) for module, path in _modules()]
    earlier = [_documents(name, other) for other in _earlier(split)]
    key = _key(name, split, sources, earlier)
    stored = disk.read(f"{name}-{split}", key)
    if stored is not None:
        return tuple((module, text) for module, text in json.loads(stored))
    documents = _build(name, split, sources, earlier)
    disk.write(f"{name}-{split}", key, json.dumps(documents, ensure_ascii=False))
    return documents


def _key(name: str, split: Split, sources: list[tuple[str, bytes]], earlier: list[Documents]) -> str:
    """SHA-256 of what `_build` is given and of what it is made of: this file and the interpreter."""
    digests = [(module, hashlib.sha256(source).hexdigest()) for module, source in sources]
    own = hashlib.sha256(_THIS_FILE).hexdigest()
    return hashlib.sha256(repr([sys.version, own, name, split, digests, earlier]).encode()).hexdigest()


def _build(name: str, split: Split, sources: list[tuple[str, bytes]], earlier: list[Documents]) -> Documents:
    units = _prose if name == "stdlib_docs" else _code
    seen = {shingle for documents in earlier for _, text in documents for shingle in _shingles(text)}
    documents = []
    for module, source in sources:
        if _split_of(module) != split:
            continue
        kept = []
        for unit in units(_decode(source), module):
            shingles = _shingles(unit)
            if len(shingles & seen) <= _REPEATED * len(shingles):
                kept.append(unit)
            seen |= shingles
        if kept:
            documents.append((module, "\n\n".join(kept)))
    return tuple(documents)


def _decode(source: bytes) -> str:
    """As `Path.read_text` does, with every line ended by a line feed."""
    return source.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def _earlier(split: Split) -> tuple[Split, ...]:
    return SPLITS[: SPLITS.index(split)]


@cache
def _modules() -> tuple[tuple[str, Path], ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, files in os.walk(root):
        # Not entered: `site-packages` may hold a hundred times as many files as the library itself.
        folders[:] = [f for f in folders if f not in _LEFT_OUT]
        for path in (Path(folder, f) for f in files if f.endswith(".py")):
            parts = path.relative_to(root).with_suffix("").parts
            kept = _LEFT_OUT.isdisjoint(parts) and not parts[0].startswith(("_sysconfigdata", "config-"))
            if kept and path.is_file():  # distributions link files to places that need not be there
                found.append((".".join(parts).removesuffix(".__init__"), path))
    if len(found) < 100:
        raise FileNotFoundError(
            f"the standard library has {len(found)} source files under {root}, hundreds are needed for the "
            "embedded corpora; use an interpreter installed with its .py files, or another corpus"
        )
    return tuple(sorted(found))


def _split_of(module: str) -> Split:
    package = module.split(".")[0]  # whole packages, since their modules share vocabulary and text
    if package in _TRAIN_ONLY:
        return "train"
    draw = int.from_bytes(hashlib.sha256(f"{_SALT}{package}".encode()).digest()[:4], "big") / 2**32
    if draw < _SHARE["test"]:
        return "test"
    return "calibration" if draw < _SHARE["test"] + _SHARE["calibration"] else "train"


def _shingles(text: str) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    count = max(1, len(words) - _SHINGLE + 1)
    return {" ".join(words[i : i + _SHINGLE]) for i in range(count)}


def _documented(
    tree: ast.Module,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Modules, classes and functions in the order of `ast.walk`, which spends its time on expressions."""
    todo: deque[ast.AST] = deque([tree])
    while todo:
        node = todo.popleft()
        if isinstance(node, _DOCUMENTED):
            yield node
        todo.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, _BLOCKS))


def _prose(source: str, module: str) -> list[str]:
    tree = ast.parse(source)
    texts = [ast.get_docstring(node) or "" for node in _documented(tree)]
    if module == "pydoc_data.topics":
        texts = _help_topics(tree)
    return [p for text in texts for p in _paragraphs(text)]


def _help_topics(tree: ast.Module) -> list[str]:
    strings = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return [inspect.cleandoc(text) for text in strings if len(text) > 200]


def _paragraphs(docstring: str) -> Iterator[str]:
    """The paragraphs that read as English, each on one line."""
    for block in re.split(r"\n\s*\n", docstring):
        text = " ".join(block.split())
        letters = sum(c.isalpha() or c == " " for c in text)
        is_example = ">>>" in text or "..." in text[:4]
        if not is_example and len(text.split()) >= 4 and letters >= 0.85 * len(text):
            yield text


def _code(source: str, module: str) -> list[str]:
    """The source without docstrings, in pieces that begin at the left margin after a blank line."""
    if module == "pydoc_data.topics":
        return []
    lines: list[str | None] = list(
        source.split("\n")
    )  # as ast counts them; splitlines() also ends at form feeds
    for node in _documented(ast.parse(source)):
        if ast.get_docstring(node) is not None:
            first, last = node.body[0].lineno - 1, node.body[0].end_lineno
            assert last is not None
            if last > first + 1 or str(lines[first]).lstrip()[:1] in ("r", "R", "u", "U", '"', "'"):
                lines[first:last] = [None] * (last - first)
    text = "\n".join(line.rstrip() for line in lines if line is not None)
    pieces = re.split(r"\n\n+(?=[^\s)\]}])", text)
    return [piece.strip("\n") for piece in pieces if len(piece.split()) >= 4]
