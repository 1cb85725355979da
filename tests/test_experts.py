"""Unpacked experts compute what fused ones do, and are seen by everything that looks for `nn.Linear`."""

import copy
import inspect
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.inkling2.modeling_inkling2 import Inkling2Experts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from qbench.models.experts import Experts, all_experts, counted, experts_in, unpack

EPS = torch.finfo(torch.float64).eps
COMMON = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 112,
    "num_experts_per_tok": 2,
}
SMALL = COMMON | {"moe_intermediate_size": 24}
LATENT = SMALL | {
    "num_key_value_heads": 4, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 24,
    "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12,
}  # fmt: skip
FAMILIES = {
    "mixtral": COMMON | {"num_local_experts": 4},
    "qwen2_moe": SMALL | {"num_experts": 4, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
    "qwen3_moe": SMALL | {"num_experts": 4, "head_dim": 12},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT | {"n_group": 2, "topk_group": 1},
    "olmoe": COMMON | {"num_experts": 4},
    "phimoe": COMMON | {"num_local_experts": 4},
    "granitemoe": COMMON | {"num_local_experts": 4},
    "glm4_moe": SMALL
    | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 12},
}
GPT2 = {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
# Products that are summed on the way through two blocks, each from 48 inputs of attention to 112 of an MLP: some 1000.
TOLERANCE = 1000 * EPS


def model_of(kind, sizes, dtype=torch.float64):
    torch.manual_seed(0)
    # transformers' faster ways through fused experts do not take float64.
    config = AutoConfig.for_model(kind, **sizes)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model.to(dtype)


@pytest.fixture(params=FAMILIES)
def model(request):
    return model_of(request.param, FAMILIES[request.param])


@pytest.fixture
def mixtral():
    return model_of("mixtral", FAMILIES["mixtral"])


def fused_module(n_experts=4, dtype=torch.float64):
    config = AutoConfig.for_model("mixtral", **COMMON | {"num_local_experts": n_experts})
    fused = MixtralExperts(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in fused.parameters():
            p.normal_(std=0.3)
    return fused.to(dtype)


def unpacked(fused):
    holder = nn.ModuleDict({"experts": copy.deepcopy(fused)})
    unpack(holder)
    return holder["experts"]


def loop(fused, *args):
    """What the class itself writes, not a faster kernel."""
    return inspect.unwrap(type(fused).forward)(fused, *args)


def routed(n_tokens=20, n_experts=4, dtype=torch.float64):
    """Random tokens, the last expert left out and every fifth choice masked."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(n_tokens, 48, generator=random, dtype=torch.float64)
    index = torch.rand(n_tokens, n_experts - 1, generator=random).topk(2).indices
    index[::5, 1] = n_experts
    return x.to(dtype), index, torch.rand(n_tokens, 2, generator=random, dtype=torch.float64).to(dtype)


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


def assert_same(actual, expected, tolerance=TOLERANCE):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def calls(module, x):
    """Path and input of each layer that runs, in order."""
    seen = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args, path=path: seen.append((path, args[0])))
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    module(*x)
    for handle in handles:
        handle.remove()
    return seen


def test_unpacking_leaves_the_function_unchanged(model, tokens):
    expected = logits(model, tokens)
    unpack(model)
    assert_same(logits(model, tokens), expected)


def test_every_weight_of_an_expert_is_that_of_a_linear(model):
    n_parameters = sum(p.numel() for p in model.parameters())
    unpack(model)
    assert sum(p.numel() for p in model.parameters()) == n_parameters
    assert all(p.ndim < 3 for p in model.parameters())
    for path, experts in experts_in(model).items():
        assert len(experts) == 4
        for index in range(4):
            for name in ("gate_proj", "up_proj", "down_proj"):
                assert type(model.get_submodule(f"{path}.{index}.{name}")) is nn.Linear


def test_a_skeleton_unpacks_as_a_model_does(model):
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config).double()
    unpack(skeleton)
    unpack(model)
    assert all(p.is_meta for p in skeleton.parameters())
    assert {k: (v.shape, v.dtype) for k, v in skeleton.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in model.state_dict().items()
    }


def test_a_filled_skeleton_computes_what_the_model_does(mixtral, tokens):
    unpack(mixtral)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(mixtral.config).double().eval()
    unpack(skeleton)
    skeleton.load_state_dict(mixtral.state_dict(), assign=True)
    skeleton.model.rotary_emb = mixtral.model.rotary_emb  # buffers that are not saved
    assert torch.equal(logits(skeleton, tokens), logits(mixtral, tokens))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("kind", "sizes", "before", "after"),
    [
        ("mixtral", FAMILIES["mixtral"], ("gate_up_proj",), (".gate_proj.", ".up_proj.")),
        ("gpt2", GPT2, ("c_attn.weight", "c_fc.bias"), ("c_attn.weight", "c_fc.bias")),
    ],
)
def test_dtype_gradients_and_mode_are_kept(kind, sizes, before, after, train):
    model = model_of(kind, sizes, torch.bfloat16).train(train)
    for name, p in model.named_parameters():
        p.requires_grad_(not any(frozen in name for frozen in before))
    unpack(model)
    for name, p in model.named_parameters():
        assert p.dtype == torch.bfloat16
        assert p.requires_grad == (not any(frozen in name for frozen in after))
    assert all(module.training == train for module in model.modules())


def test_masked_choices_and_idle_experts_add_nothing():
    fused = fused_module()
    inputs = routed()
    assert_same(unpacked(fused)(*inputs), loop(fused, *inputs))
    nowhere = torch.full_like(inputs[1], 4)
    assert not unpacked(fused)(inputs[0], nowhere, inputs[2]).any()


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_of_no_expert_is_refused(index):
    x, chosen, weights = routed()
    chosen[3, 0] = index
    with pytest.raises(ValueError, match=rf"routed to experts \[{index}\]; there are 4"):
        unpacked(fused_module())(x, chosen, weights)


def test_gradients_are_those_of_the_fused_module():
    fused, inputs = fused_module(), routed()
    experts = unpacked(fused)
    for module, run in ((fused, lambda *x: loop(fused, *x)), (experts, experts)):
        module.x = inputs[0].clone().requires_grad_()
        run(module.x, *inputs[1:]).square().sum().backward()
    assert_same(experts.x.grad, fused.x.grad)
    for index, expert in enumerate(experts):
        gate, up = fused.gate_up_proj.grad[index].chunk(2)
        if index == 3:  # no token was sent there
            assert expert.gate_proj.weight.grad is None
            continue
        assert_same(expert.gate_proj.weight.grad, gate)
        assert_same(expert.up_proj.weight.grad, up)
        assert_same(expert.down_proj.weight.grad, fused.down_proj.grad[index])


def test_half_precision_rounds_as_the_fused_module_does():
    fused, inputs = fused_module(dtype=torch.bfloat16), routed(dtype=torch.bfloat16)
    # Both round gate, up, their product, down, the weighting and the sum: at worst a step apart at each.
    assert_same(unpacked(fused)(*inputs), loop(fused, *inputs), 6 * torch.finfo(torch.bfloat16).eps)


def test_every_weight_owns_its_memory_and_the_fused_one_is_gone(mixtral, tmp_path):
    held = mixtral.model.layers[0].mlp.experts  # whoever holds the module holds no weights
    gone = [weakref.ref(p) for p in held.parameters()]
    unpack(mixtral)
    assert [p() for p in gone] == [None, None]
    weights = {name: p.detach() for name, p in mixtral.named_parameters()}
    for p in weights.values():
        assert p.is_contiguous()
        assert p.untyped_storage().nbytes() == p.nbytes
    before = {name: p.clone() for name, p in weights.items()}
    edited = "model.layers.0.mlp.experts.1.up_proj.weight"
    weights[edited].copy_(torch.zeros_like(weights[edited]))
    save_file(weights, tmp_path / "model.safetensors")
    for name, p in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(p, torch.zeros_like(p) if name == edited else before[name])


def test_an_unpacked_model_is_copied_cast_and_loaded_like_any_other(mixtral, tokens):
    unpack(mixtral)
    expected = logits(mixtral, tokens)
    other = copy.deepcopy(mixtral)
    with torch.no_grad():
        other.get_submodule("model.layers.1.mlp.experts.3.down_proj").weight.zero_()
    assert not torch.equal(logits(other, tokens), expected)
    other.load_state_dict(mixtral.state_dict())
    assert torch.equal(logits(other, tokens), expected)
    assert {p.dtype for p in other.to(torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_no_kernel_of_transformers_takes_over(mixtral, implementation):
    unpack(mixtral)
    mixtral.set_experts_implementation(implementation)
    x = torch.randn(1, 7, 48, dtype=torch.float64)
    with counted(mixtral) as counts:
        mixtral.model.layers[0].mlp(x)
    assert counts["model.layers.0.mlp.experts"].sum() == 7 * 2
    seen = calls(mixtral.model.layers[0].mlp, (x,))
    assert {path.split(".")[1] for path, _ in seen} == {
        str(i) for i, n in enumerate(counts["model.layers.0.mlp.experts"]) if n
    }


def test_a_sharded_checkpoint_unpacks_to_the_same_function(model, tokens, tmp_path):
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    unpack(loaded)
    assert_same(logits(loaded, tokens), expected)


def test_transposed_layers_become_linears(tokens):
    model = model_of("gpt2", GPT2)
    expected = logits(model, tokens)
    weight = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    unpack(model)
    assert_same(logits(model, tokens), expected)
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert len(linears) == 4 * 2 + 1  # with the head
    layer = model.get_submodule("transformer.h.0.attn.c_attn")
    assert (layer.in_features, layer.out_features) == (48, 144)
    assert torch.equal(layer.weight, weight.T)
    assert layer.weight.is_contiguous()


def test_experts_run_in_order_each_layer_once_and_only_when_hit():
    seen = [path for path, _ in calls(unpacked(fused_module()), routed())]
    assert seen == [f"{i}.{name}" for i in range(3) for name in ("gate_proj", "up_proj", "down_proj")]


def test_counts_are_of_the_routers_choices(model, tokens):
    unpack(model)
    chosen = {}
    for path, experts in experts_in(model).items():
        experts.register_forward_pre_hook(lambda _, args, path=path: chosen.update({path: args[1]}))
    with counted(model) as counts:
        logits(model, tokens)
        once = {path: n.clone() for path, n in counts.items()}
        with all_experts(model):
            logits(model, tokens)
    logits(model, tokens)
    assert counts.keys() == chosen.keys() == experts_in(model).keys()
    for path, n in counts.items():
        assert n.dtype == torch.int64
        assert once[path].tolist() == [int((chosen[path] == e).sum()) for e in range(4)]
        assert once[path].sum() == tokens.numel() * 2
        assert torch.equal(n, 2 * once[path])


def test_an_expert_without_tokens_is_counted_as_such_and_masked_choices_are_not():
    experts, inputs = unpacked(fused_module()), routed()
    with counted(experts) as counts:
        experts(hidden_states=inputs[0], top_k_index=inputs[1], top_k_weights=inputs[2])
    assert list(counts) == [""]
    assert counts[""][3] == 0
    assert counts[""].sum() == (inputs[1] < 4).sum()


def test_all_experts_see_all_tokens_and_the_output_is_that_of_routing():
    experts, inputs = unpacked(fused_module()), routed()
    expected = experts(*inputs)
    with all_experts(experts):
        seen = calls(experts, inputs)
        actual = experts(*inputs)
    assert [path for path, _ in seen] == [
        f"{i}.{name}" for i in range(4) for name in ("gate_proj", "up_proj", "down_proj")
    ]
    assert all(torch.equal(x, inputs[0]) for path, x in seen if "down" not in path)
    assert all(len(x) == len(inputs[0]) for _, x in seen)
    assert_same(actual, expected)
    assert len(calls(experts, inputs)) == 3 * 3


def test_a_token_that_overflows_elsewhere_does_not_spoil_the_output():
    experts, inputs = unpacked(fused_module()), routed()
    expected = experts(*inputs)
    with torch.no_grad():
        experts.get_submodule("3.down_proj").weight.fill_(torch.inf)  # no token is routed there
    with all_experts(experts):
        assert_same(experts(*inputs), expected)


def test_all_experts_ends_with_an_error():
    experts = unpacked(fused_module())
    with pytest.raises(RuntimeError), all_experts(experts):
        raise RuntimeError
    assert not experts.all_tokens


class Clamped(MixtralExperts):
    """Looks alike, and differs for large inputs only."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return loop_of_mixtral(self, hidden_states.clamp(-1000, 1000), top_k_index, top_k_weights)


class Rounded(MixtralExperts):
    """Looks alike, and computes in single precision."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return loop_of_mixtral(self, hidden_states.float().double(), top_k_index, top_k_weights)


class Ungated(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Parameter(torch.zeros(4, 112, 48))
        self.down_proj = nn.Parameter(torch.zeros(4, 48, 112))


loop_of_mixtral = inspect.unwrap(MixtralExperts.forward)
ALIKE = COMMON | {"num_local_experts": 4}
REFUSED = {
    Clamped: (("mixtral", ALIKE), r"its output is another"),
    Rounded: (("mixtral", ALIKE), r"its output is another"),
    Ungated: (("mixtral", ALIKE), r"it holds down_proj, up_proj"),
    DeepseekV4Experts: (("deepseek_v4", SMALL | {"n_routed_experts": 4}), r"its output is another"),
    Inkling2Experts: (("inkling2_text", SMALL | {"n_routed_experts": 4}), r"raises TypeError"),
    AriaExperts: (("aria_text", COMMON | {"moe_num_experts": 4}), r"gate_up_proj is \(4, 48, 224\)"),
    Llama4TextExperts: (("llama4_text", ALIKE), r"gate_up_proj is \(4, 48, 224\)"),
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_not_understood_is_refused_by_name(kind, device):
    (config, sizes), message = REFUSED[kind]
    with torch.device(device):
        holder = nn.ModuleDict(
            {"plain": fused_module(), "experts": kind(AutoConfig.for_model(config, **sizes))}
        )
    with pytest.raises(NotImplementedError, match=rf"experts \({kind.__name__}\).*{message}"):
        unpack(holder)
    assert isinstance(holder["plain"], MixtralExperts)
    assert holder["plain"].gate_up_proj.shape == (4, 224, 48)


def test_experts_with_biases_are_refused():
    model = model_of("gpt_oss", COMMON | {"num_local_experts": 4, "head_dim": 12})
    with pytest.raises(NotImplementedError, match=r"mlp.experts \(GptOssExperts\).*gate_up_proj_bias"):
        unpack(model)


def test_a_module_with_hooks_is_not_replaced(mixtral):
    mixtral.model.layers[1].mlp.experts.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts \(MixtralExperts\) has hooks"):
        unpack(mixtral)


def test_what_has_no_parent_cannot_be_replaced():
    with pytest.raises(ValueError, match="MixtralExperts itself is to be replaced"):
        unpack(fused_module())


def test_a_module_in_two_places_stays_one():
    fused = fused_module()
    holder = nn.ModuleDict({"a": nn.ModuleDict({"experts": fused}), "b": nn.ModuleDict({"experts": fused})})
    unpack(holder)
    assert holder["a"]["experts"] is holder["b"]["experts"]
    assert isinstance(holder["a"]["experts"], Experts)


def test_a_dense_model_is_left_as_it_is(llama):
    modules = dict(llama.named_modules())
    unpack(llama)
    assert dict(llama.named_modules()) == modules
