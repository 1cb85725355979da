"""Corpora and calibration samples."""

import json

import pytest
import torch

from qbench.data.corpora import SOURCES, load_text, plain_file
from qbench.data.tokens import CalibrationSet, sha256, tokenize
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


def test_a_plain_file_under_data_root_serves(tmp_path):
    path = plain_file("wikitext2", "test", tmp_path)
    assert path == tmp_path / "wikitext2" / "wikitext-2-raw-v1_test.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    assert load_text("wikitext2", "test", tmp_path).text == "\n\n".join(ROWS)


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
    assert load_text("wikitext2", "test", tmp_path).text == "\n\n".join(ROWS)
    assert load_text("wikitext2", "calibration", tmp_path).text == "\n\n".join(ROWS[:2])


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", SOURCES)
def test_a_missing_corpus_names_the_file_that_would_serve(name, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_text(name, "test", tmp_path)
    assert str(plain_file(name, "test", tmp_path)) in str(caught.value)
    assert SOURCES[name].hub_id in str(caught.value)


def test_an_unknown_corpus_is_refused():
    with pytest.raises(ValueError, match="unknown corpus 'wikitext3'"):
        load_text("wikitext3", "test")


def test_calibration_samples_are_windows_of_the_text_and_reproducible(tokenizer):
    ours = CalibrationSet("stdlib_docs", n_samples=8, seq_len=64)
    tokens = ours.tokens(tokenizer)
    assert tokens.shape == (8, 64)
    assert sha256(tokens) == sha256(ours.tokens(tokenizer))
    row = tokenize(load_text("stdlib_docs", "calibration"), tokenizer)
    windows = row.unfold(0, 64, 1)
    assert all((windows == sample).all(1).any() for sample in tokens)


def test_set_length_count_and_seed_each_change_the_samples(tokenizer):
    base = {"name": "stdlib_docs", "n_samples": 8, "seq_len": 64, "seed": 0}
    others = [{"name": "stdlib_code"}, {"n_samples": 9}, {"seq_len": 65}, {"seed": 1}, {"name": "random"}]
    hashes = {sha256(CalibrationSet(**base | other).tokens(tokenizer)) for other in [{}, *others]}
    assert len(hashes) == len(others) + 1


def test_a_calibration_set_that_is_too_small_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"'stdlib_docs' has \d+ tokens.*lower calib.n_samples"):
        CalibrationSet("stdlib_docs", n_samples=10**6, seq_len=64).tokens(tokenizer)


def test_real_wikitext_has_its_published_size(shared_data):
    """245,569 words: the word count of WikiText-2's test split (Merity et al. 2016, Table 1, counts `<eos>` too)."""
    text = load_text("wikitext2", "test", shared_data)
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
