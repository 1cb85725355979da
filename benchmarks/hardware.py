"""`hardware=this` against other ways to measure the same machine, and a decoded model against its roofline.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/hardware.py

Bandwidth: a loop in C over eight streams, compiled here, and NumPy's product of a matrix with a vector (OpenBLAS). Peaks:
NumPy's matrix product and a convolution (oneDNN) for float32; for bfloat16 and int8 torch's own of other sizes, since
NumPy has neither. All ways take turns, one call each, so that what else the machine does slows all of them alike;
medians are compared, of the best way of each side. Then a random Llama of about 300 M parameters decodes greedily
in float32, its steps in turn with reading memory.
"""

import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qbench.deploy import hardware
from qbench.deploy.roofline import Bits, latency
from qbench.models.shape import shape_of

ROUNDS = 31
BYTES = 1 << 29
N, M, ROWS = 1536, 1792, 1280  # sizes of matrix products: ours, and the others'
CONTEXT, STEPS = 64, 24
CONFIG = LlamaConfig(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=20, num_attention_heads=16, num_key_value_heads=16,
    vocab_size=32000, tie_word_embeddings=True,
)  # fmt: skip
# As many calls of as many operators, and next to nothing to read or compute.
NARROW = LlamaConfig(
    hidden_size=64, intermediate_size=176, num_hidden_layers=20, num_attention_heads=16, num_key_value_heads=16,
    vocab_size=256,
)  # fmt: skip
STREAMS = """
#include <stddef.h>
float reads(const float *x, size_t n) {
    size_t part = n / 8;
    float sums[8][16] = {{0}};
    for (size_t i = 0; i + 16 <= part; i += 16)
        for (int s = 0; s < 8; s++)
            for (int j = 0; j < 16; j++) sums[s][j] += x[s * part + i + j];
    float total = 0;
    for (int s = 0; s < 8; s++)
        for (int j = 0; j < 16; j++) total += sums[s][j];
    return total;
}

typedef float vec __attribute__((vector_size(64)));

/* 12 chains of multiply-adds of 16 numbers: none waits for another. */
float multiply_adds(size_t n) {
    vec x[12], a, b;
    for (int j = 0; j < 16; j++) a[j] = 0.999f, b[j] = 0.001f;
    for (int c = 0; c < 12; c++) x[c] = a;
    for (size_t i = 0; i < n; i++)
        for (int c = 0; c < 12; c++) x[c] = x[c] * a + b;
    float total = 0;
    for (int c = 0; c < 12; c++) total += x[c][0];
    return total;
}
"""
MULTIPLY_ADDS = 12 * 16 * 2  # operations of one turn of the loop


Way = tuple[Callable[[], object], float]  # what is done, and how much of it one call does


def in_turn(ways: dict[str, Way], rounds: int = ROUNDS) -> dict[str, float]:
    """The median rate of each way, one call of each after another."""
    for run, _ in ways.values():
        run()
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (run, amount) in ways.items():
            clock = time.perf_counter()
            run()
            rates[name].append(amount / (time.perf_counter() - clock))
    return {name: statistics.median(found) for name, found in rates.items()}


def in_c(folder: Path) -> tuple[Callable[[np.ndarray], object], Callable[[int], object]]:
    source, library = folder / "streams.c", folder / "streams.so"
    source.write_text(STREAMS)
    subprocess.run(
        ["cc", "-O3", "-ffast-math", "-march=native", "-shared", "-fPIC", "-o", library, source], check=True
    )
    loaded = ctypes.CDLL(str(library))
    loaded.reads.restype = loaded.multiply_adds.restype = ctypes.c_float
    return (
        lambda x: loaded.reads(ctypes.c_void_p(x.ctypes.data), ctypes.c_size_t(x.size)),
        lambda n: loaded.multiply_adds(ctypes.c_size_t(n)),
    )


