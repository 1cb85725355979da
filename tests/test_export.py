"""What is exported is what was evaluated: as stored, as loaded, whole or not at all."""

import gc
import json
import os
import shutil
import subprocess
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qbench.deploy.formats import FORMATS
from qbench.deploy.formats.compressed import CompressedTensors
from qbench.deploy.writer import Writer
from qbench.errors import Unsuitable
from qbench.export.parity import Difference, InEngine
from qbench.export.run import Export, export, prepared
from qbench.job import Job
from qbench.models.layout import hub_tensors, is_tied, plain
from qbench.models.load import ModelRef
from qbench.models.manifest import MANIFEST, verify
from qbench.remade import remade
from qbench.run import device_name
from qbench.sweep.composed import config_of
from qbench.sweep.settings import Jobs
from qbench.zoo import WEIGHTS

from .families import SIZES
from .families import config_of as family_config
from .reference.packing_int32 import dequantized, unpacked

SMALL = ("model=nano-llama", "eval=quick", "eval.seq_len=64", "calib.n_samples=2", "calib.seq_len=64")
INT8 = ("scheme=w8a8", "weight_symmetric=true", "act_symmetric_mode=gptq")
EXACT = {
    "w4g128": ("algo=gptq", "scheme=w4a16g128"),
    "w4g128 symmetric": ("algo=awq", "scheme=w4a16g128sym"),
    "w3g128": ("algo=gptq", "scheme=w3a16g128"),
    "w2g64": ("algo=awq", "scheme=w2a16g64"),
    "w8": ("algo=gptq", "scheme=w8a16"),
    "w8a8": ("algo=gptq", *INT8),
    "w8a8 static": ("algo=rtn", "scheme=w8a8_static", "weight_symmetric=true"),
    "w4a8": ("algo=rtn", "scheme=w4a8g128", "act_symmetric_mode=gptq"),
    "w4g128, half a step": ("algo=rtn", "scheme=w4a16g128sym", "symmetric_mode=gptq"),
    "fp8": ("algo=gptq", "scheme=fp8"),
    "fp8 in blocks": ("algo=rtn", "scheme=fp8_block", "group_size=64", "act_group_size=64"),
    "fp8 static": ("algo=gptq", "scheme=fp8_static"),
    "mixed": ("algo=gptq", "scheme=w4a16g128_down8"),
    "rotated offline": ("algo=quarot_gptq", "scheme=w4a16g128", "algo.steps.rotate.online=false"),
    "scales in 3 bits": ("algo=rtn", "scheme=w4a16g64", "scale_bits=3"),
}
BFLOAT16 = {
    "mxfp4": ("algo=gptq", "scheme=mxfp4", "abits=16"),
    "mxfp8": ("algo=rtn", "scheme=mxfp8", "abits=16"),
    "nvfp4": ("algo=gptq", "scheme=nvfp4", "abits=16"),
    "nvfp4, clipped": ("algo=mse", "scheme=nvfp4", "abits=16"),
    "w4g128": ("algo=gptq", "scheme=w4a16g128"),
}


def job_of(*settings: str, small: bool = True) -> Job:
    job = Jobs().job(config_of([*(SMALL if small else ()), *settings]))
    job.check()
    return job


def exported(tmp_path: Path, to: str, *settings: str, dtype: str | None = None, small: bool = True) -> Export:
    job = job_of(*settings, small=small)
    return export(job, None, prepared(job, to, dtype), tmp_path / "out")


def _quick(quick: set[str], all_: dict[str, Any]) -> list[Any]:
    """Those of the default suite as they are, the others marked slow."""
    return [pytest.param(v, id=k, marks=[] if k in quick else pytest.mark.slow) for k, v in all_.items()]


@pytest.mark.parametrize("recipe", _quick({"w4g128", "w8a8"}, EXACT))
def test_integers_and_fp8_are_loaded_to_the_bit(recipe, tmp_path):
    done = exported(tmp_path, "compressed-tensors", *recipe)
    assert done.parity is not None
    assert done.parity.evaluated.largest == 0.0
    assert done.parity.is_exact
    assert done.parity.ppl_loaded == done.parity.ppl_evaluated
    # Shapes, zero-points that are packed eight rows at a time, and ten codes of three bits in 32 are what bits do not say.
    most = 1.01 if "scheme=w3a16g128" not in recipe else 1.02 * 3.2 / 3
    assert done.expected_bytes <= done.bytes <= done.expected_bytes * most


