"""A model over several devices: real hooks on the CPU, and devices that torch only pretends to have."""

import copy
import logging
import sys
from contextlib import nullcontext
from types import MethodType

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qbench.algorithms.awq import AWQScale
from qbench.algorithms.base import Pipeline
from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.quarot import QuaRot
from qbench.algorithms.rtn import RTN
from qbench.algorithms.smoothquant import SmoothQuant
from qbench.calib.stream import first_inputs, to_device
from qbench.data.windows import Windows
from qbench.engine import placed, quantize
from qbench.evaluate import dispatch
from qbench.evaluate.baseline import tail_of
from qbench.evaluate.decoding import decoded
from qbench.evaluate.dispatch import device_map_of, dispatched, spread
from qbench.evaluate.logits import block_by_block, last_hidden, noted_hidden, whole
from qbench.evaluate.perplexity import perplexity, window_losses
from qbench.evaluate.plan import EvalPlan
from qbench.models.family import family_of
from qbench.quant.scheme import KVSpec, Scheme
from qbench.quant.spec import QuantSpec

from .families import family_model

TOKENS = torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(4))
FIXED = QuantSpec(8, symmetric=True, granularity="tensor", dynamic=False)
RECIPES = {
    "w4a8": (RTN(), Scheme.parse("w4a8")),
    "fixed ranges": (RTN(), Scheme(QuantSpec(4), FIXED, KVSpec(FIXED, FIXED))),
    "rotated": (Pipeline((QuaRot(), RTN())), Scheme.parse("w4a4kv4")),
}
ALGORITHMS = {
    "RTN": RTN(),
    "GPTQ": GPTQ(),
    "AWQ": Pipeline((AWQScale(), RTN())),
    "SmoothQuant": Pipeline((SmoothQuant(), RTN())),
    "QuaRot": Pipeline((QuaRot(), RTN())),
}
SPREAD = [
    "llama",
    "llama:mha-tied",
    "falcon:new",
    "gpt2",
    "bloom",
    "gemma3_text",
    "mamba",
    "qwen3_moe",
    "deepseek_v3",
]
# Of the experts, how many tokens each is given depends on values, which pretended tensors lack.
PRETENDED = [
    "llama",
    "falcon:alibi",
    "gpt2",
    "mpt",
    "gemma2",
    "opt:post-norm",
    "gpt_neox",
    "minicpm3",
    "mamba2",
]


@pytest.fixture(autouse=True)
def quiet():
    """accelerate warns of devices that are not there."""
    logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)


def halves(model, first="cpu", second="cpu"):
    """A device map: all up to the first block, with a tied head, and from the second block on."""
    blocks, found, place = family_of(model).blocks, {}, first

    def divide(path, module):
        nonlocal place
        for name, child in module.named_children():
            child_path = f"{path}.{name}".removeprefix(".")
            if blocks == child_path:
                found.update({f"{blocks}.{i}": second if i else first for i in range(len(child))})
                place = second
            elif blocks.startswith(child_path + "."):
                divide(child_path, child)
            else:
                found[child_path] = place

    divide("", model)
    head, embeddings = family_of(model).head, model.get_input_embeddings()
    return found | ({head: first} if model.get_submodule(head).weight is embeddings.weight else {})


def quantized(name, recipe):
    model, (algorithm, scheme) = family_model(name), RECIPES[recipe]
    quantize(model, algorithm, scheme, TOKENS)
    return model


def logits(model):
    return torch.cat([found for _, _, found in whole(model, TOKENS, 3)])


def state_of(model):
    """What of every module is its own, without the tensors' values."""
    return [
        (
            name,
            set(module.__dict__),
            [id(t) for t in [*module._parameters.values(), *module._buffers.values()]],
        )
        for name, module in model.named_modules()
    ]


