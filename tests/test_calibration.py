"""Calibration samples: every recipe as its paper has it, the same for the same seed, and apart from the evaluation text."""

import random

import numpy as np
import pytest
import torch

from qbench.calib.sampling import sampled
from qbench.data.calibration import CalibrationSet
from qbench.data.corpora import CORPORA, load_text
from qbench.data.library import Library
from qbench.data.overlap import RUN, SHORTEST, overlap, signature
from qbench.data.tokens import document_tokens, sha256, tokenize
from qbench.models.load import ModelRef

from .test_data import write_lines

WORDS = ["files", "numbers", "names", "lines", "values", "lists", "types", "modules", "paths", "strings"]


def made_up(n: int, low: int = 5, high: int = 90) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(low, high))) + f" {i}" for i in range(n)]


@pytest.fixture(scope="module")
def tokenizer():
    return ModelRef("zoo/nano-llama").tokenizer()


@pytest.fixture
def pile(tmp_path):
    write_lines(tmp_path / "pileval" / "validation.jsonl", [{"text": d} for d in made_up(300)])
    return Library(tmp_path)


def test_calibration_samples_are_windows_of_the_text_and_reproducible(tokenizer):
    ours = CalibrationSet("stdlib_docs", n_samples=8, seq_len=64)
    tokens = ours.tokens(tokenizer)
    assert tokens.shape == (8, 64)
    assert sha256(tokens) == sha256(ours.tokens(tokenizer))
    row = tokenize(load_text("stdlib_docs", "calibration"), tokenizer)
    windows = row.unfold(0, 64, 1)
    assert all((windows == sample).all(1).any() for sample in tokens)


def test_set_length_count_seed_and_recipe_each_change_the_samples(tokenizer, pile):
    base = {"name": "pileval", "n_samples": 8, "seq_len": 64, "seed": 0}
    others = [{"name": "stdlib_code"}, {"n_samples": 9}, {"seq_len": 65}, {"seed": 1}, {"name": "random"}]
    others += [{"recipe": recipe} for recipe in ("windows", "document", "truncate")]
    sets = [CalibrationSet(**base | other) for other in [{}, *others]]
    assert len({sha256(s.tokens(tokenizer, pile)) for s in sets}) == len(sets)
    assert len({str(s.identity()) for s in sets}) == len(sets)
    assert (
        len({s.label for s in sets if s.n_samples == 8 and s.seq_len == 64 and s.seed == 0}) == len(sets) - 3
    )