@pytest.mark.parametrize("recipe", _quick({"nvfp4"}, BFLOAT16))
def test_bfloat16_is_what_the_format_stores_to_the_bit_and_near_what_was_evaluated(recipe, tmp_path):
    done = exported(tmp_path, "compressed-tensors", *recipe, dtype="bfloat16")
    assert done.parity is not None
    assert done.parity.expected.largest == 0.0
    # Weights, embeddings and all sums are rounded to eight bits, as when every linear layer's output is.
    assert 0 < done.parity.evaluated.mean <= 4 * done.parity.floor
    assert done.bytes == pytest.approx(done.expected_bytes, rel=0.01)


def test_scales_of_inputs_in_bfloat16_are_rounded_and_no_more(tmp_path):
    done = exported(tmp_path, "compressed-tensors", "algo=rtn", *INT8, dtype="bfloat16")
    assert done.parity is not None
    assert 0 < done.parity.expected.mean <= 4 * done.parity.floor


MICRO = ("w4g128", "w4g128 symmetric", "w3g128", "w2g64", "w8", "w8a8", "fp8")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MICRO, "mxfp4", "nvfp4"])
def test_micro_llama_is_loaded_to_the_bit_or_as_bfloat16_stores_it(name, tmp_path):
    recipe, dtype = (EXACT[name], None) if name in EXACT else (BFLOAT16[name], "bfloat16")
    micro = ("model=micro-llama", *SMALL[1:])
    done = exported(tmp_path, "compressed-tensors", *recipe, *micro, dtype=dtype, small=False)
    assert done.parity is not None
    assert (done.parity.evaluated if dtype is None else done.parity.expected).largest == 0.0


@pytest.mark.parametrize(
    "overrides", [{"0.*": "w16a16"}, {"0.*": "w8a16", "1.*down_proj": "w16a16"}], ids=str
)
def test_layers_that_some_blocks_leave_in_floating_point_are_ignored_there_alone(overrides, tmp_path):
    config = config_of([*SMALL, "algo=rtn", "scheme=w4a16g128sym"])
    config["scheme"]["overrides"] = overrides
    job = Jobs().job(config)
    done = export(job, None, prepared(job, "compressed-tensors"), tmp_path / "out")
    assert done.parity is not None
    assert done.parity.is_exact


def test_routers_are_ignored_by_engines_that_take_them_for_linear_layers(tmp_path):
    folder = _folder("qwen3_moe", tmp_path / "model")
    settings = ("model=hf", f"model.id={folder}", "algo=rtn", "scheme=w8a16", "weight_symmetric=true")
    job = Jobs().job(config_of([*SMALL[1:], *settings]))
    export(job, None, prepared(job, "compressed-tensors"), tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert r"re:model\.layers\.\d+\.mlp\.gate$" in said["ignore"]


def test_whoever_lets_go_of_a_model_is_rid_of_it():
    """Else two models would be in memory when the checkpoint is loaded back."""
    with remade(job_of("algo=rtn", "scheme=w4a16g128")) as again:
        there = weakref.ref(again.model)
        again.layers.clear()
        again.model = None
        gc.collect()
        assert there() is None


CODES = {f"{b} {s}": (b, s) for b in (2, 3, 4, 8) for s in (False, True)}


@pytest.mark.parametrize("grid", _quick({"3 False"}, CODES))
def test_the_integers_are_those_that_the_algorithm_chose(grid, tmp_path):
    """Unpacked by hand, they are GPTQ's weights to the bit, and not those of rounding to nearest."""
    bits, symmetric = grid
    scheme = (f"wbits={bits}", "group_size=64", f"weight_symmetric={symmetric}")
    exported(tmp_path, "compressed-tensors", "algo=gptq", *scheme)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    others = 0
    with remade(job_of("algo=gptq", *scheme)) as gptq, remade(job_of("algo=rtn", *scheme)) as rtn:
        for layer, nearest in zip(gptq.layers, rtn.layers, strict=True):
            own = {
                n.removeprefix(f"{layer.name}."): t
                for n, t in tensors.items()
                if n.startswith(f"{layer.name}.")
            }
            assert torch.equal(dequantized(own, bits), layer.weight)
            others += int((layer.weight != nearest.weight).sum())
    assert others


def test_the_integers_are_those_that_the_algorithm_chose_where_scales_are_rounded(tmp_path):
    exported(tmp_path, "compressed-tensors", "algo=rtn", "scheme=w8a16", dtype="bfloat16")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    with remade(job_of("algo=rtn", "scheme=w8a16")) as rtn:
        for layer in rtn.layers:
            packed = unpacked(tensors[f"{layer.name}.weight_packed"], 8, layer.weight.shape[1])
            assert torch.equal(packed + 128, layer.codes().long())


def test_the_plain_way_of_transformers_loads_it_and_generates(tmp_path):
    exported(tmp_path, "compressed-tensors", "algo=gptq", "scheme=w4a16g128sym")
    folder = tmp_path / "out"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Return the", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "pack-quantized"
    assert config["ignore"] == ["lm_head"]


def test_other_rules_for_inputs_are_told_and_are_all_that_differs(tmp_path):
    done = exported(tmp_path, "compressed-tensors", "algo=rtn", "scheme=w8a8", "weight_symmetric=true")
    assert done.parity is not None
    assert done.parity.expected.largest == 0.0
    assert done.parity.evaluated.largest > 0
    assert any("act_symmetric_mode=gptq" in note for note in done.notes)


@pytest.mark.parametrize("more", [("kv_symmetric=true",), ("kv_format=e4m3",)], ids=str)
def test_scales_of_keys_and_values_are_there(more, tmp_path):
    kv = ("kvbits=8", "kv_layout=tensor", *more)
    done = exported(tmp_path, "compressed-tensors", "algo=rtn", "scheme=w4a16g128", *kv)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    scales = {name: t for name, t in tensors.items() if name.endswith(("k_scale", "v_scale"))}
    assert len(scales) == 2 * len({name.split(".")[2] for name in scales})
    assert all(t.shape == (1,) and t > 0 for t in scales.values())
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
        "kv_cache_scheme"
    ]
    assert (said["num_bits"], said["type"]) == (8, "float" if "e4m3" in more[0] else "int")
    assert done.parity is not None
    assert done.parity.expected.largest == 0.0