def check_same(model):
    windows = Windows.consecutive(TOKENS.flatten(), 16)
    with noted_hidden(model) as before:
        expected = logits(model)
    losses = window_losses(whole(model, windows.tokens, 3), windows)
    state = state_of(model)
    with spread(model, halves(model)), noted_hidden(model) as after:
        assert all("_hf_hook" in block.__dict__ for block in model.get_submodule(family_of(model).blocks))
        assert torch.equal(logits(model), expected)
        found = window_losses(whole(model, windows.tokens, 3), windows)
    assert perplexity("text", found, windows) == perplexity("text", losses, windows)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=False))
    assert state_of(model) == state
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", SPREAD)
def test_a_spread_model_says_the_same_and_is_as_it_was_afterwards(name):
    check_same(family_model(name))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["llama:mha-tied", "qwen3_moe", "falcon:new"])
def test_what_quantizes_and_rotates_inputs_does_so_in_a_spread_model(name, recipe):
    check_same(quantized(name, recipe))


def test_a_spread_model_decodes_through_its_cache_as_before():
    model = quantized("llama", "rotated")
    expected = torch.cat([found for _, _, found in decoded(model, TOKENS, 2)])
    with spread(model, halves(model)):
        assert torch.equal(torch.cat([found for _, _, found in decoded(model, TOKENS, 2)]), expected)


def test_weights_come_back_from_where_they_cannot_be_read_also_after_an_error():
    """`meta` keeps no values, so that nothing can have been copied back from it."""
    model = family_model("llama:mha-tied")
    expected, state = logits(model), state_of(model)
    with pytest.raises(ZeroDivisionError), spread(model, halves(model, "meta", "meta")):  # noqa: PT012
        assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
        raise ZeroDivisionError
    assert state_of(model) == state
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), expected)


def test_a_model_is_as_it_was_where_it_could_not_be_spread(monkeypatch):
    from accelerate import hooks

    model = family_model("llama")
    state, move, moved = state_of(model), hooks.set_module_tensor_to_device, []

    def full(module, name, device, **more):
        moved.append(name)
        if len(moved) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        move(module, name, device, **more)

    monkeypatch.setattr(hooks, "set_module_tensor_to_device", full)
    with pytest.raises(torch.OutOfMemoryError), spread(model, halves(model, "meta", "meta")):
        pass
    assert state_of(model) == state


