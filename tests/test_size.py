"""Models of any size: blocks on disk give what blocks in memory give, and a job that was broken off goes on."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from qbench import measure
from qbench.algorithms.awq import AWQScale
from qbench.algorithms.base import Pipeline
from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.lora import LoRA
from qbench.algorithms.quarot import QuaRot
from qbench.algorithms.rtn import RTN
from qbench.calib.spill import spilling
from qbench.calib.stream import first_inputs
from qbench.data.calibration import CalibrationSet
from qbench.engine import quantize
from qbench.evaluate.logits import block_by_block, hopping, whole
from qbench.evaluate.plan import EvalPlan
from qbench.job import Job
from qbench.models import parking
from qbench.models.disk import at_hand, on_disk
from qbench.models.family import family_of
from qbench.models.load import ModelRef
from qbench.progress import STATE, Progress, save_tensors
from qbench.quant.scheme import Scheme
from qbench.zoo import WEIGHTS

from .families import config_of, family_model
from .test_laws import logits

ALGORITHMS = {
    "gptq": (Pipeline((GPTQ(),)), Scheme.of(4, group_size=8)),
    "awq-static": (
        Pipeline((AWQScale(), RTN())),
        Scheme.of(4, 8, act_granularity="tensor", act_symmetric=False),
    ),
    "quarot-gptq": (Pipeline((QuaRot(), GPTQ())), Scheme.of(4, 4, kvbits=4, kv_layout="tensor")),
}
FAMILIES = ["llama:mha-tied", "gpt2", "qwen2_moe", "falcon:new", "mamba"]


@pytest.fixture
def tokens():
    return torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(tmp_path):
    """Saves a tiny random model in the hub's layout, in shards, with a tokenizer; returns the folder."""

    def save(name, n_blocks=3):
        from transformers import AutoModelForCausalLM

        torch.manual_seed(len(name))
        key = "n_layer" if name == "gpt2" else "num_hidden_layers"
        config = config_of(name, **{key: n_blocks})
        folder = tmp_path / name.replace(":", "-")
        AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="20KB")
        for file in (WEIGHTS / "micro-llama").glob("tokenizer*"):
            shutil.copy(file, folder)
        return folder

    return save


