"""Corpora by name: where they are found and how they are joined."""

import gzip
import json

import pytest
import torch

from qbench.data.corpora import CORPORA, known, load_text, versioned
from qbench.data.files import read_rows
from qbench.data.library import Library
from qbench.data.sources import Source
from qbench.data.tokens import tokenize
from qbench.data.windows import evaluation_windows
from qbench.models.load import ModelRef
from qbench.zoo import stdlib

ROWS = ["", " = A title = ", "", "Some words of text .", "And some more of them .", ""]


@pytest.fixture(scope="module")
def tokenizer():
    return ModelRef("zoo/nano-llama").tokenizer()


@pytest.fixture
def no_hub(monkeypatch):
    """As on a machine without a network: `HF_HUB_OFFLINE` is read when the library is imported."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    load_text.cache_clear()


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


def test_a_plain_file_under_data_root_serves(tmp_path):
    write_lines(tmp_path / "wikitext2" / "wikitext-2-raw-v1_test.jsonl", [{"text": row} for row in ROWS])
    text = load_text("wikitext2", "test", Library(tmp_path))
    assert text.text == "\n\n".join(ROWS)
    assert text.origin == "file wikitext2/wikitext-2-raw-v1_test.jsonl"


def test_the_hub_layout_under_data_root_serves(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "Salesforce" / "wikitext" / "wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"text": ROWS}), folder / "test-00000-of-00001.parquet")
    pq.write_table(pa.table({"text": ROWS[:2]}), folder / "train-00000-of-00001.parquet")
    card = "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
    card += "  - {split: test, path: wikitext-2-raw-v1/test-*}\n  - {split: train, path: wikitext-2-raw-v1/train-*}\n---\n"
    (folder.parent / "README.md").write_text(card)
    assert load_text("wikitext2", "test", Library(tmp_path)).text == "\n\n".join(ROWS)
    assert load_text("wikitext2", "calibration", Library(tmp_path)).text == "\n\n".join(ROWS[:2])


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(suffix, tmp_path):
    from datasets import Dataset

    rows = [{"text": "with a \u2028 separator of lines, 2020-01-01"}, {"text": "漢字"}]
    path = tmp_path / f"test{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        write_lines(path, rows)
    assert list(read_rows(path)) == rows


def test_a_torn_line_is_named(tmp_path):
    (tmp_path / "some.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"some.jsonl, line 2: .*one JSON object a line"):
        list(read_rows(tmp_path / "some.jsonl"))


def test_one_file_serves_all_configurations_by_a_field_of_its_rows(tmp_path):
    rows = [{"subject": s, "question": f"{s}?"} for s in ("anatomy", "virology")]
    write_lines(tmp_path / "mmlu" / "test_other.jsonl", rows[:1])
    write_lines(tmp_path / "mmlu" / "test_stem.jsonl", rows[1:])
    library = Library(tmp_path)
    found = {
        c: library.rows(Source("cais/mmlu", c), "test").data["question"]
        for c in ("anatomy", "virology", "all")
    }
    assert {c: list(q) for c, q in found.items()} == {
        "anatomy": ["anatomy?"], "virology": ["virology?"], "all": ["anatomy?", "virology?"],
    }  # fmt: skip


def test_named_files_serve_in_place_of_the_usual_ones(tmp_path):
    write_lines(tmp_path / "mine" / "c4.jsonl", [{"text": "one"}, {"text": "two"}])
    library = Library(tmp_path, (("c4/validation", "mine/c4.jsonl"),))
    assert load_text("c4", "test", library).text == "one two"
    with pytest.raises(FileNotFoundError, match=r"data.files gives 'mine/c5.jsonl' for c4/validation"):
        load_text("c4", "test", Library(tmp_path, (("c4/validation", "mine/c5.jsonl"),)))


def test_values_of_several_kinds_are_kept_as_text(tmp_path):
    write_lines(
        tmp_path / "longctx" / "longeval_lines_2.jsonl", [{"key": ["a", 1], "n": 1}, {"key": [2], "n": 2}]
    )
    data = Library(tmp_path).rows(Source("longeval", "lines"), "test").data
    assert [json.loads(key) for key in data["key"]] == [["a", 1], [2]]
    assert list(data["n"]) == [1, 2]


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", CORPORA)
def test_a_missing_corpus_names_the_file_that_would_serve(name, tmp_path):
    use = next(iter(CORPORA[name].splits))
    with pytest.raises(FileNotFoundError) as caught:
        load_text(name, use, Library(tmp_path))
    source, split = CORPORA[name].source, CORPORA[name].splits[use]
    expected = Library(tmp_path).expected(source, split)
    assert expected in str(caught.value)
    assert str(source) in str(caught.value)
    first = expected.split(" or ")[0].replace("*", "")
    write_lines(tmp_path / first, [])  # where the message says
    assert Library(tmp_path).local(source, split) == [tmp_path / first]


def test_an_unknown_corpus_is_refused():
    with pytest.raises(ValueError, match="corpus is 'wikitext3', which is not known; did you mean wikitext2"):
        load_text("wikitext3", "test")
    with pytest.raises(ValueError, match="'alpaca', which has no text for it"):
        load_text("alpaca", "test")


def test_the_users_own_text_is_a_file_or_a_folder_and_counts_by_its_content(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    write_lines(tmp_path / "deeper" / "b.jsonl", [{"text": "second"}, {"text": "third"}])
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    text = load_text(str(tmp_path), "test")
    assert text.text == "first\n\nsecond\n\nthird"
    before = versioned(f"{tmp_path}/a.txt")
    assert before.startswith("a@")
    (tmp_path / "copy.txt").write_text("first")
    assert versioned(f"{tmp_path}/copy.txt").partition("@")[2] == before.partition("@")[2]
    with pytest.raises(FileNotFoundError, match="was not found; give a file or a folder"):
        load_text(f"{tmp_path}/none.txt", "test")
    write_lines(tmp_path / "c.jsonl", [{"content": "no text"}])
    with pytest.raises(ValueError, match="has the fields content; 'text' is needed"):
        load_text(f"{tmp_path}/c.jsonl", "test")


def test_c4_is_the_first_documents_joined_by_blanks(tmp_path, tokenizer):
    """c4-new: 1100 documents of the validation shard, 256 windows."""
    documents = [f"document number {i} about files and numbers" for i in range(1300)]
    file = dict(CORPORA["c4"].source.hub_files)["validation"]
    write_lines(tmp_path / "allenai" / "c4" / file, [{"text": d} for d in documents])
    text = load_text("c4", "test", Library(tmp_path))
    assert text.text == " ".join(documents[:1100])
    row = tokenize(text, tokenizer)
    assert torch.equal(evaluation_windows(text, tokenizer, 16).tokens.flatten(), row[: 256 * 16])


def test_c4_old_is_random_windows_inside_long_documents(tmp_path, tokenizer):
    short, long = ["too short"] * 5, [f"{i} words of a long document about files " * 20 for i in range(4)]
    write_lines(tmp_path / "c4.jsonl", [{"text": d} for d in short + long])
    text = load_text("c4_old", "test", Library(tmp_path, (("c4_old/validation", "c4.jsonl"),)))
    windows = evaluation_windows(text, tokenizer, 32)
    assert len(windows) == 256
    assert torch.equal(windows.tokens, evaluation_windows(text, tokenizer, 32).tokens)
    inside = [tokenizer(d, return_tensors="pt").input_ids[0].unfold(0, 32, 1) for d in long]
    assert all(any((rows == w).all(1).any() for rows in inside) for w in windows.tokens[:20])


def test_ptb_joins_sentences_by_blanks(tmp_path):
    write_lines(tmp_path / "ptb" / "test.jsonl", [{"sentence": "no it was n't"}, {"sentence": "black <unk>"}])
    assert load_text("ptb", "test", Library(tmp_path)).text == "no it was n't black <unk>"


def test_real_wikitext_has_its_published_size(shared_data):
    """245,569 words: the word count of WikiText-2's test split (Merity et al. 2016, Table 1, counts `<eos>` too)."""
    text = load_text("wikitext2", "test", Library(shared_data))
    rows = text.text.split("\n\n")
    assert "Robert Boulter" in text.text[:200]
    assert len(text.text.split()) + sum(1 for row in rows if row) == pytest.approx(245_569, rel=0.02)