REFUSED = {
    "online Hadamard": (("algo=quarot_gptq",), "compressed-tensors", "algo.steps.rotate.online=false"),
    "online Hadamard, hf": (("algo=quarot_gptq",), "hf", "algo.steps.rotate.online=false"),
    "nothing but the cache": (("wbits=16", "kvbits=4"), "hf", "kv_layout=tensor"),
    "outliers": (("algo=spqr", "scheme=spqr"), "compressed-tensors", "--to hf"),
    "widths inside a layer": (("algo=slimllm", "wbits=2"), "compressed-tensors", "--to hf"),
    "real zero-points": (("algo=hqq",), "compressed-tensors", "--to gguf"),
    "nf4": (("scheme=nf4",), "compressed-tensors", "--to hf"),
    "products": (("scheme=w4a4_bmm",), "compressed-tensors", "quant_bmm"),
    "cache by token": (("kvbits=4",), "compressed-tensors", "kv_layout=tensor"),
    "NVFP4 inputs": (("scheme=nvfp4",), "compressed-tensors", "abits=16"),
    "MX inputs": (("scheme=mxfp8",), "compressed-tensors", "abits=16"),
    "single outliers": (("algo=easyquant",), "compressed-tensors", "--to hf"),
    "LayerNorms that are rotated": (
        ("model=micro-opt", "algo=quarot_gptq", "scheme=w4a16", "algo.steps.rotate.online=false"), "hf", "without rotations",
    ),
    "MX in float32": (("scheme=mxfp4", "abits=16"), "compressed-tensors", "dtype=bfloat16"),
    "floating point": (("algo=fp", "wbits=16"), "compressed-tensors", "--to hf"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "to", "offer"), REFUSED.values(), ids=REFUSED)
def test_what_a_format_cannot_hold_is_refused_before_anything_is_loaded(settings, to, offer, monkeypatch):
    monkeypatch.setattr(ModelRef, "load", lambda _: pytest.fail("it was loaded"))
    with pytest.raises(Unsuitable, match=offer):
        prepared(job_of(*settings), to)


@pytest.mark.parametrize(
    "settings", [("algo=spqr", "scheme=spqr"), ("algo=hqq",), ("scheme=nf4",), ("scheme=w4a4",)], ids=str
)
def test_floating_point_holds_any_grid_and_says_what_it_leaves_out(settings, tmp_path):
    done = exported(tmp_path, "hf", *settings)
    assert done.parity is not None
    assert done.parity.expected.largest == 0.0
    assert done.parity.is_exact == (not done.notes)
    assert bool(done.notes) == ("scheme=w4a4" in settings)


