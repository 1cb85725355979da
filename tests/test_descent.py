"""Learned methods against their descent written out: which loss, of which weights, on which path, at which rates.

On OPT, whose norms compute in float64: RMSNorm's float32 would decide over gradients that are nearly zero.
"""

import torch
from torch.func import functional_call

from qbench.algorithms.lora import LoRA
from qbench.algorithms.normtweaking import NormTweaking
from qbench.algorithms.rtn import nearest
from qbench.algorithms.zeroquant import LKD

from .conftest import random_model
from .reference.descent import descend
from .reference.gptq import grid
from .test_autoround import SIZE, first_block, grouped_scheme

BITS, STEPS = 3, 4
CLOSE = dict(rtol=1e-7, atol=1e-9)  # float64, in another order


def block_of(tokens, rounded):
    """The first block of a model, with its weights rounded to nearest if `rounded`."""
    block = first_block(random_model("opt"), tokens, grouped_scheme(BITS))
    if rounded:
        with torch.no_grad():
            for name, linear in block.linears.items():
                linear.weight.copy_(nearest(block, name)[0])
    return block


def output(block, hidden, parameters):
    out = functional_call(block.layer, parameters, (hidden,), block.kwargs)
    return out[0] if isinstance(out, tuple) else out


def snapped(w):
    """`w` on its min-max grid; gradients pass as if it were not."""
    scale, zero = (p[..., None] for p in grid(w.detach(), BITS, SIZE))
    codes = (w.detach().unflatten(1, (-1, SIZE)) / scale).round() + zero
    return w + ((codes.clamp(0, 2**BITS - 1) - zero) * scale).flatten(1) - w.detach()


def test_distillation_trains_weights_through_their_rounding_on_the_floating_point_path(tokens):
    block, rate = block_of(tokens, rounded=False), 1e-4
    x, target = block.float_inputs.hidden, block.float_outputs.hidden
    weights = {f"{name}.weight": linear.weight.clone() for name, linear in block.linears.items()}

    def loss(w):
        return (output(block, x, {name: snapped(v) for name, v in w.items()}) - target).square().mean()

    trained = descend(loss, weights, [rate * (1 - t / STEPS) for t in range(STEPS)])
    LKD(steps=STEPS, batch_size=len(tokens), lr=rate).process(block)
    for name, w in trained.items():
        torch.testing.assert_close(block.layer.get_parameter(name), snapped(w), **CLOSE)


def test_norms_are_tweaked_by_the_distance_of_channel_distributions(tokens):
    block, rate = block_of(tokens, rounded=True), 1e-4
    x, target = block.inputs.hidden, block.float_outputs.hidden
    norms = {n: p.clone() for n, p in block.layer.named_parameters() if "norm" in n}
    assert len(norms) == 4

    def loss(parameters):
        y = output(block, x, parameters).flatten(0, 1)
        t = target.flatten(0, 1)
        return ((y.mean(0) - t.mean(0)).abs() + (y.var(0) - t.var(0)).abs()).mean()

    trained = descend(loss, norms, [rate] * STEPS)
    NormTweaking(lr=rate, epochs=STEPS, batch_size=len(tokens)).process(block)
    for name, p in trained.items():
        torch.testing.assert_close(block.layer.get_parameter(name), p, **CLOSE)


def test_adapters_are_trained_by_the_squared_error_at_falling_rates(tokens):
    def step(rate):
        return LoRA(r=2, alpha=3.0, lr=rate, epochs=STEPS, batch_size=len(tokens))

    def adapters(block, rate):
        step(rate).process(block)
        return {n: b.clone() for n, b in block.layer.named_buffers() if n.endswith(("lora_a", "lora_b"))}

    start = adapters(block_of(tokens, rounded=True), 1e-300)
    block = block_of(tokens, rounded=True)
    x, target = block.inputs.hidden, block.float_outputs.hidden
    weights = {name: linear.weight.clone() for name, linear in block.linears.items()}

    def loss(parts):
        merged = {
            f"{name}.weight": w + 1.5 * parts[f"{name}.lora_b"] @ parts[f"{name}.lora_a"]
            for name, w in weights.items()
        }
        return (output(block, x, merged) - target).square().mean()

    trained = descend(loss, start, [1e-3 * (1 - t / STEPS) for t in range(STEPS)])
    learned = adapters(block, 1e-3)
    for name, part in trained.items():
        torch.testing.assert_close(learned[name], part, **CLOSE)