@pytest.mark.parametrize("name", stdlib.NAMES)
def test_no_package_of_the_standard_library_is_in_two_splits(name):
    packages = {s: {m.split(".")[0] for m, _ in stdlib.load(name, s).documents} for s in stdlib.SPLITS[:2]}
    assert packages["test"].isdisjoint(packages["calibration"])
    assert min(len(stdlib.load(name, s).text) for s in stdlib.SPLITS[:2]) > 50_000


@pytest.mark.slow
@pytest.mark.parametrize("name", stdlib.NAMES)
def test_train_text_does_not_repeat_test_text(name):
    splits = {s: stdlib.load(name, s) for s in stdlib.SPLITS}
    seen = {x for _, text in splits["test"].documents for x in stdlib._shingles(text)}
    units = [u for _, text in splits["train"].documents for u in text.split("\n\n") if len(u.split()) > 20]
    repeated = [u for u in units if len(stdlib._shingles(u) & seen) > 0.5 * len(stdlib._shingles(u))]
    # Units are judged whole; what was glued together from short pieces of code may come near the limit.
    assert len(repeated) <= 0.002 * len(units)


def test_docs_are_prose_and_code_is_code():
    docs, code = (stdlib.load(name, "test").text for name in stdlib.NAMES)
    assert ">>>" not in docs
    assert docs.count("def ") < 0.01 * code.count("def ")
    assert code.count('"""') < 0.02 * code.count("def ") + 20


def test_tokens_of_all_embedded_models_cover_any_bytes(tokenizer):
    text = "naïve 漢字 \t\n\x00 ok"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert torch.is_tensor(tokenize(load_text("stdlib_docs", "test"), tokenizer))


def test_every_corpus_of_a_use_is_known():
    assert set(stdlib.NAMES) < set(known("test")) & set(known("calibration"))
    assert "c4_old" in known("test")
    assert "c4_old" not in known("calibration")