def _folder(name: str, path: Path) -> Path:
    """A random model of a family in the hub's layout, with the embedded tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "nano-llama")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(name, vocab_size=len(tokenizer)))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


FEW = ("qwen3_moe", "mixtral", "gpt2", "phi3")


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in SIZES])
def test_every_family_goes_back_to_the_layout_of_the_hub_to_the_bit(name, tmp_path):
    folder = _folder(name, tmp_path)
    model = ModelRef(str(folder), attn="auto").load()
    stored = load_file(folder / "model.safetensors")
    state = {n: t for n, t in model.state_dict().items() if not (is_tied(model) and n == "lm_head.weight")}
    back = hub_tensors(model, plain(model), state)
    # Positions that an architecture computes are not stored.
    assert stored.keys() <= back.keys() | {"lm_head.weight"}
    assert all(torch.equal(back[n], t) for n, t in stored.items() if n in back)


@pytest.mark.parametrize("to", ["hf", "compressed-tensors"])
@pytest.mark.parametrize(
    "name",
    ["mixtral", pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("phi3", marks=pytest.mark.slow)],
)
def test_experts_and_fused_layers_are_loaded_as_they_were_written(name, to, tmp_path):
    folder = _folder(name, tmp_path / "model")
    settings = ("model=hf", f"model.id={folder}", "algo=rtn", "scheme=w8a16", "weight_symmetric=true")
    job = Jobs().job(config_of([*SMALL[1:], *settings]))
    if (name, to) == ("mixtral", "compressed-tensors"):
        with pytest.raises(Unsuitable, match="weight_symmetric=true"):
            prepared(Jobs().job(config_of([*SMALL[1:], *settings[:-1]])), to)
    if (name, to) == ("gpt2", "compressed-tensors"):
        with pytest.raises(Unsuitable, match="is a Conv1D to transformers"):
            prepared(job, to)
        return
    done = export(job, None, prepared(job, to), tmp_path / "out")
    assert done.parity is not None
    assert done.parity.holds


def test_blocks_on_disk_give_the_same_files(tmp_path):
    whole = exported(tmp_path / "a", "compressed-tensors", "algo=gptq", "scheme=w4a16g128")
    parts = exported(
        tmp_path / "b",
        "compressed-tensors",
        "algo=gptq",
        "scheme=w4a16g128",
        "model.offload=disk",
        f"results={tmp_path}/r",
    )
    assert parts.parity is None
    assert "larger than the memory" in parts.not_compared
    a, b = (load_file(done.folder / "model.safetensors") for done in (whole, parts))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_an_export_that_was_broken_off_goes_on_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    settings = ("algo=gptq", "scheme=w4a16g128", "model.offload=disk", f"results={tmp_path}/r")
    job = job_of(*settings)
    block, met = CompressedTensors.block, []

    def broken(self: Any, writer: Any, path: str, *more: Any) -> None:
        met.append(path)
        if len(met) == 2:
            raise KeyboardInterrupt
        block(self, writer, path, *more)

    monkeypatch.setattr(CompressedTensors, "block", broken)
    with pytest.raises(KeyboardInterrupt):
        export(job, None, prepared(job, "compressed-tensors"), tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]
    again = export(job, None, prepared(job, "compressed-tensors"), tmp_path / "out")
    whole = exported(tmp_path / "whole", "compressed-tensors", *settings[:2])
    a, b = (load_file(done.folder / "model.safetensors") for done in (again, whole))
    assert all(torch.equal(a[name], b[name]) for name in a | b)
    assert not list((tmp_path / "r").rglob("*.safetensors"))


def test_what_a_killed_export_left_is_cleared_and_what_another_is_writing_is_not(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    killed, running = (tmp_path / f".out.{pid}.part" for pid in (gone.pid, os.getppid()))
    for folder in (killed, running):
        folder.mkdir()
    with Writer(tmp_path / "out"):
        assert not killed.exists()
        assert running.exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    exported(path, "hf", "algo=rtn", "scheme=w4a16g128")
    return path / "out"


def _flip(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a bit": (_flip, "is not what was exported"),
    "cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]),
        "was cut off",
    ),
    "a file missing": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "weights added": (
        lambda f: shutil.copy(f / "model.safetensors", f / "more.safetensors"),
        "more.safetensors",
    ),
    "another config": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text() + " "),
        "config.json",
    ),
    "a damaged manifest": (lambda f: (f / MANIFEST).write_text("{"), "is damaged"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_and_nothing_is_loaded(damage, message, checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    verify(folder)
    damage(folder)
    with pytest.raises(OSError, match=message):
        verify(folder)
    with pytest.raises(OSError, match=message):
        ModelRef(str(folder)).load()


def test_without_a_manifest_a_folder_was_not_exported_to_the_end(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / MANIFEST).unlink()
    with pytest.raises(OSError, match="not to the end"):
        verify(tmp_path / "copy")


def _spoil(writer: Writer) -> int:
    """Write the checkpoint, and then another scale into it."""
    size = CLOSE(writer)
    file = writer.folder / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("weight_scale"))
    tensors[name][0] *= 1.01
    save_file(tensors, file, metadata={"format": "pt"})
    return size


CLOSE = Writer.close_tensors


def test_an_engine_is_allowed_its_rounding_of_inputs_and_that_of_sums():
    """Where it rounds no inputs, that of sums is all: KL is of second order in a difference of logits."""
    same = Difference(0.0, 0.0, 0.0, 1.0)
    assert InEngine("x", same, 1e-12, 0.0, 1e-13, 1.0).holds
    assert not InEngine("x", same, 1e-9, 0.0, 1e-13, 1.0).holds
    assert InEngine("x", same, 2e-4, 1e-4, 1e-13, 1.0).holds
    assert not InEngine("x", same, 2.1e-4, 1e-4, 1e-13, 1.0).holds


def test_a_checkpoint_that_is_not_what_was_evaluated_is_not_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(Writer, "close_tensors", _spoil)
    with pytest.raises(RuntimeError, match="is not what was written"):
        exported(tmp_path, "compressed-tensors", "algo=rtn", "scheme=w4a16g128")
    assert not list(tmp_path.iterdir())


def test_another_model_than_the_record_has_is_not_exported(tmp_path):
    job = job_of("algo=gptq", "scheme=w4a16g128")
    with remade(job) as again:
        record = {
            "fingerprint": job.fingerprint,
            "metrics": again.size,
            "block_errors": again.quantized.errors,
            "device": device_name("cpu"),
        }
    record["block_errors"] = [error * 1.1 for error in record["block_errors"]]
    with pytest.raises(RuntimeError, match="the error of block 0 was"):
        export(job, record, prepared(job, "hf"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_many_shards_are_one_checkpoint(tmp_path):
    tensors = {f"layer.{i}": torch.full((100,), float(i)) for i in range(10)}
    with Writer(tmp_path / "out", shard_bytes=1000) as writer:
        writer.add(tensors)
        assert writer.close_tensors() == 4000
        writer.publish()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4000
    assert len(set(index["weight_map"].values())) == 4
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "out" / file)[name], tensors[name])
    with Writer(tmp_path / "twice") as writer:
        writer.add({"a": torch.ones(1)})
        with pytest.raises(ValueError, match="is in the checkpoint already"):
            writer.add({"a": torch.ones(1)})


def test_the_command_exports_a_record_and_verifies_it(qbench, tmp_path, capsys):
    assert qbench("algo=gptq", "scheme=w4a16g128", *SMALL, "tracker=none") == 0
    assert qbench("export", "gptq/w4a16g128", "--to", "compressed-tensors", "out=made") == 0
    out = capsys.readouterr().out
    assert "logits equal to the bit" in out
    card = (tmp_path / "made" / "README.md").read_text()
    record = json.loads(next((tmp_path / "results" / "records").glob("*/record.json")).read_text())
    assert record["fingerprint"] in card
    (again,) = [line for line in card.splitlines() if line.startswith("qbench algo=gptq")]
    assert "calib.n_samples=2" in again
    assert f"qbench export {record['fingerprint']} --to compressed-tensors\n" in card
    assert f"{record['metrics']['ppl/stdlib_docs']:.4g} ± " in card
    assert "stdlib_docs: 2 samples of 64 tokens, seed 0" in card
    assert qbench("export", "verify", "made") == 0
    assert "as exported" in capsys.readouterr().out
    assert qbench("export", record["fingerprint"][:6], "--to=hf", "out=made") == 2
    assert "exists" in capsys.readouterr().err
    _flip(tmp_path / "made")
    assert qbench("export", "verify", "made") == 2
    assert "is not what was exported" in capsys.readouterr().err


def test_the_command_says_what_is_wrong(qbench, capsys):
    wrong = {
        ("algo=gptq",): "say what to export to",
        ("algo=gptq", "--to", "onnx"): "there is no format 'onnx'; there are compressed-tensors",
        ("--to", "hf"): "name the recipe",
        ("4f1c2a", "--to", "hf"): "no records under",
        ("algo=gptq", "--to", "hf", "dtype=int8"): "dtype is 'int8'",
        ("algo=gptq", "--to", "hf", "--fast"): "there is no option --fast",
        ("verify", "nowhere"): "has no qbench_manifest.json",
    }
    for arguments, message in wrong.items():
        assert qbench("export", *arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_has_a_name_and_says_what_loads_it(name):
    assert FORMATS[name].name == name
    assert FORMATS[name].title