def test_the_way_to_logits_is_taken_from_a_spread_model_without_its_hooks():
    model = family_model("llama:mha-tied")
    with spread(model, halves(model)), noted_hidden(model) as noted:
        expected = logits(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        tail = tail_of(model)
        assert not any("_hf_hook" in module.__dict__ for module in tail.model.modules())
        assert all("_hf_hook" in block.__dict__ for block in model.model.layers)
    assert torch.equal(tail(TOKENS, torch.cat(noted)), expected)


def test_a_method_of_the_class_is_seen_again_afterwards(monkeypatch):
    model = family_model("llama")
    with spread(model, halves(model)):
        pass
    kind = type(model.model.norm)
    monkeypatch.setattr(kind, "forward", lambda self, x: torch.zeros_like(x))
    assert model.model.norm.forward == MethodType(kind.forward, model.model.norm)
    assert not logits(model).any()


def sizes(model):
    from accelerate.utils import compute_module_sizes

    return compute_module_sizes(model)


@pytest.mark.parametrize("name", ["llama", "llama:mha-tied", "qwen3_moe", "gpt2", "mamba2"])
def test_blocks_stay_whole_and_no_device_has_more_than_its_room(name):
    model = family_model(name)
    size, path = sizes(model), family_of(model).blocks
    largest = max(n for part, n in size.items() if part and not path.startswith(part))
    room = {0: size[""] // 2 + 2 * largest, 1: f"{(size[''] // 2 + 2 * largest) // 1000}KB"}
    given = dict(room)
    found = device_map_of(model, room)
    assert room == given
    taken = dict.fromkeys(("cuda:0", "cuda:1"), 0)
    for part, device in found.items():
        taken[device] += size[part]
    assert max(taken.values()) <= room[0]
    blocks = [f"{path}.{index}" for index in range(len(model.get_submodule(path)))]
    assert all(any(not part or (block + ".").startswith(part + ".") for part in found) for block in blocks)


def test_a_tied_head_is_with_the_embedding_and_one_that_was_untied_is_not():
    tied, rotated = family_model("llama:mha-tied"), quantized("llama:mha-tied", "rotated")
    room = {0: sizes(rotated)["model"], 1: sizes(rotated)[""]}
    place = {name: device_map_of(model, room) for name, model in (("tied", tied), ("rotated", rotated))}
    assert place["tied"].get("", place["tied"].get("lm_head")) == "cuda:0"
    assert place["rotated"]["model.embed_tokens"] == "cuda:0"
    assert place["rotated"]["lm_head"] == "cuda:1"


def test_one_device_takes_all():
    model = family_model("llama")
    assert set(device_map_of(model, {0: 3 * sizes(model)[""]}).values()) == {"cuda:0"}


def test_what_does_not_fit_is_refused_with_what_is_needed_and_free():
    model = family_model("llama")
    model.model.embed_tokens.weight = nn.Parameter(torch.empty(10**8, 32, device="meta"), False)
    with pytest.raises(
        MemoryError, match=r"takes 12\.80 GB.*1\.50 GB \(1\.00 on cuda:0, 0\.50 on cuda:1\).*eval\.streamed"
    ):
        device_map_of(model, {0: "1GB", 1: 5 * 10**8})


def test_without_a_device_or_weights_in_memory_nothing_is_spread(monkeypatch):
    model = family_model("llama")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="sees none"), dispatched(model):
        pass
    monkeypatch.setattr(dispatch, "on_disk", lambda _: True)
    with pytest.raises(ValueError, match="on disk"), dispatched(model, {0: "1GB"}):
        pass


def test_a_plan_is_spread_or_streamed_and_is_the_same_job():
    plan = EvalPlan(ppl=("stdlib_docs",), device_map="auto")
    assert plan.identity() == EvalPlan(ppl=("stdlib_docs",)).identity()
    assert plan.fits(family_model("llama"), "cuda")
    with pytest.raises(ValueError, match="device=cuda"):
        plan.fits(family_model("llama"), "cpu")
    with pytest.raises(ValueError, match="unset one"):
        EvalPlan(ppl=("stdlib_docs",), device_map="auto", streamed=True)


FIRST, SECOND = (
    "lazy:0",
    "lazy:1",
)  # the one type of device whose tensors can be pretended on every build of torch


class Pretending(FakeTensorMode):
    """Knows the device, the type and the shape of every tensor, and makes up what depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func is aten.equal.default:
            return True
        if func is aten._local_scalar_dense.default:
            kind = args[0].dtype
            return False if kind == torch.bool else 1.0 if kind.is_floating_point else 0
        if func is aten.nonzero.default:
            with self:
                return args[0].new_zeros((1, args[0].ndim), dtype=torch.long)
        return super().__torch_dispatch__(func, types, args, kwargs or {})


@pytest.fixture
def pretended(monkeypatch):
    """Copies a model to tensors without values, whose operations fail where two devices meet, as on real ones."""

    def move(module, name, device, **_):
        path, _, name = name.rpartition(".")
        owner = module.get_submodule(path)
        of = owner._parameters if name in owner._parameters else owner._buffers
        of[name] = moved(of[name], lambda t: t.to(device))

    def moved(tensor, change):
        return nn.Parameter(change(tensor), False) if isinstance(tensor, nn.Parameter) else change(tensor)

    def apply(self, change, recurse=True):
        for module in self.modules():
            for of in (module._parameters, module._buffers):
                of.update({name: moved(tensor, change) for name, tensor in of.items() if tensor is not None})
        return self

    from accelerate import hooks

    monkeypatch.setattr(hooks, "set_module_tensor_to_device", move)
    monkeypatch.setattr(nn.Module, "_apply", apply)
    # Inference mode hides tensors that have values, as grids have, from what would pretend that they are elsewhere.
    monkeypatch.setattr(torch.inference_mode, "__enter__", lambda self: None)
    monkeypatch.setattr(torch.inference_mode, "__exit__", lambda self, *_: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it knows real devices alone
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda tensor: id(tensor), raising=False)

    mode = Pretending(allow_non_fake_inputs=True)

    def make(model):
        inputs = first_inputs(
            model, family_of(model), TOKENS, 3
        )  # which are compared, so that they need values
        monkeypatch.setattr("qbench.evaluate.logits.first_inputs", lambda *_: inputs)
        with mode:
            tensors = [*model.parameters(), *model.buffers()]
            memo = {id(t): moved(t, torch.empty_like) for t in tensors}
        return copy.deepcopy(model, memo), inputs

    # Kept tensors must not be met by those of another pretence, nor by real ones.
    caches = [
        value
        for name, module in list(sys.modules.items())
        if name.startswith("qbench.quant.")
        for value in vars(module).values()
        if callable(getattr(value, "cache_clear", None))
    ]
    for cache in caches:
        cache.cache_clear()
    yield mode, make
    for cache in caches:
        cache.cache_clear()


def check_pretended(pretended, model):
    mode, make = pretended
    shape = logits(model).shape
    model, (stream, kwargs) = make(model)
    family = family_of(model)
    with mode:
        assert last_hidden(model, TOKENS, 3, torch.device(FIRST)).device.type == "cpu"
        streamed = [found for _, _, found in block_by_block(model, TOKENS, 3, FIRST)]
        assert {str(found.device) for found in streamed} == {FIRST}
        block = model.get_submodule(family.blocks)[0]
        with placed(block, torch.device(FIRST)):
            out = stream.through(block, to_device(kwargs[0], torch.device(FIRST)), torch.device(FIRST))
        assert out.hidden.device.type == "cpu"
        assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}
        with spread(model, halves(model, FIRST, SECOND)):
            assert {str(p.device) for p in model.get_submodule(family.blocks)[1].parameters()} == {SECOND}
            found = [found for _, _, found in whole(model, TOKENS, 3)]
        assert {str(part.device) for part in found} == {FIRST}
        assert (
            (sum(map(len, found)), *found[0].shape[1:])
            == (sum(map(len, streamed)), *streamed[0].shape[1:])
            == shape
        )


@pytest.mark.parametrize("name", PRETENDED)
def test_nothing_is_computed_on_another_device_than_was_asked_for(name, pretended):
    check_pretended(pretended, family_model(name))


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_quantizes_and_rotates_inputs_follows_the_block_to_its_device(recipe, pretended):
    check_pretended(pretended, quantized("llama:mha-tied", recipe))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_block_is_quantized_on_the_device_that_was_asked_for(algorithm, pretended, monkeypatch):
    (mode, make), (_, scheme) = pretended, RECIPES["fixed ranges"]
    model, inputs = make(family_model("llama"))
    monkeypatch.setattr("qbench.engine._check_finite", lambda block: None)  # nothing has a value
    seen = set()
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda _, args: seen.add(str(args[0].device)))
    with mode:
        quantize(model, ALGORITHMS[algorithm], scheme, TOKENS, first=inputs, device=FIRST)
    assert seen == {FIRST}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_tensor_on_a_device_of_its_own_is_found(pretended):
    """The tests above can fail."""
    model, other = family_model("llama"), torch.ones(32, dtype=torch.float64)
    model.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: (args[0] * other, *args[1:]))
    with pytest.raises(RuntimeError, match="same device"):
        check_pretended(pretended, model)