def test_the_same_set_gives_the_same_tokens_in_another_process(tokenizer, pile):
    import subprocess
    import sys

    code = (
        "from pathlib import Path; from qbench.data.calibration import CalibrationSet\n"
        "from qbench.data.library import Library; from qbench.data.tokens import sha256\n"
        "from qbench.models.load import ModelRef\n"
        f"s = CalibrationSet('pileval', 8, 64); library = Library(Path({str(pile.root)!r}))\n"
        "print(sha256(s.tokens(ModelRef('zoo/nano-llama').tokenizer(), library)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == sha256(CalibrationSet("pileval", 8, 64).tokens(tokenizer, pile))


def test_packing_follows_awq(tokenizer, pile):
    """Its code, in words: shuffle by 42; skip documents of more than a block; concatenate; cut."""
    from datasets import Dataset

    documents = Dataset.from_dict({"text": made_up(300)}).shuffle(seed=42)["text"]
    row: list[int] = []
    for document in documents:
        ids = tokenizer(document).input_ids
        if len(ids) <= 64:
            row += ids
    expected = torch.tensor(row[: 8 * 64]).view(8, 64)
    assert torch.equal(CalibrationSet("pileval", 8, 64).tokens(tokenizer, pile), expected)


def test_truncating_follows_smoothquant(tokenizer, pile):
    from datasets import Dataset

    documents = Dataset.from_dict({"text": made_up(300)}).shuffle(seed=42)["text"]
    long = [ids for d in documents if len(ids := tokenizer(d).input_ids) >= 64]
    found = CalibrationSet("pileval", 8, 64, recipe="truncate").tokens(tokenizer, pile)
    assert found.tolist() == [ids[:64] for ids in long[:8]]


def test_a_window_of_a_document_stays_inside_it(tokenizer, pile):
    tokens = CalibrationSet("pileval", 20, 64, recipe="document").tokens(tokenizer, pile)
    # GPTQ's code, in words: a document until one is long enough, then a place in it.
    rng, expected = random.Random(0), []
    documents = load_text("pileval", "calibration", pile).documents
    while len(expected) < 20:
        ids = tokenizer(documents[rng.randint(0, len(documents) - 1)]).input_ids
        if len(ids) > 64:
            start = rng.randint(0, len(ids) - 64 - 1)
            expected.append(ids[start : start + 64])
    assert tokens.tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "stdlib_docs", "n_samples": 10**6}, r"'stdlib_docs': it has \d+ tokens.*lower calib.n_samples"),
        ({"n_samples": 10**4}, r"'pileval': it has \d+ blocks of 64 tokens .*, 10000 were asked for"),
        ({"recipe": "truncate", "n_samples": 10**4}, r"'pileval/truncate': it has \d+ documents of 64 tokens or more"),
        ({"recipe": "document", "seq_len": 4000}, r"hardly any of 300 documents has more than 4000 tokens"),
    ],
)  # fmt: skip
def test_a_set_that_is_too_small_is_refused(change, message, tokenizer, pile):
    with pytest.raises(ValueError, match=message):
        CalibrationSet(**{"name": "pileval", "n_samples": 8, "seq_len": 64} | change).check(tokenizer, pile)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "wikitext3"}, "did you mean wikitext2"),
        ({"name": "random", "recipe": "pack"}, "calib.recipe=pack does not go with calib=random"),
        ({"name": "text"}, "calib=text needs calib.path"),
        ({"name": "c4", "path": "a.txt"}, "calib.path is of calib=text, not of calib=c4"),
        ({"name": "mix"}, "calib=mix needs calib.mix"),
        ({"name": "mix", "mix": (("c4", 0.0),)}, "weights above 0"),
        ({"name": "mix", "mix": (("c5", 1.0),)}, "calib.name is 'c5'"),
        ({"name": "c4", "n_samples": 0}, "calib.n_samples is 0"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CalibrationSet(**fields)


def test_a_mixture_has_its_parts_by_weight(tokenizer):
    mixed = CalibrationSet("mix", 10, 64, mix=(("stdlib_docs", 2.0), ("stdlib_code", 1.0), ("random", 0.5)))
    parts = [("random", 1), ("stdlib_code", 3), ("stdlib_docs", 6)]
    expected = torch.cat([CalibrationSet(name, n, 64).tokens(tokenizer) for name, n in parts])
    assert torch.equal(mixed.tokens(tokenizer), expected)
    assert mixed.label == "14%random+29%stdlib_code+57%stdlib_docs"
    doubled = CalibrationSet("mix", 10, 64, mix=(("stdlib_docs", 4.0), ("stdlib_code", 2.0), ("random", 1.0)))
    assert doubled.identity() == mixed.identity()


def test_own_text_counts_by_its_content_not_by_its_path(tokenizer, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("\n".join(made_up(40)))
    one, other = (CalibrationSet("text", 4, 64, path=f"{tmp_path}/{n}/mine.txt") for n in "ab")
    assert one.identity() == other.identity()
    assert one.label == "text:mine"
    assert torch.equal(one.tokens(tokenizer), other.tokens(tokenizer))


def test_the_model_writes_text_that_it_finds_likely_and_writes_it_again(tokenizer):
    model = ModelRef("zoo/nano-llama").load()
    tokens = sampled(model, 18, 64, seed=0)
    assert tokens.shape == (18, 64)
    assert torch.equal(tokens, sampled(model, 18, 64, seed=0))
    assert not torch.equal(tokens, sampled(model, 18, 64, seed=1))
    noise = torch.randint(len(tokenizer), tokens.shape, generator=torch.Generator().manual_seed(0))
    assert model(tokens, labels=tokens).loss < 0.6 * model(noise, labels=noise).loss


def test_conversations_go_through_the_models_template(tokenizer, tmp_path):
    import copy

    rows = [
        {"messages": [{"role": "user", "content": f"{q} ?"}, {"role": "assistant", "content": q}]}
        for q in made_up(30)
    ]
    write_lines(tmp_path / "ultrachat" / "train_sft.jsonl", rows)
    text = load_text("ultrachat", "calibration", Library(tmp_path))
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    plain, rendered = (tokenizer.decode(next(document_tokens(text, t, [0]))) for t in (tokenizer, chatty))
    question = rows[0]["messages"][0]["content"]
    assert rendered.startswith(f"<user>{question}<assistant>")
    assert plain.startswith(f"{question}\n")


@pytest.mark.parametrize("name", [n for n in CORPORA if "calibration" in CORPORA[n].splits])
def test_every_real_set_that_is_there_gives_samples(name, tokenizer, shared_data):
    library = Library(shared_data)
    corpus = CORPORA[name]
    if not library.local(corpus.source, corpus.splits["calibration"]):
        pytest.skip(f"{name} is not among the real data sets")
    tokens = CalibrationSet(name, 4, 256).tokens(tokenizer, library)
    assert tokens.shape == (4, 256)


def test_a_planted_overlap_is_found_and_nothing_else(tokenizer):
    text = tokenize(load_text("stdlib_docs", "test"), tokenizer)
    calibration = CalibrationSet("stdlib_docs", 10, 128).tokens(tokenizer)
    assert overlap(calibration, signature([text])) == 0
    calibration[3, 20 : 20 + RUN] = text[1000 : 1000 + RUN]
    calibration[7, 70 : 70 + RUN - 1] = text[5000 : 5000 + RUN - 1]  # one short of a passage
    calibration[7, 70 + RUN - 1 :] = 5
    assert overlap(calibration, signature([text])) == 0.1


def test_a_short_text_is_looked_for_as_a_whole(tokenizer):
    question = tokenizer(
        "Which of these five planets is nearest to the sun in the month of June?", return_tensors="pt"
    )
    question = question.input_ids[0]
    assert SHORTEST + 2 < len(question) < RUN
    calibration = CalibrationSet("stdlib_docs", 4, 128).tokens(tokenizer)
    calibration[2, 50 : 50 + len(question)] = question
    calibration[2, [50, 49 + len(question)]] = 7  # what stands around it makes other tokens of its ends
    assert overlap(calibration, signature([question, torch.arange(SHORTEST + 1)])) == 0.25
    calibration[2, 60] = 7
    assert overlap(calibration, signature([question])) == 0


def test_runs_are_compared_as_a_whole(monkeypatch):
    """Against a search by hand."""
    monkeypatch.setattr("qbench.data.overlap.RUN", 6)
    generator = torch.Generator().manual_seed(0)
    text, samples = (
        torch.randint(3, (400,), generator=generator),
        torch.randint(3, (60, 12), generator=generator),
    )
    runs = {tuple(w) for w in text.unfold(0, 6, 1).tolist()}
    expected = np.mean([any(tuple(w) in runs for w in s.unfold(0, 6, 1).tolist()) for s in samples])
    assert overlap(samples, signature([text])) == pytest.approx(expected)
    assert 0 < expected < 1
    assert overlap(samples, signature([text[:5]])) == 0


def test_the_order_of_a_mixture_is_of_no_account_and_every_part_has_a_sample(tokenizer):
    one = CalibrationSet("mix", 3, 32, mix=(("stdlib_docs", 1.0), ("stdlib_code", 1.0)))
    other = CalibrationSet("mix", 3, 32, mix=(("stdlib_code", 1.0), ("stdlib_docs", 1.0)))
    assert one.identity() == other.identity()
    assert torch.equal(one.tokens(tokenizer), other.tokens(tokenizer))
    with pytest.raises(ValueError, match=r"leaves some set of calib.mix without a sample"):
        CalibrationSet("mix", 3, 32, mix=(("stdlib_docs", 99.0), ("stdlib_code", 1.0)))
