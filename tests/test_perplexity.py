"""Perplexity against twenty independent lines, by every way to it."""

import math

import pytest
import torch

from qbench.algorithms.rtn import RTN
from qbench.data.corpora import Text
from qbench.data.tokens import byte_ends, tokenize
from qbench.data.windows import Windows, evaluation_windows
from qbench.engine import quantize
from qbench.evaluate.baseline import Reference, tail_of
from qbench.evaluate.decoding import decoded
from qbench.evaluate.logits import Tail, block_by_block, hopping, last_hidden, noted_hidden, whole
from qbench.evaluate.perplexity import perplexity, window_losses
from qbench.models.load import ModelRef
from qbench.quant.scheme import Scheme

from .conftest import perplexity_of

TOKENS = torch.randint(0, 96, (32 * 7 + 5,), generator=torch.Generator().manual_seed(2))


def reference(model, tokens, seq_len):
    """exp of the mean over windows of the mean negative log-likelihood of tokens 2 to seq_len."""
    means = []
    for start in range(0, len(tokens) - seq_len + 1, seq_len):
        window = tokens[start : start + seq_len]
        probabilities = torch.softmax(model(window[None]).logits[0].double(), dim=-1)
        losses = [-math.log(probabilities[i, window[i + 1]]) for i in range(seq_len - 1)]
        means.append(sum(losses) / len(losses))
    return math.exp(sum(means) / len(means)), means


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_perplexity_equals_the_reference(model, batch_size):
    result = perplexity_of(model, TOKENS, 32, batch_size)
    expected, means = reference(model, TOKENS, 32)
    # Logits become float32 before the softmax: 1e-6 relative.
    assert result.metrics["ppl/text"] == pytest.approx(expected, rel=1e-6)
    assert [s["value"] for s in result.samples] == pytest.approx(means, rel=1e-6)
    spread = torch.tensor(means).double().std().item() / math.sqrt(len(means))
    assert result.metrics["ppl/text_stderr"] == pytest.approx(spread * expected, rel=1e-4)


@pytest.mark.parametrize("scheme", ["w16a16", "w4a8", "w16a16kv4"])
def test_one_block_after_another_gives_the_same_perplexity(model, scheme):
    if scheme != "w16a16":
        quantize(model, RTN(), Scheme.parse(scheme))
    windows = Windows.consecutive(TOKENS, 32)
    at_once = window_losses(whole(model, windows.tokens, 3), windows).nll
    streamed = window_losses(block_by_block(model, windows.tokens, 3, "cpu"), windows).nll
    torch.testing.assert_close(streamed, at_once, rtol=1e-6, atol=0)
    with hopping(model, "cpu"):
        torch.testing.assert_close(window_losses(whole(model, windows.tokens, 3), windows).nll, at_once)


def test_streaming_has_one_block_on_the_device_at_a_time(llama, monkeypatch):
    """Where each block is while it works: seen by what is moved, on a machine without another device."""
    from torch import nn

    moved, move = [], nn.Module.to
    names = {id(block): f"block {i}" for i, block in enumerate(llama.model.layers)}

    def watched(self, *arguments, **more):
        moved.append(names.get(id(self), "rest"))
        return move(self, *arguments, **more)

    monkeypatch.setattr(nn.Module, "to", watched)
    list(block_by_block(llama, TOKENS[:64].view(2, 32), 1, "cpu"))
    assert moved == ["block 0", "block 0", "block 1", "block 1", "rest", "rest"]


