"""Whoever uses a quantized model finds it as it was: evaluating, decoding and saving change nothing."""

import copy

import pytest
import torch

from qbench.algorithms.base import Pipeline
from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.llmint8 import LLMInt8
from qbench.algorithms.lora import LoRA
from qbench.algorithms.mse import MSEClip
from qbench.algorithms.omniquant import OmniQuant
from qbench.algorithms.quarot import QuaRot
from qbench.algorithms.rtn import RTN
from qbench.engine import quantize
from qbench.quant.scheme import Scheme

from .conftest import perplexity_of, random_model

RECIPES = {
    "weights": (GPTQ(), Scheme.parse("w3a16g16")),
    "static activations": (
        Pipeline((MSEClip(), RTN())),
        Scheme.of(8, 8, act_granularity="tensor"),
    ),
    "rotated online, products quantized": (
        Pipeline((QuaRot(), GPTQ())),
        Scheme.of(4, 4, 4, kv_rotate=True, quant_bmm=True),
    ),
    "a cache in KIVI's layout": (
        RTN(),
        Scheme.of(16, 16, 2, kv_layout="kivi", kv_group_size=4, kv_residual=8),
    ),
    "channels kept": (Pipeline((LLMInt8(), RTN())), Scheme.parse("w4a4")),
    "clipping learned, adapters": (
        Pipeline((OmniQuant(epochs=2), RTN(), LoRA(epochs=2))),
        Scheme.parse("w2a16g16"),
    ),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_evaluating_decoding_and_saving_never_change_a_model(name, recipe, tokens, tmp_path):
    model = random_model(name)
    quantize(model, *recipe, tokens)
    text = torch.randint(0, 96, (96,), generator=torch.Generator().manual_seed(2))
    before = copy.deepcopy(model.state_dict())
    first = [s["value"] for s in perplexity_of(model, text, 32).samples]
    with torch.no_grad():
        model.generate(text[None, :8], max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    again = [s["value"] for s in perplexity_of(model, text, 32).samples]
    assert first == again
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
