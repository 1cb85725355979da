"""Time one quantization call and take its peak memory; what every runner beside this file shares.

Needs torch and safetensors only: it runs in the environments of libraries that know nothing of qbench.

A runner is called with the path of a request, a JSON object, and writes its answer to `request["answer"]`:

    model       folder in the hub's layout, weights in safetensors
    tokens      .npy of calibration token ids, (n_samples, seq_len)
    method      gptq or awq
    batch_size  samples run together
    dtype       of weights and arithmetic
    core        the one CPU core that all threads share during the measurement
    out         folder for the fake-quantized model, in the layout and under the names of the original
"""

import ctypes
import gc
import importlib.metadata
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

# Quantizes the model in place or not; returns what `weights` makes a state dict of. Only this call is measured.
Quantize = Callable[[], Any]


def status_mb(key: str) -> float:
    """A line of /proc/self/status, which the kernel counts in KiB, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def measured(quantize: Quantize, core: int) -> tuple[Any, dict[str, float]]:
    """Run `quantize` once; seconds, CPU seconds of all threads and child processes, resident memory in MiB.

    The peak is the kernel's own high-water mark, reset before the call, so nothing is missed between samples.
    """
    for thread in Path("/proc/self/task").iterdir():  # a library's own pools too; new threads inherit it
        os.sched_setaffinity(int(thread.name), {core})
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading the model freed is not the quantizer's
    Path("/proc/self/clear_refs").write_text("5")
    before, cpu, clock = status_mb("VmRSS"), cpu_seconds(), time.perf_counter()
    result = quantize()
    seconds, cpu = time.perf_counter() - clock, cpu_seconds() - cpu
    peak = status_mb("VmHWM")
    return result, {"seconds": seconds, "cpu_seconds": cpu, "before_mb": before, "peak_mb": peak}


def cpu_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def read_request() -> dict[str, Any]:
    """The request named on the command line, its tokens read; from here on torch uses one thread."""
    request = json.loads(Path(sys.argv[1]).read_text())
    request["tokens"] = torch.from_numpy(numpy.load(request["tokens"])).long()
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    return request


def load_model(folder: str, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    return model.eval().requires_grad_(False)


def answer(
    request: dict[str, Any],
    figures: dict[str, float],
    weights: dict[str, Tensor],
    packages: Iterable[str],
    **settings: Any,
) -> None:
    """Write the figures, and the weights as a model folder.

    Raises:
        KeyError: If a tensor of the original is missing from `weights`.
        ValueError: If a tensor has another shape, or no linear layer was changed.
    """
    source, out = Path(request["model"]), Path(request["out"])
    out.mkdir(parents=True, exist_ok=True)
    changed, tensors = 0, {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as original:
            for key in original.keys():  # noqa: SIM118 - it is no dict
                before, after = original.get_tensor(key).float(), weights[key].detach().float().cpu()
                if before.shape != after.shape:
                    raise ValueError(
                        f"{key} is {tuple(after.shape)} after quantization, it was {tuple(before.shape)}"
                    )
                changed += key.endswith("_proj.weight") and not torch.equal(before, after)
                tensors[key] = after.contiguous()
    linears = sum(key.endswith("_proj.weight") for key in tensors)
    if changed != linears:
        raise ValueError(f"{changed} of {linears} linear layers were changed by {request['method']}")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for file in source.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, out / file.name)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)}
    figures |= {"versions": versions, "settings": settings}
    Path(request["answer"]).write_text(json.dumps(figures))
