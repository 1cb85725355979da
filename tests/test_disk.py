"""A model whose blocks stay on disk is, to the bit, the model that transformers loads whole."""

import copy
import json
import weakref
from contextlib import ExitStack
from functools import partial

import httpx2
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qbench.models import blockfile, snapshot
from qbench.models.blockfile import tensors_of
from qbench.models.checkpoint import INDEX, WHOLE, checkpoint_info, open_checkpoint
from qbench.models.disk import at_hand, finish, on_disk, open_model, use_finished, written
from qbench.models.experts import unpack

SIZE = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA = SIZE | {"intermediate_size": 128, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
MODELS = {
    "llama": ("llama", LLAMA, "model.layers"),
    "llama-tied": ("llama", LLAMA | {"tie_word_embeddings": True}, "model.layers"),
    "qwen3_moe": (
        "qwen3_moe",
        LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
        "model.layers",
    ),
    "mixtral": ("mixtral", LLAMA | {"num_local_experts": 4}, "model.layers"),
    "gpt2": ("gpt2", GPT2, "transformer.h"),
    "gpt_neox": ("gpt_neox", SIZE | {"intermediate_size": 128}, "gpt_neox.layers"),
    # Its blocks hold masks that are in no checkpoint.
    "gpt_neo": (
        "gpt_neo",
        {
            "vocab_size": 128, "hidden_size": 64, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 64,
            "attention_types": [[["global", "local", "global"], 1]],
        },
        "transformer.h",
    ),
    # transformers keeps some of its parameters in float32, and draws random numbers to initialize them.
    "mamba": ("mamba", {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3}, "backbone.layers"),
}  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = torch.arange(32).reshape(2, 16) * 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Makes a folder with a random model in shards, once for each name and dtype."""
    made = {}

    def save(name, dtype=torch.float32):
        if (name, dtype) not in made:
            kind, config, _ = MODELS[name]
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).to(dtype)
            made[name, dtype] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name, dtype], max_shard_size="100KB")
        return made[name, dtype]

    return save


@pytest.fixture
def llama(saved, tmp_path):
    """A folder of its own, which a test may damage."""
    folder = tmp_path / "llama"
    folder.mkdir()
    for path in saved("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def opened(folder, scratch, name="llama", dtype=torch.float32, **kwargs):
    blocks = MODELS[name][2]
    config = AutoConfig.from_pretrained(folder)
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    return open_model(config, model_class, folder, blocks, dtype, scratch, **kwargs)


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name].dtype, found[name].device) == (x.dtype, x.device), name
        assert torch.equal(found[name], x), name


def copied(block):
    return {name: x.detach().clone() for name, x in tensors_of(block).items()}


@torch.no_grad()
def streamed_logits(model, blocks):
    """Each block is at hand while it is called, and no longer."""
    layers, contexts = model.get_submodule(blocks), ExitStack()

    def enter(index, *_):
        contexts.enter_context(at_hand(model, blocks, index))

    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.callback(layer.register_forward_pre_hook(partial(enter, index)).remove)
            hooks.callback(layer.register_forward_hook(lambda *_: contexts.close()).remove)
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_blocks_and_logits_are_to_the_bit_those_of_from_pretrained(name, dtype, saved, tmp_path):
    folder, blocks = saved(name, torch.bfloat16), MODELS[name][2]
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = opened(folder, tmp_path, name, dtype)
    outside = {k: x for k, x in tensors_of(whole).items() if not k.startswith(blocks + ".")}
    equal({k: x for k, x in tensors_of(model).items() if k in outside}, outside)
    for index, expected in enumerate(whole.get_submodule(blocks)):
        with at_hand(model, blocks, index) as block:
            equal(tensors_of(block), tensors_of(expected))
        assert all(x.is_meta for x in tensors_of(block).values())
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (model, whole)]
    assert tied[0] == tied[1]
    with torch.no_grad():
        expected = whole(IDS, use_cache=False).logits
    assert torch.equal(streamed_logits(model, blocks), expected)
    assert not written(model)
    assert not list(tmp_path.iterdir())


def test_the_hubs_layout_of_experts_is_read(saved):
    names = open_checkpoint(saved("mixtral", torch.bfloat16)).tensors
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names


def test_one_file_is_read_as_shards_are(saved, tmp_path):
    folder = tmp_path / "whole"
    AutoModelForCausalLM.from_pretrained(saved("llama")).save_pretrained(folder)
    assert (folder / WHOLE).is_file()
    one, many = opened(folder, tmp_path / "a"), opened(saved("llama"), tmp_path / "b")
    assert torch.equal(streamed_logits(one, "model.layers"), streamed_logits(many, "model.layers"))


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_a_block_is_prepared_before_it_is_used(name, saved, tmp_path):
    blocks = MODELS[name][2]
    whole = AutoModelForCausalLM.from_pretrained(saved(name))
    unpack(whole)
    model = opened(saved(name), tmp_path, name, prepare_block=unpack)
    for index, expected in enumerate(whole.get_submodule(blocks)):
        with at_hand(model, blocks, index) as block:
            equal(tensors_of(block), tensors_of(expected))


def test_reading_draws_no_random_numbers(saved, tmp_path):
    """It is done in a thread: a draw would make results depend on its speed."""
    blocks = MODELS["mamba"][2]
    model = opened(saved("mamba"), tmp_path, "mamba")
    state = torch.get_rng_state()
    for index in range(3):
        with at_hand(model, blocks, index):
            pass
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_in_memory_is_always_at_hand(saved):
    model = AutoModelForCausalLM.from_pretrained(saved("llama"))
    before = copied(model)
    with at_hand(model, "model.layers", 1) as block:
        assert block is model.model.layers[1]
    equal(tensors_of(model), before)
    assert not on_disk(model)
    assert written(model) == set()
    with pytest.raises(ValueError, match="in memory wholly"):
        finish(model, "model.layers", 1)


class Scaled(nn.Module):
    """A norm of another kind, without what the first one had."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("seen", torch.tensor(3))


def in_place(block):
    block.mlp.up_proj.weight.mul_(2)


def another_parameter(block):
    block.mlp.up_proj.weight = nn.Parameter(block.mlp.up_proj.weight * 2)


def a_bias(block):
    block.mlp.up_proj.bias = nn.Parameter(torch.ones(128))


def another_norm(block):
    block.input_layernorm = Scaled()


def a_buffer(block):
    block.register_buffer("grid", torch.arange(4))


def a_part_less(block):
    block.input_layernorm.weight = None


EDITS = [in_place, another_parameter, a_bias, another_norm, a_buffer, a_part_less]


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__)
@torch.no_grad()
def test_an_edit_is_there_the_next_time(edit, prefetch, saved, tmp_path):
    model = opened(saved("llama"), tmp_path, prefetch=prefetch)
    model.requires_grad_(False)
    with at_hand(model, "model.layers", 1) as block:
        before = copied(block)
        edit(block)
        edited, trained = copied(block), [p.requires_grad for p in block.parameters()]
    assert before.keys() != edited.keys() or any(not torch.equal(before[k], edited[k]) for k in edited)
    assert written(model) == {1}
    assert [path.name for path in tmp_path.iterdir()] == ["block_00001.safetensors"]
    for index in range(3):
        with at_hand(model, "model.layers", index) as block:
            if index == 1:
                equal(tensors_of(block), edited)
                assert [p.requires_grad for p in block.parameters()] == trained
    assert written(model) == {1}