@pytest.mark.parametrize("stride", [1, 8, 31])
def test_every_token_is_predicted_once_by_windows_that_overlap(llama, stride):
    windows = Windows.sliding(TOKENS, 32, stride)
    losses = window_losses(whole(llama, windows.tokens, 4), windows).nll
    n_predicted = (len(TOKENS) - 32) // stride * stride + 31
    assert int(windows.scored.sum()) == n_predicted
    total = 0.0
    for end in range(
        1, n_predicted + 1
    ):  # the token at `end`, after what its window holds of the text before it
        start = 0 if end < 32 else -(-(end - 31) // stride) * stride
        logits = llama(TOKENS[None, start:end]).logits[0, -1].double()
        total -= float(logits.log_softmax(-1)[TOKENS[end]])
    assert float((losses * windows.scored).sum()) == pytest.approx(total, rel=1e-6)
    ppl = perplexity("text", window_losses(whole(llama, windows.tokens, 4), windows), windows)
    assert ppl.metrics["ppl/text"] == pytest.approx(math.exp(total / n_predicted), rel=1e-6)


def text_of(words: str, name: str = "mine") -> Text:
    return Text(name, "test", (words,), "\n\n", "made up")


def test_bits_per_byte_are_those_of_the_text_that_was_predicted():
    ref = ModelRef("zoo/nano-llama")
    model, tokenizer = ref.load(), ref.tokenizer()
    text = text_of("Ein naïver Satz — 漢字 und 🎈, and some words of English about files. " * 20)
    tokens, ends = tokenize(text, tokenizer), byte_ends(text, tokenizer)
    assert ends[-1] == len(text.text.encode())
    windows = evaluation_windows(text, tokenizer, 64)
    losses = window_losses(whole(model, windows.tokens, 2), windows)
    # Byte-level tokens that end between characters: their bytes are the prefix's, decoded.
    for i, n_bytes in enumerate(windows.n_bytes.tolist()):
        first, last = tokens[: i * 64 + 1], tokens[: i * 64 + 64]
        sizes = [
            len(tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode()) for ids in (first, last)
        ]
        assert abs(n_bytes - (sizes[1] - sizes[0])) <= 6  # where a character is cut, by a part of it
    bits = float(losses.nll.sum()) * 63 / math.log(2)
    metrics = perplexity("mine", losses, windows).metrics
    assert metrics["bpb/mine"] == pytest.approx(bits / float(windows.n_bytes.sum()), rel=1e-9)


def test_only_so_many_windows_are_read_and_evenly_spread():
    tokenizer = ModelRef("zoo/nano-llama").tokenizer()
    text = text_of("one two three four five six seven eight nine ten " * 60)
    every = evaluation_windows(text, tokenizer, 32).tokens
    few = evaluation_windows(text, tokenizer, 32, 4).tokens
    picked = [round(i * (len(every) - 1) / 3) for i in range(4)]
    assert torch.equal(few, every[picked])
    assert torch.equal(evaluation_windows(text, tokenizer, 32, 9999).tokens, every)


def test_a_text_that_is_too_short_is_refused():
    tokenizer = ModelRef("zoo/nano-llama").tokenizer()
    with pytest.raises(
        ValueError, match=r"mine has \d+ tokens, fewer than two windows of 512; lower eval.seq_len"
    ):
        evaluation_windows(text_of("a few words"), tokenizer, 512)


def test_a_model_that_gives_nan_fails(llama):
    llama.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        perplexity_of(llama, torch.zeros(128, dtype=torch.long), 32)


def test_the_model_against_itself_differs_in_nothing(model):
    windows = Windows.consecutive(TOKENS, 32)
    with noted_hidden(model) as noted:
        list(whole(model, windows.tokens, 3))
    hidden = torch.cat(noted)
    tail = tail_of(model)
    losses = window_losses(
        whole(model, windows.tokens, 3), windows, lambda part, ids: tail(ids, hidden[part])
    )
    assert not losses.kl.any()
    assert (losses.agreement == 1).all()
    torch.testing.assert_close(
        last_hidden(model, windows.tokens, 3, torch.device("cpu")), hidden, rtol=1e-9, atol=1e-9
    )


def test_the_rest_of_the_model_makes_the_logits_of_before_however_it_is_edited_later(model):
    windows = TOKENS[:64].view(2, 32)
    with noted_hidden(model) as noted, torch.no_grad():
        before = model(windows).logits
    kept, shared = tail_of(model), Tail(model, share=True)
    assert sum(p.numel() for p in kept.model.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
        torch.testing.assert_close(kept(windows, noted[0]), before)
        torch.testing.assert_close(shared(windows, noted[0]), 2 * before)


def test_divergence_and_agreement_are_those_of_the_logits(llama):
    windows = Windows.consecutive(TOKENS, 32)
    with noted_hidden(llama) as noted:
        p = torch.cat([logits for *_, logits in whole(llama, windows.tokens, 4)]).double()
    tail, hidden = tail_of(llama), torch.cat(noted)
    quantize(llama, RTN(), Scheme.parse("w3a16"))
    q = torch.cat([logits for *_, logits in whole(llama, windows.tokens, 4)]).double()
    losses = window_losses(
        whole(llama, windows.tokens, 4), windows, lambda part, ids: tail(ids, hidden[part])
    )
    log_p, log_q = p[:, :-1].log_softmax(-1), q[:, :-1].log_softmax(-1)
    # The quantized model's logits become float32, with a relative error of 6e-8, where those of `q` are float64.
    torch.testing.assert_close(
        losses.kl, (log_p.exp() * (log_p - log_q)).sum(-1).mean(1), rtol=1e-4, atol=1e-6
    )
    same = (p.argmax(-1) == q.argmax(-1))[:, :-1].double().mean(1)
    torch.testing.assert_close(losses.agreement, same)
    assert 0 < float(losses.agreement.mean()) < 1
    assert Reference({}, tail).tail is tail


@pytest.fixture(scope="module")
def decoding():
    """Perplexity token by token, and at once, of nano-llama by bits of its cache."""
    found = {}
    for bits in (16, 8, 4, 2):
        ref = ModelRef("zoo/nano-llama")
        model, tokenizer = ref.load(), ref.tokenizer()
        from qbench.data.corpora import load_text

        windows = evaluation_windows(load_text("stdlib_docs", "test"), tokenizer, 128, 12)
        if bits < 16:
            quantize(model, RTN(), Scheme.of(kvbits=bits))
        stepwise = window_losses(decoded(model, windows.tokens, 12), windows).nll
        found[bits] = stepwise, window_losses(whole(model, windows.tokens, 12), windows).nll
    return found


def test_decoding_through_a_cache_in_floating_point_gives_the_same_perplexity(decoding):
    stepwise, at_once = decoding[16]
    # Sums in another order: of float32, over 128 tokens and 4 blocks.
    torch.testing.assert_close(stepwise, at_once, rtol=1e-5, atol=0)
    assert math.exp(stepwise.mean()) == pytest.approx(math.exp(at_once.mean()), rel=1e-4)


def test_fewer_bits_of_the_cache_decode_worse(decoding):
    ppl = {bits: math.exp(stepwise.mean()) for bits, (stepwise, _) in decoding.items()}
    assert ppl[2] > ppl[4] > ppl[8]
    assert ppl[8] == pytest.approx(ppl[16], rel=0.01)
    for bits in (8, 4, 2):  # what is evaluated at once sees the same keys and values
        torch.testing.assert_close(*decoding[bits], rtol=1e-3, atol=1e-3)


def test_a_model_whose_blocks_hop_is_back_where_it_was_even_after_a_failure(llama, monkeypatch):
    from torch import nn

    moved, move = [], nn.Module.to
    names = {id(block): f"block {i}" for i, block in enumerate(llama.model.layers)}
    monkeypatch.setattr(
        nn.Module, "to", lambda self, *a, **k: moved.append(names.get(id(self))) or move(self, *a, **k)
    )
    with hopping(llama, "cpu"):
        moved.clear()
        llama(TOKENS[:32][None])
        assert moved == ["block 0", "block 0", "block 1", "block 1"]
        assert len(llama.model.layers) == 2
    hooks = [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in llama.model.layers]
    assert hooks == [0, 0]
    with pytest.raises(RuntimeError, match="broken"), hopping(llama, "cpu"):
        raise RuntimeError("broken")
    assert {str(p.device) for p in llama.parameters()} == {"cpu"}
