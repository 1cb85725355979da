"""A job's memory is known before it starts: never less than what is measured, and not much more."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from qbench.memory.check import check, describe
from qbench.memory.estimate import Work, estimate, estimated
from qbench.memory.free import _cgroup_room, free_memory
from qbench.models.family import family_of

SIZES = {
    "hidden_size": 512, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 16000,
}  # fmt: skip
WORK = Work(
    torch.float32, needs_data=True, n_samples=64, seq_len=128, batch_size=4, eval_windows=8, eval_seq_len=512,
    eval_batch_size=4,
)  # fmt: skip


def skeleton_of(**changes):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | changes))


def estimate_of(work, **changes):
    skeleton = skeleton_of(**changes)
    return estimate(skeleton, family_of(skeleton), work)


MEASURED = """
import datasets, json, lm_eval, mlflow, sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.rtn import RTN
from qbench.data.windows import Windows
from qbench.engine import quantize
from qbench.evaluate.logits import whole
from qbench.evaluate.perplexity import window_losses
from qbench.quant.scheme import Scheme

sizes, algo, work = json.loads(sys.argv[1])
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).eval().requires_grad_(False)
tokens = torch.randint(0, sizes["vocab_size"], (work["n_samples"], work["seq_len"]))
algorithm = {"rtn": RTN, "gptq": GPTQ}[algo]()
scheme = Scheme.parse("w4a16g128")
quantize(model, algorithm, scheme, tokens if algorithm.needs_data else None, batch_size=work["batch_size"])
windows = torch.randint(0, sizes["vocab_size"], (work["eval_windows"], work["eval_seq_len"]))
if len(windows):
    window_losses(whole(model, windows, work["eval_batch_size"]), Windows.apart(windows))
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.parametrize(
    ("algo", "work"),
    [
        ("rtn", replace(WORK, needs_data=False)),
        ("gptq", replace(WORK, eval_windows=0, eval_seq_len=0)),
        pytest.param("gptq", replace(WORK, n_samples=16), marks=pytest.mark.slow),
    ],
)
def test_the_estimate_is_never_below_the_measured_peak_and_at_most_half_as_much_again(algo, work):
    sizes = SIZES | {"num_hidden_layers": 1}
    asked = {
        key: getattr(work, key)
        for key in ("n_samples", "seq_len", "batch_size", "eval_windows", "eval_seq_len", "eval_batch_size")
    }
    command = [sys.executable, "-c", MEASURED, json.dumps([sizes, algo, asked])]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    found = estimate_of(work, num_hidden_layers=1).host.total
    assert peak <= found <= 1.5 * peak, f"{found / 1e6:.0f} MB estimated, {peak / 1e6:.0f} MB measured"


@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_weights_are_counted_once_each(tied, dtype):
    skeleton = skeleton_of(tie_word_embeddings=tied)
    n = sum(p.numel() for p in skeleton.parameters())
    found = estimate(skeleton, family_of(skeleton), replace(WORK, dtype=dtype))
    assert found.host.weights == n * dtype.itemsize


def test_streamed_weights_do_not_grow_with_depth():
    shallow, deep = (
        estimate_of(replace(WORK, streamed=True), num_hidden_layers=n).host.weights for n in (2, 20)
    )
    assert shallow == deep
    whole = [estimate_of(WORK, num_hidden_layers=n).host.weights for n in (2, 20)]
    assert whole[0] == shallow < whole[1]


@pytest.mark.parametrize(
    "more",
    [
        {"n_samples": 128}, {"seq_len": 256}, {"needs_float_path": True}, {"keeps_inputs": True}, {"copies": 2},
        {"runs_model": True},
    ],
)  # fmt: skip
def test_more_to_do_takes_more(more):
    work = replace(WORK, eval_windows=0, eval_seq_len=0)
    assert estimate_of(replace(work, **more)).host.total > estimate_of(work).host.total


@pytest.mark.parametrize("more", [{"eval_batch_size": 8}, {"compared": True}, {"dtype": torch.float64}])
def test_a_larger_evaluation_takes_more(more):
    work = replace(WORK, needs_data=False)
    assert estimate_of(work).host.phase == "eval"
    assert estimate_of(replace(work, **more)).host.total > estimate_of(work).host.total


def test_what_is_in_a_file_needs_no_memory():
    work = replace(WORK, n_samples=20_000, eval_windows=0)  # so many that no batch pauses inside a block
    stream = 20_000 * 128 * 512 * 4
    kept, spilled, below = (
        estimate_of(replace(work, spill_above=limit)).host.activations for limit in (None, stream - 1, stream)
    )
    assert kept == below
    assert kept - spilled >= 2 * stream


def test_models_whose_attention_holds_scores_take_them():
    work = replace(WORK, eval_windows=0, seq_len=1024, n_samples=4)
    found = estimate_of(work).host.activations
    skeleton = skeleton_of()
    skeleton.config._attn_implementation = "eager"
    eager = estimate(skeleton, family_of(skeleton), work).host.activations
    assert eager - found >= 4 * 8 * 1024 * 1024 * 4