@torch.no_grad()
def test_an_edit_of_a_block_that_was_read_ahead_is_not_lost(saved, tmp_path):
    model = opened(saved("llama"), tmp_path)
    with at_hand(model, "model.layers", 0):  # block 1 is being read
        with at_hand(model, "model.layers", 1) as block:
            in_place(block)
            edited = copied(block)
        with at_hand(model, "model.layers", 1) as block:
            equal(tensors_of(block), edited)
    with at_hand(model, "model.layers", 0):
        finish(model, "model.layers", 1)
    with at_hand(model, "model.layers", 1) as block:
        equal(tensors_of(block), edited)


@torch.no_grad()
def test_a_block_at_hand_is_not_read_ahead(saved, tmp_path):
    model = opened(saved("llama"), tmp_path)
    with at_hand(model, "model.layers", 1) as block:
        with at_hand(model, "model.layers", 0):
            pass
        in_place(block)
        edited = copied(block)
    with at_hand(model, "model.layers", 1) as block:
        equal(tensors_of(block), edited)


def edits_in_turn(model, index):
    with at_hand(model, "model.layers", index) as block:
        in_place(block)
        yield block


@torch.no_grad()
def test_an_edit_is_kept_where_its_context_ends_early(saved, tmp_path):
    model = opened(saved("llama"), tmp_path)
    turns = (index for index in range(3) for _ in edits_in_turn(model, index))
    next(turns)
    edited = copied(model.model.layers[0])
    turns.close()
    block = model.model.layers[0]
    assert next(block.parameters()).is_meta
    with at_hand(model, "model.layers", 0) as block:
        equal(tensors_of(block), edited)


