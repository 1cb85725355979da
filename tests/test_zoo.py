"""What the embedded models must be: small, and good enough to tell recipes apart."""

import json
import lzma
import math
import re

import pytest
import torch

from qbench.algorithms.rtn import RTN
from qbench.data.corpora import load_text
from qbench.data.library import Library
from qbench.data.tokens import tokenize
from qbench.data.windows import Windows, evaluation_windows
from qbench.engine import quantize
from qbench.evaluate.harness import Ask, Harness
from qbench.evaluate.logits import whole
from qbench.evaluate.perplexity import window_losses
from qbench.models.family import family_of
from qbench.models.load import ModelRef
from qbench.quant.scheme import Scheme
from qbench.zoo import WEIGHTS, tasks
from qbench.zoo.train import RECIPES, train

MODELS = sorted(RECIPES)


@pytest.fixture(scope="module")
def micro():
    ref = ModelRef("zoo/micro-llama")
    return ref.load(), ref.tokenizer()


def test_all_models_fit_in_twenty_megabytes():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == set(MODELS)
    assert sum(path.stat().st_size for path in files) <= 20_000_000


@pytest.mark.parametrize("name", MODELS)
def test_every_input_width_is_a_multiple_of_128(name):
    model = ModelRef(f"zoo/{name}").load()
    for layer in model.get_submodule(family_of(model).blocks):
        for linear in family_of(model).linears(layer):
            assert layer.get_submodule(linear).in_features % 128 == 0
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_how_a_model_was_trained_is_shipped_with_it(name):
    history = json.loads((WEIGHTS / name / "training.json").read_text())
    assert history["recipe"] == vars(RECIPES[name])
    assert history["held_out_nll"].keys() == {"stdlib_docs", "stdlib_code"}


@pytest.mark.slow
def test_micro_llama_compresses_english_better_than_xz(micro):
    model, tokenizer = micro
    text = load_text("stdlib_docs", "test").text
    tokens = tokenize(load_text("stdlib_docs", "test"), tokenizer)
    windows = Windows.consecutive(tokens, 512)
    mean = float(window_losses(whole(model, windows.tokens, 4), windows).nll.mean())
    ours = mean / math.log(2) * len(tokens) / len(text.encode())
    xz = 8 * len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)) / len(text.encode())
    assert ours < 0.9 * xz


@pytest.mark.slow
def test_round_to_nearest_separates_the_widths(micro):
    _, tokenizer = micro
    windows = evaluation_windows(load_text("stdlib_docs", "test"), tokenizer, 512, 24)
    nll = {}
    for bits in (16, 4, 3, 2):
        model = ModelRef("zoo/micro-llama").load()
        quantize(model, RTN(), Scheme.of(wbits=bits, group_size=128))
        nll[bits] = window_losses(whole(model, windows.tokens, 4), windows).nll
    for better, worse in ((16, 4), (4, 3), (3, 2)):
        difference = nll[worse] - nll[better]
        stderr = difference.std() / len(difference) ** 0.5
        assert difference.mean() > 4 * stderr, f"w{better} against w{worse}"


@pytest.mark.slow
def test_micro_llama_is_far_above_chance(micro):
    asked = Harness(*micro, 32)
    metrics = asked.accuracy("stdlib_cloze", Library(), Ask()).metrics
    metrics |= asked.accuracy("stdlib_copy", Library(), Ask()).metrics
    assert metrics["acc/stdlib_cloze"] >= 0.55
    assert metrics["acc/stdlib_copy"] >= 0.3
    n = len(tasks.cloze())
    p = metrics["acc/stdlib_cloze"]
    assert metrics["acc/stdlib_cloze_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)), rel=1e-6)


def test_questions_are_seeded_and_fair():
    items = tasks.cloze()
    assert items == tasks.cloze()
    assert len(items) == 120
    assert {item["label"] for item in items} == {0, 1, 2, 3}
    assert all(len(set(item["choices"])) == 4 for item in items)
    copies = tasks.copying()
    assert len(copies) == 80
    for item in copies:
        *earlier, last = item["context"].split("\n")
        start = re.search(r"_*[A-Za-z]+$", last).group()
        endings = set(re.findall(rf"\b{start}(_\w+)", "\n".join(earlier)))
        assert endings == {item["target"]}, "one ending only, and on an earlier line"


@pytest.mark.slow
def test_training_resumes_where_it_was_killed(tmp_path):
    """A killed training ends with the weights of one that was not."""
    train("nano-llama", tmp_path / "a", tmp_path / "out-a", steps=4, log_every=2)
    train("nano-llama", tmp_path / "b", tmp_path / "out-b", steps=4, log_every=2, stop_after=2)
    assert not (tmp_path / "out-b").exists()
    train("nano-llama", tmp_path / "b", tmp_path / "out-b", steps=4, log_every=2)
    states = [ModelRef(str(tmp_path / out / "nano-llama")).load().state_dict() for out in ("out-a", "out-b")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
