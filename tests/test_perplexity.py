"""Perplexity against twenty independent lines."""

import math

import pytest
import torch

from qbench.evaluate.perplexity import perplexity


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
    tokens = torch.randint(0, 96, (32 * 7 + 5,), generator=torch.Generator().manual_seed(2))
    result = perplexity(model, "text", tokens, seq_len=32, batch_size=batch_size)
    expected, means = reference(model, tokens, 32)
    # Logits become float32 before the softmax: 1e-6 relative.
    assert result.metrics["ppl/text"] == pytest.approx(expected, rel=1e-6)
    assert [s["value"] for s in result.samples] == pytest.approx(means, rel=1e-6)
    spread = torch.tensor(means).double().std().item() / math.sqrt(len(means))
    assert result.metrics["ppl/text_stderr"] == pytest.approx(spread * expected, rel=1e-4)


def test_only_so_many_windows_are_read(llama):
    tokens = torch.randint(0, 96, (320,))
    few = perplexity(llama, "text", tokens, seq_len=32, max_windows=4)
    every = [s["value"] for s in perplexity(llama, "text", tokens, seq_len=32).samples]
    assert [s["value"] for s in few.samples] == pytest.approx([every[i] for i in (0, 3, 6, 9)])
    assert perplexity(llama, "text", tokens, seq_len=32, max_windows=99).samples[-1]["value"] == every[-1]


def test_a_text_that_is_too_short_is_refused(llama):
    with pytest.raises(ValueError, match=r"63 tokens, fewer than two windows of 32"):
        perplexity(llama, "text", torch.zeros(63, dtype=torch.long), seq_len=32)


def test_a_model_that_gives_nan_fails(llama):
    llama.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        perplexity(llama, "text", torch.zeros(128, dtype=torch.long), seq_len=32)