@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
def test_a_block_that_was_moved_and_back_is_not_written(name, saved, tmp_path):
    """What a move to a device does to parameters and buffers, done here with copies."""
    blocks = MODELS[name][2]
    model = opened(saved(name), tmp_path, name)
    with at_hand(model, blocks, 0) as block:
        block._apply(lambda x: x.clone())
    assert not written(model)


@torch.no_grad()
def test_a_block_at_hand_can_be_taken_again(saved, tmp_path):
    model = opened(saved("llama"), tmp_path)
    with at_hand(model, "model.layers", 1) as outer:
        in_place(outer)
        edited = copied(outer)
        with at_hand(model, "model.layers", 1) as inner:
            assert inner is outer
            equal(tensors_of(inner), edited)
        equal(tensors_of(outer), edited)
        assert not written(model)
    assert written(model) == {1}


@pytest.mark.parametrize(("prefetch", "most"), [(True, 2), (False, 1)])
@torch.no_grad()
def test_no_more_blocks_are_in_memory_than_the_one_at_hand_and_the_next(prefetch, most, saved, tmp_path):
    read, counts = [], []

    def alive():
        return sum(any(x() is not None for x in block) for block in read)

    def watch(block):
        if not next(block.parameters()).is_meta:
            read.append([weakref.ref(p) for p in block.parameters()])
            counts.append(alive())

    model = opened(saved("llama"), tmp_path, prefetch=prefetch, prepare_block=watch)
    for _ in range(2):
        for index in range(3):
            with at_hand(model, "model.layers", index):
                counts.append(alive())
    assert max(counts) <= most
    assert alive() == 0
    assert len(read) == 2 * 3


@torch.no_grad()
def test_files_of_an_earlier_run_are_used_only_when_asked_for(saved, tmp_path):
    model = opened(saved("llama"), tmp_path)
    original = streamed_logits(model, "model.layers")
    for index in (0, 2):
        with at_hand(model, "model.layers", index) as block:
            in_place(block)
    finish(model, "model.layers", 0)
    edited = streamed_logits(model, "model.layers")
    assert not torch.equal(original, edited)
    anew = opened(saved("llama"), tmp_path)
    assert not written(anew)
    assert torch.equal(streamed_logits(anew, "model.layers"), original)
    kept = opened(saved("llama"), tmp_path, keep_scratch=True)
    assert written(kept) == {0, 2}
    assert torch.equal(streamed_logits(kept, "model.layers"), edited)


@torch.no_grad()
def test_a_finished_block_outlives_the_edits_that_lead_to_it_again(saved, tmp_path):
    """A run that goes on begins with its edits of the whole model; what was finished is taken over after them."""
    first = opened(saved("llama"), tmp_path)
    with at_hand(first, "model.layers", 1) as block:
        in_place(block)
    with at_hand(first, "model.layers", 1) as block:
        a_bias(block)
        final = copied(block)
    finish(first, "model.layers", 1)
    finish(first, "model.layers", 2)  # was never edited
    with at_hand(first, "model.layers", 0), pytest.raises(RuntimeError, match="block 0 is at hand"):
        finish(first, "model.layers", 0)

    again = opened(saved("llama"), tmp_path)
    for index in range(3):
        with at_hand(again, "model.layers", index) as block:
            in_place(block)
    use_finished(again, "model.layers", 1)
    use_finished(again, "model.layers", 2)
    with at_hand(again, "model.layers", 1) as block:
        equal(tensors_of(block), final)
    with (
        at_hand(again, "model.layers", 2) as block,
        at_hand(opened(saved("llama"), tmp_path), "model.layers", 2) as one,
    ):
        equal(tensors_of(block), tensors_of(one))
    with pytest.raises(OSError, match=r"finished_00000\.safetensors"):
        use_finished(again, "model.layers", 0)


