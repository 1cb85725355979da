"""QuaRot against explicit matrices, and what rotations must leave alone."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from qbench.algorithms.awq import AWQScale
from qbench.algorithms.base import Pipeline
from qbench.algorithms.quarot import QuaRot
from qbench.algorithms.rtn import RTN
from qbench.deploy.size import size_metrics
from qbench.engine import quantize
from qbench.models.family import family_of
from qbench.models.rotate import is_rotated_online
from qbench.models.surgery import migrate_scale
from qbench.quant.grid import fake_quantize
from qbench.quant.hadamard import hadamard, random_hadamard
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec

from .conftest import COMMON, CONFIGS, LLAMA, random_model
from .reference import quarot as reference
from .test_laws import Keep, assert_same_function, logits
from .test_outliers import PRE_NORM

EPS = torch.finfo(torch.float64).eps


def rotate(model, **choices):
    return QuaRot(**choices).prepare(model, Scheme(), None)["quarot"]


def dense(model):
    """The matrices of QuaRot with seed 0."""
    config = model.config
    q = random_hadamard(config.hidden_size, torch.Generator().manual_seed(0))
    return q, *(hadamard(n) for n in (config.head_dim, config.num_attention_heads, config.intermediate_size))


def given(model, tokens):
    """By path: what enters every linear layer of the blocks."""
    seen, family = {}, family_of(model)
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, args, key=f"{index}.{name}": seen.update({key: args[0]})
        )
        for index, block in enumerate(model.get_submodule(family.blocks))
        for name in family.linears(block)
    ]
    logits(model, tokens)
    for handle in handles:
        handle.remove()
    return seen


def random_of(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    for name, p in model.named_parameters():
        if "norm" in name or "bias" in name:
            p.data.normal_(mean=0.5)
    return model.requires_grad_(False)


@pytest.mark.parametrize("name", ["llama", "llama-gqa-tied"])
def test_weights_are_those_of_the_explicit_matrices(name):
    model = random_model(name)
    expected = reference.rotated_weights(model, *dense(model))
    rotate(model)
    assert set(expected) == set(model.state_dict())
    for path, w in expected.items():
        # Products over up to 112 terms of weights below 10.
        assert (model.state_dict()[path] - w).abs().max() <= 112 * EPS * 10, path


@pytest.mark.parametrize("name", ["llama", "llama-gqa-tied"])
def test_every_layer_is_given_its_input_rotated(name, tokens):
    model = random_model(name)
    before, matrices = given(model, tokens), reference.matrices(model, *dense(model))
    gains = {
        f"{i}.{layer}": reference.gain_in_front(block, layer).clone()
        for i, block in enumerate(model.model.layers)
        for _, layers in family_of(model).readers(block)
        for layer in layers
    }
    rotate(model)
    for path, x in given(model, tokens).items():
        expected = before[path] / gains.get(path, 1.0) @ matrices[path.split(".", 1)[1]][0]
        # RMSNorm computes in float32.
        assert (x - expected).abs().max() <= 1e-5 * expected.abs().max(), path


@pytest.mark.parametrize("name", PRE_NORM)
@pytest.mark.parametrize("choices", [{"online": False}, {"rotation": "orthogonal"}, {"seed": 1}], ids=str)
def test_no_choice_changes_the_function(choices, name, tokens):
    model = random_model(name)
    before = logits(model, tokens)
    rotate(model, **choices)
    assert_same_function(model, tokens, before)


@pytest.mark.parametrize(
    "change",
    [{"enable_bias": False}, {"layer_norm_elementwise_affine": False}, {"tie_word_embeddings": False}],
    ids=str,
)
def test_layer_norms_with_and_without_parameters_become_rms_norms(change, tokens):
    model = random_of(OPTConfig(**COMMON, ffn_dim=112, word_embed_proj_dim=48, **change))
    before = logits(model, tokens)
    rotate(model)
    assert not any(isinstance(m, torch.nn.LayerNorm) for m in model.modules())
    assert_same_function(model, tokens, before)


@pytest.mark.parametrize(
    "change",
    [{"do_layer_norm_before": False}, {"_remove_final_layer_norm": True}, {"word_embed_proj_dim": 24}],
    ids=str,
)
def test_a_stream_that_cannot_be_rotated_is_refused(change):
    config = OPTConfig(**COMMON | {"ffn_dim": 112, "word_embed_proj_dim": 48} | change)
    with pytest.raises(NotImplementedError, match="residual stream of this model cannot be rotated"):
        rotate(random_of(config))


@pytest.mark.parametrize(
    ("n_heads", "head_dim", "ffn", "expected"),
    [
        (4, 12, 112, {"residual": "hadamard", "heads": "hadamard", "attention_out": "heads"}),
        (6, 12, 112, {"residual": "hadamard", "heads": "hadamard", "attention_out": "width"}),
        (14, 4, 20, {"residual": "hadamard", "heads": "hadamard", "attention_out": "width"}),
        (4, 6, 20, {"residual": "hadamard", "heads": "orthogonal", "attention_out": "heads"}),
    ],
)
def test_sizes_without_a_hadamard_matrix(n_heads, head_dim, ffn, expected, tokens):
    """Heads that cannot be mixed by one are mixed together with their channels."""
    sizes = {
        "hidden_size": n_heads * head_dim,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_heads,
    }
    model = random_of(LlamaConfig(**LLAMA | sizes | {"intermediate_size": ffn}))
    before = logits(model, tokens)
    assert rotate(model) == expected
    assert_same_function(model, tokens, before)


@pytest.mark.parametrize(
    "sizes", [{"intermediate_size": 30}, {"hidden_size": 54, "num_attention_heads": 9}], ids=str
)
def test_an_online_rotation_without_a_hadamard_matrix_is_refused(sizes, tokens):
    config = LlamaConfig(**LLAMA | {"num_key_value_heads": None} | sizes)
    with pytest.raises(ValueError, match=r"algo\.online=false"):
        rotate(random_of(config))
    model = random_of(config)
    before = logits(model, tokens)
    assert rotate(model, online=False)["residual"] == (
        "orthogonal" if config.hidden_size == 54 else "hadamard"
    )
    assert_same_function(model, tokens, before)


def test_quantizers_meet_inputs_that_are_rotated_already(llama, tokens):
    rotated = copy.deepcopy(llama)
    rotate(rotated)
    quantize(llama, Pipeline((QuaRot(), RTN())), Scheme.parse("w16a4"))
    down = llama.model.layers[0].mlp.down_proj
    x = torch.randn(3, 112, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = fake_quantize(x @ hadamard(112), QuantSpec(4, symmetric=True)) @ down.weight.T
    torch.testing.assert_close(down(x), expected, rtol=0, atol=112 * EPS * 10)
    assert torch.equal(down.weight, rotated.model.layers[0].mlp.down_proj.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_in_another_dtype_is_rotated_too(dtype, llama, tokens):
    before = logits(llama, tokens)
    rotate(llama)
    twin = copy.deepcopy(llama).to(dtype)
    after = logits(twin, tokens)
    assert after.dtype == dtype
    # Some twenty roundings follow one another in two blocks; their errors add up like a random walk at best.
    assert (after - before).abs().max() <= 20 * torch.finfo(dtype).eps * before.abs().max()


def test_a_tied_head_gets_weights_of_its_own_and_they_count(tokens):
    model = random_model("llama-gqa-tied")
    n_before = sum(p.numel() for p in model.parameters())
    quantized = quantize(model, Pipeline((QuaRot(), RTN())), Scheme.parse("w4a16"))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings
    assert CONFIGS["llama-gqa-tied"].tie_word_embeddings, "models of the same configuration stay tied"
    plain = random_model("llama-gqa-tied")
    sizes = [
        size_metrics(m, n_before, q.stored_bits)["model_mb"]
        for m, q in ((model, quantized), (plain, quantize(plain, RTN(), Scheme.parse("w4a16"))))
    ]
    assert sizes[0] - sizes[1] == pytest.approx(96 * 48 * 16 / 8e6)
    assert quantized.report["quarot"]["residual"] == "hadamard"


def test_a_rotated_model_can_be_saved_and_its_weights_are_all_there(tmp_path):
    model = random_model("llama-gqa-tied")
    keys = set(model.state_dict())
    rotate(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert set(again.state_dict()) == keys
    for key, w in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], w), key


def test_scales_are_not_moved_through_an_online_rotation(llama, tokens):
    before = logits(llama, tokens)
    quantize(llama, Pipeline((QuaRot(), AWQScale(), Keep())), Scheme.parse("w3a16g16"), tokens)
    assert_same_function(llama, tokens, before)
    mlp = llama.model.layers[0].mlp
    assert is_rotated_online(mlp.down_proj)
    with pytest.raises(ValueError, match="rotated online"):
        migrate_scale(mlp.up_proj, [mlp.down_proj], torch.ones(112))


def test_rotation_helps_where_channels_are_outliers(llama, tokens):
    """The fixture's norms have gains that are eight times larger in every thirteenth channel."""
    peak = {}
    for name, model in (("before", llama), ("after", copy.deepcopy(llama))):
        if name == "after":
            rotate(model)
        x = given(model, tokens)["0.mlp.gate_proj"]
        peak[name] = (x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean()
    assert peak["after"] < 0.75 * peak["before"]


def test_an_unknown_rotation_is_refused():
    with pytest.raises(ValueError, match="'hadamard' or 'orthogonal'"):
        QuaRot(rotation="random")
