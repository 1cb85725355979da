"""Adapters make up for rounding, beside weights that stay on their grids, and are counted."""

import copy

import pytest
import torch

from qbench.algorithms.base import Pipeline
from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.lora import LoRA, add_adapter
from qbench.algorithms.rtn import RTN
from qbench.deploy.size import size_metrics
from qbench.engine import quantize
from qbench.quant.scheme import Scheme

from .conftest import random_model

SCHEME = Scheme.parse("w2a16g16")


def compensated(tokens, scheme=SCHEME, rounder=None, **options):
    model = random_model("llama")
    result = quantize(model, Pipeline((rounder or RTN(), LoRA(epochs=4, **options))), scheme, tokens)
    return model, result


@pytest.mark.parametrize("rounder", [RTN(), GPTQ()], ids=lambda r: type(r).__name__)
def test_the_error_is_less_and_the_weights_are_those_of_the_rounder(rounder, tokens):
    """GPTQ remembers the block's output, which the adapters change without changing a parameter."""
    rounded = random_model("llama")
    quantize(rounded, rounder, SCHEME, tokens)
    model, better = compensated(tokens, rounder=rounder)
    losses = [report["lora_loss"] for report in better.reports]
    assert all(last < 0.9 * first for first, last in losses)
    first = rounded.model.layers[0], model.model.layers[0]
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in first), strict=True))
    worse = quantize(random_model("llama"), Pipeline((rounder, LoRA(epochs=1, lr=1e-12))), SCHEME, tokens)
    assert better.errors[0] < worse.errors[0]


def test_an_adapter_adds_what_its_formula_says():
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(6, 4, dtype=torch.float64).requires_grad_(False)
    plain = copy.deepcopy(layer)
    add_adapter(layer, 2, 2.5, generator)
    x = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    assert torch.equal(layer(x), plain(x)), "an adapter is nothing at first"
    layer.lora_b.normal_(generator=generator)
    for i in range(3):
        inner = [float(row @ x[i]) for row in layer.lora_a]
        for j in range(4):
            added = 2.5 * sum(float(b) * h for b, h in zip(layer.lora_b[j], inner, strict=True))
            assert float(layer(x)[i, j]) == pytest.approx(float(plain(x)[i, j]) + added, rel=1e-12)


def test_a_copy_has_adapters_of_its_own_that_move_with_it(tokens):
    model, _ = compensated(tokens)
    with torch.no_grad():
        before = model(tokens).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(tokens).logits, before)
        for name, buffer in twin.named_buffers():
            if "lora_b" in name:
                buffer.zero_()
        assert not torch.equal(twin(tokens).logits, before)
        assert torch.equal(model(tokens).logits, before), "evaluating twice gives the same"
        single = copy.deepcopy(model).float()
        assert single.model.layers[0].mlp.up_proj.lora_a.dtype == torch.float32
        tolerance = 1e-4 * before.abs().max().item()  # float32 through two blocks
        torch.testing.assert_close(single(tokens).logits.double(), before, rtol=0, atol=tolerance)


def test_adapters_are_counted_once_at_half_precision(tokens):
    r = 3
    model, result = compensated(tokens, r=r)
    layers = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    added = 16 * r * sum(layer.in_features + layer.out_features for layer in layers)
    assert result.extra_bits == added
    n = sum(p.numel() for p in random_model("llama").parameters())
    with_them, without = (size_metrics(model, n, result.stored_bits, x)["model_mb"] for x in (added, 0.0))
    assert with_them - without == pytest.approx(added / 8e6)


def test_layers_in_floating_point_have_no_adapter(tokens):
    scheme = Scheme.of(2, group_size=16, overrides={"down_proj": "w16a16"})
    model, _ = compensated(tokens, scheme)
    adapted = {name.rpartition(".")[2] for name, m in model.named_modules() if hasattr(m, "lora_a")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


def test_equal_seeds_give_equal_adapters_and_others_do_not(tokens):
    def adapter(seed):
        return compensated(tokens, seed=seed)[0].model.layers[1].mlp.up_proj.lora_b

    assert torch.equal(adapter(0), adapter(0))
    assert not torch.equal(adapter(0), adapter(1))


def test_divergence_names_the_block(tokens):
    with pytest.raises(FloatingPointError, match=r"block 0: lora .* lower its learning rate"):
        compensated(tokens, lr=1e3)