def test_a_finished_block_of_other_modules_is_refused(saved, tmp_path):
    first = opened(saved("llama"), tmp_path)
    with at_hand(first, "model.layers", 1) as block:
        another_norm(block)
    finish(first, "model.layers", 1)
    again = opened(saved("llama"), tmp_path)
    with pytest.raises(OSError, match=r"finished_00001.*input_layernorm is Scaled, here it is LlamaRMSNorm"):
        use_finished(again, "model.layers", 1)
    with pytest.raises(OSError, match=r"finished_00001.*input_layernorm is Scaled"):
        opened(saved("llama"), tmp_path, keep_scratch=True)


@torch.no_grad()
def test_a_block_that_cannot_be_written_leaves_what_was_there(saved, tmp_path, monkeypatch):
    model = opened(saved("llama"), tmp_path)
    with at_hand(model, "model.layers", 1) as block:
        in_place(block)
        first = copied(block)

    def full(tensors, path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(blockfile, "save_file", full)
        message = r"block_00001\.safetensors cannot be written .*No space"
        with pytest.raises(OSError, match=message), at_hand(model, "model.layers", 1) as block:
            in_place(block)
    assert [path.name for path in tmp_path.iterdir()] == ["block_00001.safetensors"]
    with at_hand(model, "model.layers", 1) as block:
        equal(tensors_of(block), first)


def test_a_change_of_a_block_on_disk_is_refused(saved, tmp_path):
    model = opened(saved("llama"), tmp_path)
    a_bias(model.model.layers[1])
    with (
        pytest.raises(RuntimeError, match=r"block 1 was changed while it was on disk \(mlp\.up_proj\.bias\)"),
        at_hand(model, "model.layers", 1),
    ):
        pass


def shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[1]


def holder(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def change(file, edit):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


def missing(folder):
    shard(folder).unlink()
    return rf"{shard_name(folder, 2)} is missing"


def shard_name(folder, number):
    count = len(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def cut_off(folder):
    file = shard(folder)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    return rf"{file.name} holds {size - 100} bytes where its header speaks of {size}; it was cut off"


def longer(folder):
    file = shard(folder)
    file.write_bytes(file.read_bytes() + b"more")
    return rf"{file.name} holds .* it was written over"


def cut_in_the_header(folder):
    file = shard(folder)
    file.write_bytes(file.read_bytes()[:20])
    return rf"{file.name} \(20 bytes\) has no header"


def empty(folder):
    shard(folder).write_bytes(b"")
    return rf"{shard(folder).name} \(0 bytes\) has no header"


def damaged(folder):
    file = shard(folder)
    data = bytearray(file.read_bytes())
    data[8:16] = b"\xff" * 8
    file.write_bytes(data)
    return rf"{file.name} \(\d+ bytes\) has no header"


def wrong_index(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.1.more"] = shard(folder).name
    (folder / INDEX).write_text(json.dumps(index))
    return rf"{shard(folder).name} lacks model\.layers\.1\.more"


def no_index(folder):
    (folder / INDEX).write_text("{")
    return rf"{INDEX} is not an index"


def wrong_shape(folder):
    file = holder(folder, UP)
    change(file, lambda tensors: tensors.update({UP: torch.ones(128, 63)}))
    return rf"{file.name}: {UP} is of shape \(128, 63\), .* needs \(128, 64\)"


def a_parameter_less(folder):
    file = holder(folder, UP)
    change(file, lambda tensors: tensors.pop(UP))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].pop(UP)
    (folder / INDEX).write_text(json.dumps(index))
    return rf"no file holds {UP}, which"


def an_embedding_less(folder):
    name = "model.embed_tokens.weight"
    file = holder(folder, name)
    change(file, lambda tensors: tensors.pop(name))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].pop(name)
    (folder / INDEX).write_text(json.dumps(index))
    return rf"no file holds {name}, which"


def only_pickles(folder):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    return r"pytorch_model-00001-of-00002\.bin, and only safetensors are read.*save_pretrained"


def nothing(folder):
    for path in folder.glob("model*"):
        path.unlink()
    return rf"has neither {WHOLE} nor {INDEX}; it holds config\.json"


DAMAGES = [
    missing, cut_off, longer, cut_in_the_header, empty, damaged, wrong_index, no_index, wrong_shape, a_parameter_less,
    an_embedding_less, only_pickles, nothing,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_refused_when_it_is_opened(damage, llama, tmp_path):
    message = damage(llama)
    with pytest.raises(OSError, match=message) as caught:
        opened(llama, tmp_path / "scratch")
    assert "\n" not in str(caught.value)


def test_an_expert_of_a_wrong_shape_is_refused_when_it_is_opened(saved, tmp_path):
    folder = tmp_path / "mixtral"
    folder.mkdir()
    for path in saved("mixtral").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    change(holder(folder, name), lambda tensors: tensors.update({name: torch.ones(128, 63)}))
    with pytest.raises(OSError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj cannot be made"):
        opened(folder, tmp_path / "scratch", "mixtral")


def test_a_file_that_is_gone_when_it_is_read_is_named(llama, tmp_path):
    model = opened(llama, tmp_path / "scratch")
    file = holder(llama, UP)
    file.unlink()
    with (
        pytest.raises(OSError, match=rf"block 1 cannot be read from .*{file.name}"),
        at_hand(model, "model.layers", 1),
    ):
        pass


def test_a_quantized_checkpoint_is_refused(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotImplementedError, match="quantized checkpoint"):
        opened(llama, tmp_path / "scratch")


def test_what_a_checkpoint_holds_is_read_from_its_headers(saved, llama):
    model = AutoModelForCausalLM.from_pretrained(saved("llama"))
    n = sum(p.numel() for p in model.parameters())
    info = checkpoint_info(saved("llama"))
    assert (info.parameters, info.bytes, info.dtypes, info.dtype) == (n, 4 * n, {"float32": 1.0}, "float32")
    change(holder(llama, UP), lambda tensors: tensors.update({UP: tensors[UP].half()}))
    info, k = checkpoint_info(llama), 128 * 64
    assert (info.parameters, info.bytes) == (n, 4 * n - 2 * k)
    assert info.dtypes == {"float32": (n - k) / n, "float16": k / n}


def refusal(kind, status):
    request = httpx2.Request("GET", "https://huggingface.co/api/models/org/model")
    return kind("long\nstory", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            refusal(GatedRepoError, 403),
            "gated: accept the licence at https://huggingface.co/org/model and log in",
        ),
        (refusal(RepositoryNotFoundError, 404), "the hub has no such model"),
        (
            LocalEntryNotFoundError("no\nconnection"),
            "not in the hub's local cache, and the hub was not reached",
        ),
    ],
)
def test_a_hub_model_that_cannot_be_had_is_an_error_of_one_line(error, message, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(OSError, match=rf"^model 'org/model': .*{message}") as caught:
        snapshot.snapshot("org/model")
    assert "\n" not in str(caught.value)


def test_a_snapshot_is_of_the_files_that_the_index_names(llama, monkeypatch):
    asked = []

    def download(id_, *, allow_patterns, **options):
        asked.append((id_, options["revision"], options["local_files_only"], set(allow_patterns)))
        return str(llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert snapshot.snapshot("org/model", "abc", local_files_only=True) == llama
    shards = {path.name for path in llama.glob("model-*.safetensors")}
    assert len(shards) > 1
    assert [x[:3] for x in asked] == [("org/model", "abc", True)] * 2
    assert not shards & asked[0][3]
    assert shards <= asked[1][3]


def test_a_copy_of_a_model_on_disk_is_not_one(saved, tmp_path):
    """It has no weights in its blocks, nor a place to read them from."""
    assert not on_disk(copy.deepcopy(opened(saved("llama"), tmp_path)))