def state_of(model):
    """All tensors of a model, its blocks read from disk one after another."""
    path = family_of(model).blocks
    found = {n: p for n, p in model.state_dict().items() if not n.startswith(f"{path}.")}
    for index in range(len(model.get_submodule(path))):
        with at_hand(model, path, index) as block:
            found |= {f"{index}.{n}": p.clone() for n, p in block.state_dict().items()}
    return found


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("method", ALGORITHMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_on_disk_end_as_blocks_in_memory_do(name, method, saved, tokens, tmp_path):
    algorithm, scheme = ALGORITHMS[method]
    if name == "mamba":
        scheme = replace(scheme, kv=None)
    ref = ModelRef(str(saved(name)), attn="auto")
    model, other = ref.load(), ref.open(tmp_path / "scratch")
    assert on_disk(other)
    assert not on_disk(model)
    made = [quantize(m, algorithm, scheme, tokens, experts="all") for m in (model, other)]
    assert made[0].errors == made[1].errors
    assert made[0].stored_bits == made[1].stored_bits
    assert_equal(state_of(model), state_of(other))
    expected = torch.cat([out for *_, out in whole(model, tokens, 2)])
    streamed = torch.cat([out for *_, out in block_by_block(other, tokens, 2, "cpu")])
    with hopping(other, "cpu"):
        hopped = logits(other, tokens)
    scale = expected.abs().max()
    for found in (streamed, hopped):  # batches of other sizes are multiplied in another order
        assert (found - expected).abs().max() <= 1e-4 * scale


@pytest.mark.parametrize("name", ["llama:mha-tied", "gpt2"])
def test_embeddings_and_head_on_disk_meanwhile_change_nothing(name, saved, tokens, tmp_path, monkeypatch):
    algorithm, scheme = ALGORITHMS["quarot-gptq"]
    ref = ModelRef(str(saved(name)), attn="auto")
    model, other = ref.load(), ref.open(tmp_path / "scratch")
    quantize(model, algorithm, scheme, tokens)
    monkeypatch.setattr(parking, "_LARGE", 0)
    quantize(other, algorithm, scheme, tokens)
    assert_equal(state_of(model), state_of(other))
    path = family_of(other).blocks
    with parking.parked(other, path):
        assert all(p.is_meta for p in other.parameters())
        written = (tmp_path / "scratch" / "outside.safetensors").stat().st_mtime_ns
    expected = torch.cat([out for *_, out in block_by_block(model, tokens, 2, "cpu")])
    assert torch.equal(torch.cat([out for *_, out in block_by_block(other, tokens, 2, "cpu")]), expected)
    assert (tmp_path / "scratch" / "outside.safetensors").stat().st_mtime_ns == written, "nothing had changed"
    other.get_input_embeddings().weight += 1
    changed = other.get_input_embeddings().weight.clone()
    with parking.parked(other, path):
        pass
    assert torch.equal(other.get_input_embeddings().weight, changed)


def test_models_that_follow_one_another_share_no_inputs(saved, tokens, tmp_path, monkeypatch):
    """Blocks on disk are no reason to take the first block's inputs of the model before."""
    folders = [saved("llama"), saved("mistral")]
    monkeypatch.setattr(measure, "calibration_tokens", lambda *_: tokens)
    shared, calib = measure.Shared(), CalibrationSet("random", n_samples=4, seq_len=16)
    found = []
    for folder in folders:
        ref = ModelRef(str(folder), offload="disk")
        job = Job(ref, "gptq", GPTQ(), Scheme.of(4), calib, EvalPlan(ppl=("stdlib_docs",)))
        model = shared.opened(ref, tmp_path / folder.name / "blocks")
        found.append(shared.first(model, job))
        expected, _ = first_inputs(ref.load(), family_of(model), tokens, calib.batch_size)
        assert torch.equal(found[-1][0].hidden, expected.hidden)
    assert not torch.equal(found[0][0].hidden, found[1][0].hidden)


@pytest.mark.parametrize("method", ALGORITHMS)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_run_that_was_broken_off_goes_on_in_the_block_it_was_in(name, method, saved, tokens, tmp_path):
    algorithm, scheme = ALGORITHMS[method]
    ref = ModelRef(str(saved(name)), attn="auto")

    def run(folder, on_block=lambda done, total: None):
        model = ref.open(folder / "blocks")
        settings = {"experts": "all", "progress": Progress(folder), "on_block": on_block}
        return model, quantize(model, algorithm, scheme, tokens, **settings)

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    model, result = run(tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "two", stop)
    torch.manual_seed(1)  # another process has another state
    met = []
    other, resumed = run(tmp_path / "two", lambda done, total: met.append(done))
    assert (result.resumed_at, resumed.resumed_at, met) == (0, 2, [3])
    assert resumed.errors == result.errors
    assert resumed.reports == json.loads(json.dumps(result.reports))
    assert_equal(state_of(model), state_of(other))
    streams = [torch.cat([out for *_, out in block_by_block(m, tokens, 2, "cpu")]) for m in (model, other)]
    assert torch.equal(*streams)  # activations and keys are quantized as before, too


def test_a_state_is_noted_whole_or_not_at_all(tmp_path):
    progress = Progress(tmp_path / "job")
    assert progress.read() is None
    save_tensors(progress.block_file(0), {})
    progress.note(1, {"result": {}}, {"inputs": torch.ones(2)})
    (tmp_path / "job" / "state.part").write_text("{")  # a kill while the next one was written
    assert progress.read() == {"result": {}, "done": 1}
    progress.note(2, {"result": {}}, {"inputs": torch.zeros(2)})
    assert progress.read() is None  # what is left of the second block was lost: it begins anew
    save_tensors(progress.block_file(1), {})
    assert progress.read() == {"result": {}, "done": 2}
    assert torch.equal(progress.tensors(2)["inputs"], torch.zeros(2))
    assert [p.name for p in (tmp_path / "job").glob("entering_*")] == ["entering_00002.safetensors"]
    file = tmp_path / "job" / STATE
    file.write_text(json.dumps({"result": {}, "done": 2}))  # an older version's, which left other tensors
    assert progress.read() is None


def test_what_leaves_hooks_behind_cannot_be_taken_up_again():
    assert Pipeline((GPTQ(),)).resumable
    assert not Pipeline((RTN(), LoRA())).resumable


def test_hidden_states_in_a_file_change_nothing(tokens, tmp_path):
    one, two = family_model("llama"), family_model("llama")
    quantize(one, GPTQ(), Scheme.of(4, group_size=8), tokens)
    with spilling(0, tmp_path):
        quantize(two, GPTQ(), Scheme.of(4, group_size=8), tokens)
    assert_equal(state_of(one), state_of(two))


def test_a_folder_in_the_hubs_layout_gives_one_record_in_memory_and_on_disk(saved, qbench, tmp_path):
    folder = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    assert len(list(folder.glob("*.safetensors"))) > 2
    tokenizer_words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    words = max(tokenizer_words.values()) + 1
    from transformers import AutoModelForCausalLM, LlamaConfig

    kept = {
        k: v for k, v in config.items() if k not in ("vocab_size", "transformers_version", "architectures")
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**kept, vocab_size=words + 64))
    model.bfloat16().save_pretrained(folder, max_shard_size="20KB")
    common = [
        "model=hf", f"model.id={folder}", "algo=gptq", "wbits=4", "group_size=8", "calib.n_samples=4", "calib.seq_len=32",
        "eval.ppl=[stdlib_docs]", "eval.tasks=[]", "eval.seq_len=32", "eval.max_windows=4", "tracker=none",
        "launcher=inline",
    ]  # fmt: skip
    records = {}
    for offload in ("memory", "disk"):
        assert qbench(*common, f"model.offload={offload}", f"results={offload}") == 0
        (path,) = (tmp_path / offload / "records").glob("*/record.json")
        records[offload] = json.loads(path.read_text())
        assert not (tmp_path / offload / "partial").exists()
    one, two = records["memory"], records["disk"]
    assert one["fingerprint"] == two["fingerprint"]
    assert one["block_errors"] == two["block_errors"]
    assert one["metrics"]["ppl/stdlib_docs"] == pytest.approx(two["metrics"]["ppl/stdlib_docs"], rel=1e-5)
    assert (one["model"]["blocks"], two["model"]["blocks"]) == ("memory", "disk")
    assert one["model"]["checkpoint_dtype"] == "bfloat16"
    assert one["model"]["dtype"] == "float32"


@pytest.mark.parametrize("offload", ["memory", "disk"])
def test_a_shard_that_was_cut_off_is_named(saved, offload, qbench, tmp_path, capsys):
    folder = saved("llama")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    code = qbench(
        "model=hf", f"model.id={folder}", "algo=rtn", "wbits=4", "group_size=8", "eval.ppl=[stdlib_docs]",
        "eval.tasks=[]", "eval.seq_len=32", "eval.max_windows=2", "tracker=none", "launcher=inline",
        f"model.offload={offload}",
    )  # fmt: skip
    assert code != 0
    assert shard.name in capsys.readouterr().out + capsys.readouterr().err
