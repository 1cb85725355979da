"""The embedded corpora are kept between processes, and what is kept is never another text."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qbench.zoo import cache, stdlib

TEXT = "naïve 漢字 \ud800 \ud83d\ude00 \u2028 \r\n \x00 ok"
KEY = "0" * 64
WORDS = ["this", "sentence", "is", "about", "the", "number", "and", "long", "enough", "to", "be", "kept"]


def forget():
    stdlib.load.cache_clear()
    stdlib._documents.cache_clear()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder, and a process that has not loaded any corpus."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache" / "qbench"
    forget()


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library, so that building takes no time: the source files by split."""
    modules = []
    for split in stdlib.SPLITS:
        name = next(f"m{i}" for i in range(1000) if stdlib._split_of(f"m{i}") == split)
        path = tmp_path / f"{name}.py"
        prose = " ".join(word + split for word in WORDS)  # no near-duplicate of another split's
        path.write_text(f'"""{prose}"""\n\nvalues = [1, 2, 3, 4, "{split}"] + [5]\n')
        modules.append((name, path))
    monkeypatch.setattr(stdlib, "_modules", lambda: tuple(modules))
    return {stdlib._split_of(name): path for name, path in modules}


@pytest.fixture
def built(monkeypatch):
    """The `(name, split)` of every corpus that was built and not read."""
    calls, build = [], stdlib._build

    def count(name, split, *inputs):
        calls.append((name, split))
        return build(name, split, *inputs)

    monkeypatch.setattr(stdlib, "_build", count)
    return calls


def test_the_text_is_the_same_with_and_without_the_cache(folder, built):
    wanted = [(name, split) for name in stdlib.NAMES for split in ("test", "calibration")]
    fresh = [stdlib.load(*corpus) for corpus in wanted]
    assert sorted(built) == sorted(wanted)
    forget()
    assert [stdlib.load(*corpus) for corpus in wanted] == fresh
    assert len(built) == len(wanted) == len(list(folder.iterdir()))


@pytest.mark.parametrize("name", stdlib.NAMES)
@pytest.mark.parametrize("split", stdlib.SPLITS)
@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[:-1],
        lambda b: b[:70],
        lambda b: b.replace(b"a", b"b", 1),
        lambda b: b + b" ",
    ],
    ids=["emptied", "cut", "cut in the digest's line", "changed", "longer"],
)
def test_a_damaged_file_is_built_again(folder, library, built, name, split, damage):
    fresh = stdlib.load(name, split)
    (file,) = folder.glob(f"{name}-{split}-*")
    intact = file.read_bytes()
    file.write_bytes(damage(intact))
    forget()
    assert stdlib.load(name, split) == fresh
    assert built.count((name, split)) == 2
    assert file.read_bytes() == intact


def test_a_file_under_the_key_of_another_is_refused(folder):
    cache.write("a", KEY, TEXT)
    (folder / f"a-{KEY}").rename(folder / f"a-{'1' * 64}")
    assert cache.read("a", "1" * 64) is None


@pytest.mark.parametrize("changed", stdlib.SPLITS)
def test_a_changed_source_file_changes_the_text(folder, library, built, changed):
    stdlib.load("stdlib_docs", changed)
    path = library[changed]
    before = path.stat()
    path.write_text(path.read_text().replace("number", "letter"))
    # Of the same size and, as some installers leave it, of the same time.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    forget()
    assert "letter" in stdlib.load("stdlib_docs", changed).text
    assert built.count(("stdlib_docs", changed)) == 2


@pytest.mark.parametrize("split", stdlib.SPLITS)
def test_the_key_is_of_all_that_the_text_depends_on(split, monkeypatch):
    inputs = [("m", b"x = 1"), ("n", b"y = 2")]
    args = ("stdlib_docs", split, inputs, [(("m", "text"),)])
    key = stdlib._key(*args)
    others = {
        stdlib._key("stdlib_code", *args[1:]),
        stdlib._key(*args[:2], [("m", b"x = 2"), ("n", b"y = 2")], args[3]),
        stdlib._key(*args[:2], [("k", b"x = 1"), ("n", b"y = 2")], args[3]),
        stdlib._key(*args[:2], inputs[:1], args[3]),
        stdlib._key(*args[:3], [(("m", "other text"),)]),
        *(stdlib._key(args[0], other, *args[2:]) for other in stdlib.SPLITS if other != split),
    }
    monkeypatch.setattr(stdlib, "_THIS_FILE", b"another way to build")
    others.add(stdlib._key(*args))
    monkeypatch.undo()
    monkeypatch.setattr(sys, "version", "3.99.0")
    others.add(stdlib._key(*args))
    assert len(others - {key}) == 9


@pytest.mark.parametrize("blocked", ["cache", "cache/qbench"])
def test_a_cache_folder_that_cannot_be_written_to_changes_nothing(folder, library, built, blocked, tmp_path):
    fresh = stdlib.load("stdlib_docs", "calibration")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    if blocked == "cache":
        folder.parent.rmdir()
    (tmp_path / blocked).write_text("a file where the folder should be")
    forget()
    assert stdlib.load("stdlib_docs", "calibration") == fresh
    assert built.count(("stdlib_docs", "calibration")) == 2


def test_a_write_that_fails_leaves_nothing_behind(folder):
    (folder / f"a-{KEY}" / "in the way").mkdir(parents=True)
    cache.write("a", KEY, TEXT)
    assert [p.name for p in folder.iterdir()] == [f"a-{KEY}"]
    assert cache.read("a", KEY) is None


def test_a_user_without_a_home_has_no_cache(monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", no_home)
    cache.write("a", KEY, TEXT)
    assert cache.read("a", KEY) is None
    assert list(tmp_path.iterdir()) == []


def test_a_relative_cache_home_is_ignored(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for invalid in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", invalid)
        cache.write("a", KEY, invalid)
        assert (tmp_path / "home" / ".cache" / "qbench" / f"a-{KEY}").is_file()
        assert cache.read("a", KEY) == invalid
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


def test_any_text_comes_back_as_it_was(folder):
    cache.write("a", KEY, TEXT)
    assert cache.read("a", KEY) == TEXT


def test_processes_that_write_at_once_never_see_part_of_a_file(folder):
    code = """
from qbench.zoo import cache
text = "x" * 300_000
for _ in range(100):
    assert cache.read("a", "k") in (None, text)
    cache.write("a", "k", text)
    assert cache.read("a", "k") == text
"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [p.wait(timeout=60) for p in processes] == [0, 0]
    assert [p.name for p in folder.iterdir()] == ["a-k"]


def test_two_first_processes_at_once_load_the_same_text(folder):
    code = "from qbench.zoo import stdlib; print(stdlib.load('stdlib_docs', 'test').sha256)"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    outputs = {p.communicate(timeout=120)[0].decode().strip() for p in processes}
    assert outputs == {stdlib.load("stdlib_docs", "test").sha256}
    assert len(list(folder.iterdir())) == 1
