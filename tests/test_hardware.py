"""This machine as a device: what is measured, kept, refused. How fast it is, no test says; `benchmarks/hardware.py` does."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from qbench.deploy import hardware
from qbench.deploy.devices import HERE, device
from qbench.deploy.hardware import Measured, caches_of_cpu, measure_machine, measured, timed
from qbench.sweep.limits import read

MACHINE = Measured(
    name="this", title="A processor", threads=1, torch=torch.__version__, read={"sum": 8e9, "matrix x vector": 10e9},
    copy=9e9, peaks={"fp32": 1e11, "fp16": 2e10, "int8": 4e11}, on_chip=1e6, cache=3e7, memory=16e9,
    spread=dict.fromkeys(("sum", "matrix x vector", "copy", "fp32", "fp16", "int8"), 0.05),
)  # fmt: skip


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A cache folder of the test's own, and the measurements that were made."""
    calls = []

    def measure(here):
        calls.append(here)
        return MACHINE

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hardware, "measure_machine", measure)
    return calls


def test_a_rate_is_the_median_over_repeats_after_one_that_does_not_count():
    seconds = iter([4.0, 1.0, 2.0])
    ticks = itertools.accumulate(step for each in seconds for step in (0.5, each))
    runs = []
    rate, spread = timed(lambda: runs.append(None), 8.0, repeats=3, clock=lambda: next(ticks))
    assert rate == 8.0 / 2.0
    assert spread == (8.0 - 2.0) / 4.0
    assert len(runs) == 4


def test_a_machine_is_measured_once(asked, tmp_path):
    assert measured("this") == measured("this") == MACHINE
    assert asked == ["this"]
    (kept,) = (tmp_path / "cache" / "qbench").glob("hardware-*")
    kept.write_bytes(kept.read_bytes()[:-3])  # a damaged file is measured anew, not half read
    assert measured("this") == MACHINE
    measured("this", again=True)
    assert len(asked) == 3


def test_other_threads_and_another_torch_are_other_machines(asked, monkeypatch):
    measured("this")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    measured("this")
    monkeypatch.setattr(torch, "__version__", "0.0")
    measured("this")
    assert len(asked) == 3


def test_a_measured_machine_is_a_device(asked):
    found = device("This")
    assert (found.bandwidth, found.fp32, found.fp16, found.int8, found.fp8) == (10e9, 1e11, 2e10, 4e11, None)
    assert found.peak("fp16") == 1e11, "16 bits that are only emulated are computed in 32"
    assert found.peak("fp8") == 1e11
    assert found.source == f"measured, 1 threads, torch {torch.__version__}"


def test_whatever_takes_a_device_takes_this_machine(asked, qbench, capsys):
    assert read(["model=x", "hardware=this", "max_latency=1ms"]).hardware == device("this")
    assert qbench("roofline", "model=nano-llama", "hardware=this", "phase=decode", "model.dtype=float32") == 0
    out = capsys.readouterr().out
    assert "this: A processor, 10 GB/s" in out
    assert "fp32" in out
    assert asked == ["this"]


def test_the_command_shows_every_figure_and_measures_again(asked, qbench, capsys):
    assert qbench("hardware") == qbench("hardware", "remeasure=true") == 0
    out = capsys.readouterr().out
    assert all(
        words in out for words in ("matrix x vector", "10.00 GB/s", "matrices, int8", "400.0 GFLOP/s", "5%")
    )
    assert asked == ["this", "this"]


@pytest.mark.parametrize(("argument", "why"), [
    ("hardware=h100", "hardware=h100 is not this machine; there are this, this-cuda"),
    ("remeasure=yes", "remeasure=yes is neither true nor false"),
    ("threads=2", "`qbench hardware` takes hardware=, remeasure="),
])  # fmt: skip
def test_what_the_command_does_not_understand_is_said(asked, qbench, capsys, argument, why):
    assert qbench("hardware", argument) == 2
    assert why in capsys.readouterr().err
    assert asked == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(
        ValueError, match="needs a GPU, and this torch sees none; hardware=this is the processor"
    ):
        device("this-cuda")


def test_the_names_of_this_machine_are_told_with_the_others():
    with pytest.raises(ValueError, match=r"'thi' is not known \(did you mean this or this-cuda\?\)"):
        device("thi")


def test_caches_hold_data_and_come_in_order(tmp_path):
    for index, (level, kind, size) in enumerate(
        [(2, "Unified", "1280K"), (1, "Instruction", "32K"), (1, "Data", "48K")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in {"level": str(level), "type": kind, "size": size}.items():
            (folder / name).write_text(text + "\n")
    assert caches_of_cpu(tmp_path) == [48 * 1024, 1280 * 1024]


def test_a_machine_that_hides_its_caches_is_refused(monkeypatch):
    monkeypatch.setattr(hardware, "caches_of_cpu", list)
    with pytest.raises(ValueError, match="there is no telling which array is larger; name a device of"):
        measure_machine("this")


@pytest.mark.parametrize("here", HERE)
def test_every_figure_is_measured_and_has_a_spread(here, monkeypatch):
    """On arrays that are too small to mean anything."""
    if here == "this-cuda" and not torch.cuda.is_available():
        pytest.skip("this torch sees no GPU")
    if here == "this" and len(caches_of_cpu()) < 2:
        pytest.skip("the operating system does not say how large the caches are")
    monkeypatch.setattr(hardware, "_SMALLEST", 1 << 20)
    monkeypatch.setattr(hardware, "_ARRAY", 0)
    monkeypatch.setattr(hardware, "_SQUARE", {"cpu": 64, "cuda": 64})
    found = measure_machine(here)
    figures = [
        *found.read.values(),
        found.copy,
        *found.peaks.values(),
        found.on_chip,
        found.cache,
        found.memory,
    ]
    assert all(0 < figure < math.inf for figure in figures)
    assert found.spread.keys() == found.read.keys() | found.peaks.keys() | {"copy"}
    assert {"fp32", "fp16"} <= found.peaks.keys()
    assert found.on_chip < found.memory
    assert replace(found, name="x").device.name == "x"
