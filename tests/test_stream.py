"""Hidden states between blocks: what a block is called with, for any batch, and where they wait."""

import errno
import os
import subprocess
import sys
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qbench.calib import spill
from qbench.calib.spill import empty, spilling
from qbench.calib.stream import PerSample, Stream, collected, first_inputs, for_batch, swapped, to_device
from qbench.evaluate import logits

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 32,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}
FALCON = SIZES | {"bias": False}


@dataclass(frozen=True)
class Case:
    """A tiny model and what the stream must know of it."""

    kind: str
    config: dict
    blocks: str
    returns_tuple: bool = False
    attn: str | None = None
    dtype: torch.dtype = torch.float64


CASES = {
    "llama": Case("llama", SIZES | {"intermediate_size": 48}, "model.layers"),
    "llama-eager": Case("llama", SIZES | {"intermediate_size": 48}, "model.layers", attn="eager"),
    "gemma3": Case(
        "gemma3_text",
        SIZES | {
            "intermediate_size": 48, "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "model.layers",
    ),
    "gpt2": Case("gpt2", GPT, "transformer.h"),
    "gpt-bigcode": Case("gpt_bigcode", GPT, "transformer.h"),
    "xglm": Case(
        "xglm",
        {
            "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "vocab_size": 64,
            "max_position_embeddings": 32,
        },
        "model.layers",
        dtype=torch.float32,  # its attention overflows in float64
    ),
    "mamba": Case(
        "mamba", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4}, "backbone.layers"
    ),
    "bloom": Case(
        "bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}, "transformer.h", True
    ),
    "falcon-old": Case("falcon", FALCON | {"multi_query": True, "parallel_attn": True}, "transformer.h", True),
    "falcon-new": Case(
        "falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, "transformer.h", True
    ),
    "falcon-alibi": Case(
        "falcon", FALCON | {"multi_query": False, "parallel_attn": False, "alibi": True}, "transformer.h", True
    ),
    "falcon-alibi-eager": Case(
        "falcon", FALCON | {"multi_query": False, "parallel_attn": False, "alibi": True}, "transformer.h", True, "eager"
    ),
    "mpt": Case(
        "mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "max_seq_len": 32}, "transformer.blocks", True
    ),
    "gpt-neo": Case(
        "gpt_neo",
        {
            "hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "max_position_embeddings": 32,
            "attention_types": [[["global", "local"], 1]], "window_size": 4, "intermediate_size": 48,
        },
        "transformer.h",
        True,
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def made(case):
    torch.manual_seed(0)
    extra = {} if case.attn is None else {"attn_implementation": case.attn}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.kind, **case.config), **extra)
    return model.to(case.dtype).eval().requires_grad_(False)


def tokens_of(n_samples):
    return torch.randint(0, 64, (n_samples, 12), generator=torch.Generator().manual_seed(1))


def between_blocks(model, case, tokens):
    """What enters each block and what leaves the last one, in an ordinary forward pass."""
    blocks, seen = list(model.get_submodule(case.blocks)), []
    handles = [b.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for b in blocks]
    last = blocks[-1].register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in (*handles, last):
        handle.remove()
    return seen


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_blocks_run_one_by_one_in_any_batch_are_the_model(case, batch_size):
    model, tokens = made(case), tokens_of(5)
    expected = between_blocks(model, case, tokens)
    stream, kwargs = first_inputs(model, case, tokens, batch_size)
    found = [stream.hidden]
    for layer, kw in zip(model.get_submodule(case.blocks), kwargs, strict=True):
        stream = stream.through(layer, kw, CPU)
        found.append(stream.hidden)
    for a, b in zip(found, expected, strict=True):
        # Sums of at most a few hundred products in another order, in some fifty steps.
        torch.testing.assert_close(a, b, rtol=0, atol=1e3 * torch.finfo(b.dtype).eps * b.abs().max().item())


