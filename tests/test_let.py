"""Equivalent transformations leave the function of a block unchanged, whatever is learned."""

from dataclasses import dataclass, field, replace

import pytest
import torch

from qbench.algorithms.base import Pipeline
from qbench.algorithms.let import LinkScale, ProductScale, initial_edits, transformed
from qbench.algorithms.rtn import RTN
from qbench.engine import quantize
from qbench.quant.scheme import Scheme

from .conftest import random_model

TOLERANCE = 1e-5  # RMSNorm computes in float32 whatever the dtype


@dataclass(frozen=True)
class Listen(RTN):
    """Does nothing, on calibration data."""

    needs_data = True
    heard: list = field(default_factory=list)

    def process(self, block):
        self.heard.append(block)


def blocks_of(model, tokens, scheme):
    listener = Listen()
    quantize(model, Pipeline((listener,)), Scheme(), tokens)
    return [replace(block, scheme=scheme) for block in listener.heard]


def disturb(edits):
    generator = torch.Generator().manual_seed(0)
    for edit in edits:
        for tensor in edit.trained:
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator).to(tensor)


@pytest.mark.parametrize("scheme", [Scheme.of(4, 8), Scheme.of(4, 8, quant_bmm=True)], ids=str)
def test_every_transformation_leaves_the_function_unchanged(model, tokens, scheme):
    for block in blocks_of(model, tokens, scheme):
        edits = initial_edits(block, 0.5)
        assert edits
        disturb(edits)
        changed = transformed(dict(block.layer.named_parameters()), edits)
        before, after = block.run(block.inputs.hidden), block.run(block.inputs.hidden, changed)
        torch.testing.assert_close(after, before, rtol=0, atol=TOLERANCE * before.abs().max().item())
        assert all((p - block.layer.get_parameter(n)).abs().max() > 1e-3 for n, p in changed.items())


def test_there_are_shifts_where_there_are_biases(tokens):
    def shifted(name):
        edits = initial_edits(blocks_of(random_model(name), tokens, Scheme.of(4, 8))[0], 0.5)
        return {edit.link.source: edit.shift is not None for edit in edits}

    assert shifted("opt") == {
        "self_attn_layer_norm": True,
        "self_attn.v_proj": True,
        "final_layer_norm": True,
    }
    assert not any(shifted("llama").values())
    assert not any(shifted("qwen2").values())  # its norms have no bias, nor has its output projection


@pytest.mark.parametrize(
    ("name", "scaled"), [("llama", True), ("llama-gqa-tied", True), ("opt", True), ("qwen3", False)]
)
def test_queries_and_keys_are_scaled_where_nothing_undoes_it(name, scaled, tokens):
    def products(scheme):
        edits = initial_edits(blocks_of(random_model(name), tokens, scheme)[0], 0.5)
        return [edit for edit in edits if isinstance(edit, ProductScale)]

    assert bool(products(Scheme.of(4, 4, quant_bmm=True))) == scaled
    assert bool(products(Scheme.of(4, 4, 4))) == scaled
    assert not products(Scheme.of(4, 4)), "rows have scales of their own"


def test_scales_start_from_smoothquant(tokens):
    block = blocks_of(random_model("llama"), tokens, Scheme.of(4, 8))[0]
    edit = initial_edits(block, 0.7)[0]
    assert isinstance(edit, LinkScale)
    seen = []
    handle = block.linear("self_attn.k_proj").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block.run(block.inputs.hidden)
    handle.remove()
    for channel in range(seen[0].shape[-1]):
        x = max(abs(v) for v in seen[0][..., channel].flatten().tolist())
        w = max(
            abs(v) for k in "qkv" for v in block.linear(f"self_attn.{k}_proj").weight[:, channel].tolist()
        )
        assert float(edit.log_scale[channel].exp()) == pytest.approx(x**0.7 / w**0.3, rel=1e-9)


def test_shifted_channels_lie_around_zero(tokens):
    block = blocks_of(random_model("opt"), tokens, Scheme.of(4, 8))[0]
    edits = initial_edits(block, 0.5)
    for name, parameter in transformed(dict(block.layer.named_parameters()), edits).items():
        block.layer.get_parameter(name).copy_(parameter)
    for edit in initial_edits(block, 0.5):
        assert edit.shift.abs().max() < TOLERANCE
