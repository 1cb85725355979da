"""Experts while they are calibrated: whose tokens are whose, and who got none."""

import pytest
import torch

from qbench.algorithms.awq import AWQScale
from qbench.algorithms.base import Pipeline
from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.rtn import RTN
from qbench.calib.block import Block
from qbench.calib.observers import Gram
from qbench.calib.routing import routed_tokens
from qbench.calib.stream import first_inputs
from qbench.engine import quantize
from qbench.measure import _noted
from qbench.models.family import family_of
from qbench.quant.grid import fake_quantize
from qbench.quant.scheme import Scheme

from .families import family_model
from .test_laws import logits

SCHEME = Scheme.of(3, group_size=8)
LAYERS = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def tokens():
    return torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def lonely():
    """A model whose first expert is never chosen: a channel that is large in every token speaks against it."""
    model = family_model("qwen3_moe")
    model.model.embed_tokens.weight[:, 0] = 0.1
    for block in model.model.layers:
        block.post_attention_layernorm.weight[0] = 1.0
        block.mlp.gate.weight[:, 0] = torch.tensor([-1000.0, 0.0, 0.0, 0.0])
    return model


def routed_by_hand(model, tokens):
    """By block: what enters the experts, and who is chosen, in one pass of the whole model."""
    met = []
    handles = [
        block.mlp.experts.register_forward_pre_hook(lambda _, args: met.append(args[:2]))
        for block in model.model.layers
    ]
    logits(model, tokens)
    for handle in handles:
        handle.remove()
    return met


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_expert_has_the_gram_matrix_of_its_own_tokens(batch_size, tokens):
    model = family_model("qwen3_moe")
    (x, chosen), _ = routed_by_hand(model, tokens)
    family = family_of(model)
    stream, kwargs = first_inputs(model, family, tokens, batch_size)
    block = Block(0, model.model.layers[0], family, stream, kwargs[0], torch.device("cpu"))
    counts = routed_tokens(stream, block.layer, block.kwargs, block.device)["mlp.experts"]
    found = block.observe(Gram)
    for index in range(4):
        own = x[(chosen == index).any(-1)]
        assert counts[index] == len(own)
        (link,) = [k for k in block.links if k.sinks[0] == f"mlp.experts.{index}.gate_proj"]
        torch.testing.assert_close(found[link][0], own.T @ own / len(own))
    assert counts.sum() == tokens.numel() * 2


def test_a_never_routed_expert_is_reported_and_rounded_to_nearest(lonely, tokens):
    before = {name: p.clone() for name, p in lonely.named_parameters()}
    result = quantize(lonely, GPTQ(), SCHEME, tokens)
    for index, report in enumerate(result.reports):
        assert report["experts"]["unseen"] == {"mlp.experts": [0]}
        assert report["experts"]["tokens"]["mlp.experts"][0] == 0
        for number in range(4):
            for layer in LAYERS:
                name = f"model.layers.{index}.mlp.experts.{number}.{layer}.weight"
                nearest = fake_quantize(before[name], SCHEME.weight)
                assert torch.equal(lonely.get_parameter(name), nearest) == (number == 0), name
    metrics = _noted(result)
    assert metrics["experts_unseen"] == 2
    assert metrics["expert_tokens_min"] == 0
    assert len(result.stored_bits) == 2 * (4 + 4 * 3)


def test_all_tokens_to_all_experts_leaves_none_without_data(lonely, tokens):
    before = {name: p.clone() for name, p in lonely.named_parameters()}
    result = quantize(lonely, GPTQ(), SCHEME, tokens, experts="all")
    report = result.reports[0]["experts"]
    assert report["routed"]["mlp.experts"][0] == 0  # which is reported all the same
    assert report["unseen"] == {"mlp.experts": []}
    assert report["tokens"]["mlp.experts"] == [tokens.numel()] * 4
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    assert not torch.equal(lonely.get_parameter(name), fake_quantize(before[name], SCHEME.weight))


def test_with_all_tokens_a_common_inputs_statistics_are_equal(tokens):
    model = family_model("qwen3_moe")
    seen = {}

    class Listen(RTN):
        needs_data = True

        def process(self, block):
            for link, (gram,) in block.observe(Gram).items():
                if link.sinks[0].endswith("experts.0.gate_proj") or link.sinks[0].endswith(
                    "experts.1.gate_proj"
                ):
                    seen[block.index, link.sinks[0]] = gram

    quantize(model, Listen(), SCHEME, tokens, experts="all")
    first, second = (seen[0, f"mlp.experts.{i}.gate_proj"] for i in range(2))
    torch.testing.assert_close(first, second)


def test_a_static_range_of_an_expert_without_tokens_is_refused(lonely, tokens):
    scheme = Scheme.of(4, 8, act_granularity="tensor")
    with pytest.raises(
        ValueError, match=r"no calibration token was routed to mlp\.experts\.0.*calib\.experts=all"
    ):
        quantize(lonely, Pipeline((AWQScale(), RTN())), scheme, tokens)


def test_routers_stay_in_floating_point_and_follow_their_norm(tokens):
    model = family_model("qwen2_moe")
    before = {name: p.clone() for name, p in model.named_parameters()}
    quantize(model, Pipeline((AWQScale(), RTN())), Scheme.of(4, group_size=8), tokens)
    for name in ("mlp.gate.weight", "mlp.shared_expert_gate.weight"):
        path = f"model.layers.1.{name}"
        norm = "model.layers.1.post_attention_layernorm.weight"
        s = before[norm] / model.get_parameter(norm)
        assert not torch.equal(s, torch.ones_like(s))
        torch.testing.assert_close(model.get_parameter(path), before[path] * s)


@pytest.mark.parametrize("seed", range(6))
def test_an_expert_whose_tokens_go_elsewhere_after_rounding_is_rounded_to_nearest_and_told(seed, monkeypatch):
    model = family_model("granitemoe")
    block = model.model.layers[0]
    tokens = torch.randint(0, 96, (1, 6), generator=torch.Generator().manual_seed(seed))
    before = {name: p.clone() for name, p in model.named_parameters()}
    experts = block.block_sparse_moe.experts
    original = type(experts).forward

    def elsewhere(self, x, index, weights):
        """Once attention is rounded nobody goes to the last expert any more."""
        rounded = not torch.equal(
            block.self_attn.o_proj.weight, before["model.layers.0.self_attn.o_proj.weight"]
        )
        if self is experts and rounded:
            index = torch.where(index == 3, (index + 1) % 3, index)
        return original(self, x, index, weights)

    monkeypatch.setattr(type(experts), "forward", elsewhere)
    result = quantize(model, GPTQ(), SCHEME, tokens)
    report = result.reports[0]["experts"]
    if report["tokens"]["block_sparse_moe.experts"][3]:
        assert "block_sparse_moe.experts.3" in report["missed"]
    name = "model.layers.0.block_sparse_moe.experts.3.up_proj.weight"
    assert torch.equal(model.get_parameter(name), fake_quantize(before[name], SCHEME.weight))