def test_logits_of_blocks_run_one_by_one_are_the_models(case, monkeypatch):
    """Whatever blocks return, and whatever comes after the last one."""
    monkeypatch.setattr(logits, "family_of", lambda _: case)
    model, tokens = made(case), tokens_of(5)
    expected = model(tokens, use_cache=False).logits
    with logits.noted_hidden(model) as noted, torch.no_grad():
        model(tokens, use_cache=False)
    kept = logits.Tail(model, share=False)
    for found in (
        torch.cat([part for _, _, part in logits.block_by_block(model, tokens, 2, "cpu")]),
        kept(tokens, *noted),
    ):
        tolerance = 1e3 * torch.finfo(expected.dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_what_is_passed_without_a_name_is_kept_by_its_name():
    model = made(CASES["xglm"])
    _, kwargs = first_inputs(model, CASES["xglm"], tokens_of(2))
    assert all(for_batch(kw, 3)["attention_mask"].shape == (3, 1, 12, 12) for kw in kwargs)


def test_recording_works_with_a_single_sample():
    model, case = made(CASES["bloom"]), CASES["bloom"]
    tokens = tokens_of(1)
    stream, kwargs = first_inputs(model, case, tokens)
    assert isinstance(kwargs[0]["alibi"], PerSample)
    for layer, kw in zip(model.get_submodule(case.blocks), kwargs, strict=True):
        stream = stream.through(layer, to_device(kw, CPU), CPU)
    torch.testing.assert_close(stream.hidden, between_blocks(model, case, tokens)[-1], rtol=1e-10, atol=1e-10)


class _Reading(nn.Module):
    """A model whose blocks are told something of the tokens."""

    device = CPU

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([_Told()])

    def forward(self, ids, use_cache):
        return self.blocks[0](ids[..., None].double(), shift=ids.double()[..., None])


class _Told(nn.Module):
    def forward(self, hidden, shift):
        return hidden + shift


def test_blocks_that_are_told_of_the_tokens_are_refused():
    with pytest.raises(NotImplementedError, match="'shift' depends on the tokens"):
        first_inputs(_Reading(), Case("", {}, "blocks"), tokens_of(2))


def test_a_forward_of_the_modules_own_comes_back_after_a_stub():
    layer = nn.Linear(2, 2)
    layer.forward = own = lambda x: x
    with swapped(layer, "forward", lambda x: 2 * x):
        assert layer(3) == 6
    assert layer.forward is own


def test_collected_batches_are_concatenated_where_they_fit():
    whole = torch.randn(5, 3)
    parts = whole.split(2)
    assert torch.equal(collected(iter(parts), 5), whole)
    into = torch.zeros(5, 3)
    assert collected(parts, 5, into) is into
    assert torch.equal(into, whole)
    wider = collected([p.double() for p in parts], 5, into)
    assert wider.dtype == torch.float64
    assert torch.equal(wider, whole.double())
    with pytest.raises(AssertionError, match="5 samples of 6"):
        collected(parts, 6)


def test_batches_are_not_held_together_while_they_are_collected():
    alive = weakref.WeakSet()

    def batches():
        for _ in range(6):
            assert len(alive) <= 1, "only the last one is there while the next is made"
            batch = torch.zeros(2, 3)
            alive.add(batch)
            yield batch
            del batch

    assert collected(batches(), 12).shape == (12, 3)


def maps_of(folder):
    """Files of a folder that this process has mapped, deleted ones included."""
    with open("/proc/self/maps") as maps:
        return [line for line in maps if str(folder) in line]


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_spilled_stream_is_the_same_bit_for_bit(dtype, tmp_path):
    model, case, tokens = made(CASES["llama"]).to(dtype), CASES["llama"], tokens_of(5)
    plain, kwargs = first_inputs(model, case, tokens)
    with spilling(0, tmp_path):
        spilled, _ = first_inputs(model, case, tokens)
        layer = model.model.layers[0]
        assert torch.equal(spilled.hidden, plain.hidden)
        out = spilled.through(layer, kwargs[0], CPU)
    assert torch.equal(out.hidden, plain.through(layer, kwargs[0], CPU).hidden)
    assert out.hidden.dtype == dtype


@needs_proc
def test_only_what_is_larger_than_the_limit_is_spilled(tmp_path):
    with spilling(4000, tmp_path):
        small, large = empty((10, 100), torch.float32), empty((10, 101), torch.float32)
        assert len(maps_of(tmp_path)) == 1
    unlimited = empty((10, 101), torch.float32)
    assert len(maps_of(tmp_path)) == 1
    assert (small.shape, large.shape, unlimited.shape) == ((10, 100), (10, 101), (10, 101))


@needs_proc
def test_a_spilled_tensors_file_has_no_name_and_goes_with_the_last_view(tmp_path):
    with spilling(0, tmp_path):
        stream = Stream(empty((4, 3, 2), torch.float32))
    stream.hidden.fill_(7.0)
    assert not list(tmp_path.iterdir())
    head = stream.head(1)
    del stream
    assert maps_of(tmp_path)
    assert bool((head.hidden == 7.0).all())
    del head
    assert not maps_of(tmp_path)


@needs_proc
def test_a_killed_process_leaves_no_file(tmp_path):
    code = (
        "import os, signal, sys, torch; from pathlib import Path; from qbench.calib.spill import *\n"
        "with spilling(0, Path(sys.argv[1])): empty((1000,), torch.float32).fill_(1.0); x = empty((9,), torch.float32)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert result.returncode == -9
    assert not list(tmp_path.iterdir())


def test_a_full_disk_says_what_was_needed_and_what_to_set(tmp_path, monkeypatch):
    def full(file, offset, n_bytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(spill.os, "posix_fallocate", full, raising=False)
    with spilling(0, tmp_path), pytest.raises(OSError, match="No space left") as caught:
        empty((3, 5), torch.bfloat16)
    assert caught.value.errno == errno.ENOSPC
    for part in ("30 bytes", repr(str(tmp_path)), "are free there", "calib.spill_folder", "calib.n_samples"):
        assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_more_than_the_disk_holds_is_refused_at_once(tmp_path):
    """The real refusal of the file system, which a file with holes would not meet."""
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("the system cannot reserve room")
    with spilling(0, tmp_path), pytest.raises(OSError, match="bytes of hidden states"):
        empty((1 << 50,), torch.uint8)


def test_a_missing_folder_is_named(tmp_path):
    with spilling(0, tmp_path / "absent"), pytest.raises(OSError, match="absent"):
        empty((3,), torch.float32)