def compare(folder: Path) -> None:
    """Print what `hardware=this` measures beside other ways to measure it."""
    reads, multiply_adds = in_c(folder)
    x = np.ones(BYTES // 4, dtype=np.float32)
    matrix, vector = x.reshape(-1, 8192), np.ones(8192, dtype=np.float32)
    streams = {name: way for name, way in hardware._streams("cpu", BYTES).items() if name != "copy"}
    others = {
        "a loop in C": (lambda: reads(x), x.nbytes),
        "NumPy, matrix x vector": (lambda: matrix @ vector, x.nbytes),
    }
    show("bandwidth, GB/s", streams, others)
    for unit, run in hardware._products("cpu", N).items():
        show(f"{unit}, GFLOP/s", {"torch": (run, 2.0 * N**3)}, OTHER[unit]())
    turns = 10_000_000
    adds = in_turn({"": (lambda: multiply_adds(turns), float(turns * MULTIPLY_ADDS))})
    print(f"\nmultiply-adds of float32 in C, no memory read: {adds[''] / 1e9:.1f} GFLOP/s")


def show(what: str, ours: dict[str, Way], others: dict[str, Way]) -> None:
    found = in_turn(ours | others)
    (a, mine), (b, other) = (max((found[name], name) for name in side) for side in (ours, others))
    print(f"| {what} | {a / 1e9:.1f} ({mine}) | {b / 1e9:.1f} ({other}) | {a / b:.2f} |", flush=True)


def float32() -> dict[str, Way]:
    square = np.ones((M, M), dtype=np.float32)
    image, kernel = torch.ones(1, M, ROWS // 32, 32), torch.ones(M, M, 1, 1)
    return {
        "NumPy": (lambda: square @ square, 2.0 * M**3),
        "oneDNN": (lambda: torch.conv2d(image, kernel), 2.0 * ROWS * M * M),
    }


def bfloat16() -> dict[str, Way]:
    weight, tokens = torch.ones(M, M, dtype=torch.bfloat16), torch.ones(ROWS, M, dtype=torch.bfloat16)
    return {"linear layer": (lambda: torch.nn.functional.linear(tokens, weight), 2.0 * ROWS * M * M)}


def int8() -> dict[str, Way]:
    tokens, weight = torch.ones(ROWS, M, dtype=torch.int8), torch.ones(M, M, dtype=torch.int8)
    return {"other sizes": (lambda: torch._int_mm(tokens, weight), 2.0 * ROWS * M * M)}


OTHER = {"fp32": float32, "fp16": bfloat16, "int8": int8}


def steps(model: LlamaForCausalLM) -> Callable[[], None]:
    """What makes one more token each time, after a prefill of `CONTEXT` tokens."""
    output = model(torch.arange(CONTEXT)[None], use_cache=True)

    def step() -> None:
        nonlocal output
        output = model(output.logits[:, -1:].argmax(-1), cache=output.cache, use_cache=True)

    return step


@torch.no_grad()
def decoding() -> None:
    """A model in float32 that is read from memory at every step, against its roofline."""
    torch.manual_seed(0)
    model, narrow = (LlamaForCausalLM(config).eval() for config in (CONFIG, NARROW))
    shape, widths = shape_of(CONFIG), Bits(32, 32, 32, 32, floating=32)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    tokens = {n: torch.ones(1, n) for n in {m.in_features for m in linears}}

    def products() -> None:
        for m in linears:
            m(tokens[m.in_features])

    streams = {name: way for name, way in hardware._streams("cpu", BYTES).items() if name != "copy"}
    ways = {
        "a step": (steps(model), 1.0),
        "its matrix products alone": (products, 1.0),
        "a step of a model as deep, of width 64": (steps(narrow), 1.0),
    }
    found = in_turn(ways | streams, STEPS)
    device = replace(hardware.measured("this").device, bandwidth=max(found[name] for name in streams))
    bound = latency(shape, widths, device, 1, CONTEXT + STEPS // 2, "decode").seconds
    n = shape.n_parameters
    print(f"\n{n / 1e6:.0f} M parameters, {4 * n / 1e9:.2f} GB, {device.bandwidth / 1e9:.1f} GB/s")
    print("\n| | bound ms | measured ms | measured / bound |\n|---|---|---|---|")
    for name in ways:
        seconds = 1 / found[name]
        print(f"| {name} | {1e3 * bound:.1f} | {1e3 * seconds:.1f} | {seconds / bound:.2f} |")


if __name__ == "__main__":
    machine = hardware.measured("this", again=True).device
    print(
        f"{machine.title}, {machine.source}\n\n| | hardware=this | independent | ratio |\n|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as temporary:
        compare(Path(temporary))
    decoding()