def test_what_fits_is_not_refused():
    found = estimate_of(WORK)
    check(found, found.host.total)
    with pytest.raises(MemoryError):
        check(found, found.host.total - 1)


CHANGES = {
    "model.offload=disk": {"streamed": True, "copies": 1},
    "eval.streamed=true": {"eval_streamed": True},
    "calib.spill_above=0": {"spill_above": 0},
    "calib.batch_size=1": {"batch_size": 1},
    "calib.n_samples=32": {"n_samples": 32},
    "eval.batch_size=1": {"eval_batch_size": 1},
    "device=cpu": {"device": "cpu"},
}


def named_in(message):
    return [text for text in CHANGES if text in message]


@pytest.mark.parametrize("share", [0.95, 0.8, 0.6, 0.5])
@pytest.mark.parametrize("work", [WORK, replace(WORK, needs_data=False), replace(WORK, n_samples=2048)])
def test_the_settings_that_are_named_make_it_fit(work, share):
    found = estimate_of(work, num_hidden_layers=12)
    free = round(found.host.total * share)
    with pytest.raises(MemoryError, match="GB of memory on the host") as caught:
        check(found, free)
    message = str(caught.value)
    named = named_in(message)
    changes = {key: value for text in named for key, value in CHANGES[text].items()}
    changed = estimated(found.sizes, replace(work, **changes)).host.total
    assert (changed <= free) == ("with that it fits" in message)
    if len(named) > 1:  # none of them is there without need
        ordered = sorted(named, key=message.index)[:-1]
        fewer = {key: value for text in ordered for key, value in CHANGES[text].items()}
        assert estimated(found.sizes, replace(work, **fewer)).host.total > free


def test_settings_that_do_not_help_are_not_named():
    found = estimate_of(replace(WORK, needs_data=False, eval_batch_size=1, streamed=True, spill_above=0))
    with pytest.raises(MemoryError, match="no setting makes it smaller"):
        check(found, 10**6)


def test_on_a_device_the_work_is_there_and_the_waiting_on_the_host():
    on_cpu, on_gpu = (
        estimate_of(replace(WORK, device=d, n_samples=4096, eval_windows=0, eval_seq_len=0))
        for d in ("cpu", "cuda:0")
    )
    assert on_cpu.device is None
    assert on_gpu.host.workspace == 0
    assert on_gpu.device is not None
    assert on_gpu.device.workspace == on_cpu.host.workspace > 0
    assert on_gpu.host.activations >= 2 * 4096 * 128 * 512 * 4


def test_a_full_device_is_named_with_what_would_do():
    work = replace(WORK, device="cuda:0", eval_windows=0, eval_seq_len=0)
    found = estimate_of(work, num_hidden_layers=12)
    room = 10**12
    check(found, room, found.device.total)
    with pytest.raises(MemoryError, match=r"on the device cuda:0.*device=cpu saves"):
        check(found, room, found.device.total - 1)
    with pytest.raises(MemoryError) as caught:  # there is no room for it on the host
        check(found, found.host.total, found.device.total - 1)
    assert "device=cpu" not in str(caught.value)
    assert re.search(r"calib\.\w+=\d+ saves", str(caught.value))


def test_the_line_before_the_start_has_the_parts_and_what_is_free():
    line = describe(estimate_of(WORK), 18_200_000_000)
    assert re.fullmatch(r"memory: ~[\d.]+ GB \(weights [\d.]+, .*process 0\.6\) of 18\.2 GB free", line)
    assert "cuda:0 ~" in describe(estimate_of(replace(WORK, device="cuda:0")), 10**9, 10**9)


def test_free_memory_counts_what_the_process_holds():
    host, device = free_memory("cpu")
    assert device is None
    assert host > 0


def test_a_control_groups_limit_is_respected(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("0::/a/b\n")
    for name, limit, used, files in (("", None, None, None), ("a", "1000", 600, 100), ("a/b", "max", 500, 0)):
        folder = tmp_path / "fs" / name
        folder.mkdir(parents=True, exist_ok=True)
        if limit is not None:
            (folder / "memory.max").write_text(f"{limit}\n")
            (folder / "memory.current").write_text(f"{used}\n")
            (folder / "memory.stat").write_text(f"anon 5\ninactive_file {files}\n")
    assert list(_cgroup_room(tmp_path / "fs", membership)) == [1000 - 600 + 100]


def test_an_older_control_groups_limit_is_respected(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("5:cpu,cpuacct:/x\n4:memory:/outside\n")
    folder = tmp_path / "fs" / "memory"  # of a container, where the path outside is not to be seen
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("2000\n")
    (folder / "memory.usage_in_bytes").write_text("700\n")
    (folder / "memory.stat").write_text("total_inactive_file 50\n")
    assert list(_cgroup_room(tmp_path / "fs", membership)) == [1350]


def test_a_system_without_control_groups_has_no_such_limit(tmp_path):
    assert not list(_cgroup_room(tmp_path, tmp_path / "absent"))
