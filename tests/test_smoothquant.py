"""SmoothQuant against its equation, channel by channel."""

import pytest
import torch

from qbench.algorithms.base import Pipeline
from qbench.algorithms.smoothquant import SmoothQuant
from qbench.engine import quantize
from qbench.errors import Unsuitable
from qbench.quant.scheme import Scheme

from .conftest import random_model
from .reference import smoothquant as reference
from .test_engine import captured
from .test_laws import Keep

LINKS = {
    "llama": [
        ("input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
    ],
    "opt": [
        ("self_attn_layer_norm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("final_layer_norm", ["fc1"]),
    ],
}
PATH = {"llama": "model.layers.0", "opt": "model.decoder.layers.0"}


@pytest.mark.parametrize("alpha", [0.5, 0.85])
@pytest.mark.parametrize("name", LINKS)
def test_a_channel_is_divided_by_what_equation_4_says(name, alpha, tokens, monkeypatch):
    monkeypatch.setattr("qbench.calib.activations.quantize_input", lambda *_: None)
    plain, smooth = random_model(name), random_model(name)
    quantize(smooth, Pipeline((SmoothQuant(alpha), Keep())), Scheme.of(8, 8), tokens)
    before, after = (model.get_submodule(PATH[name]) for model in (plain, smooth))
    touched = set()
    for source, sinks in LINKS[name]:
        x = captured(plain, tokens, f"{PATH[name]}.{sinks[0]}").flatten(0, -2)
        weights = [before.get_submodule(sink).weight for sink in sinks]
        s = torch.tensor(reference.scales(x, weights, alpha), dtype=torch.float64)
        for sink, w in zip(sinks, weights, strict=True):
            # RMSNorm computes in float32, so the observed peaks are known to 1e-7 only; powers keep that.
            torch.testing.assert_close(after.get_submodule(sink).weight, w * s, rtol=1e-6, atol=0)
            touched.add(f"{sink}.weight")
        for key, p in before.get_submodule(source).named_parameters():
            torch.testing.assert_close(
                after.get_submodule(source).get_parameter(key), p / s, rtol=1e-6, atol=0
            )
            touched.add(f"{source}.{key}")
    for key, p in before.named_parameters():
        assert torch.equal(p, after.get_parameter(key)) == (key not in touched)


def test_without_activation_bits_there_is_nothing_to_do():
    with pytest.raises(Unsuitable, match="needs activation bits"):
        SmoothQuant().check(Scheme.parse("w4a16"))
    with pytest.raises(ValueError, match="between 0 and 1"):
        SmoothQuant(alpha=1.5)
