"""What the factor of GPTQ's inverse Hessian takes, in memory and time, in one matrix in place and in whole matrices.

    OMP_NUM_THREADS=1 python benchmarks/gptq_memory.py [inputs ...]

A Gram matrix of correlated inputs, some of them outliers and one dead, is made of twice as many tokens. Each way is run
alone in a process, whose largest resident set during the call, less that before, is in units of n² bytes: a float32 matrix
is 4, one of float64 is 8. A third process makes both factors, rounds a weight of 2048 rows by each (w4g128, `act_order`)
and counts the weights that differ. Prints a Markdown table.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qbench.algorithms import gptq
from qbench.quant.factor import inverse_factor
from qbench.quant.spec import QuantSpec

SIZES = (1024, 2048, 4096, 5632)
ROWS, DAMP = 2048, 0.01


def whole(gram: Tensor, order: Tensor, damp: float) -> Tensor:
    """The same factor, each step of which makes a matrix of its own."""
    dead = torch.diag((gram.diagonal() == 0).to(gram))
    gram = (gram + dead)[order][:, order].double()
    damped = gram + damp * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    lower = torch.linalg.cholesky(damped.flip(0, 1))
    return torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(gram)).to(gram), upper=True)


WAYS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"whole": whole, "in place": inverse_factor}


def problem(n: int) -> tuple[Tensor, Tensor]:
    """A Gram matrix, and the order of its diagonal."""
    generator = torch.Generator().manual_seed(n)
    gram, mix = torch.zeros(n, n), torch.randn(32, n, generator=generator)
    for _ in range(2 * n // 256):
        x = torch.randn(256, n, generator=generator) + torch.randn(256, 32, generator=generator) @ mix / 2
        x[:, ::37] *= 8
        x[:, 5] = 0
        gram.addmm_(x.T, x, alpha=1 / (2 * n))
    return gram, torch.argsort(gram.diagonal(), descending=True, stable=True)


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def cost(way: str, n: int) -> dict[str, float]:
    """CPU seconds and the peak of one call, `n²` bytes above what was there before."""
    gram, order = problem(n)
    WAYS[way](torch.eye(64), torch.arange(64), DAMP)  # what libraries set up once
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    began = time.process_time()
    WAYS[way](gram, order, DAMP)
    return {"s": time.process_time() - began, "peak": (status_bytes("VmHWM") - before) / n**2}


def difference(n: int) -> dict[str, float]:
    """Of the two factors, in float64 and as GPTQ uses them, and of what it makes of each."""
    gram, order = problem(n)
    factors = {way: make(gram, order, DAMP) for way, make in WAYS.items()}
    w = torch.randn(ROWS, n, generator=torch.Generator().manual_seed(0))
    spec, rounded = QuantSpec(4, granularity="group", group_size=128), []
    for factor in factors.values():
        gptq.inverse_factor = lambda *_, factor=factor: factor  # type: ignore[assignment]
        rounded.append(gptq.GPTQ(damp=DAMP).round(w, gram, spec))
    a, b = factors.values()
    return {
        "relative": float((a - b).norm() / a.norm()),
        "entries": int((a.float() != b.float()).sum()),
        "weights": int((rounded[0] != rounded[1]).sum()),
    }


def alone(*arguments: Any) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(sizes: list[int]) -> None:
    print(
        "| inputs | peak whole, n² bytes | in place | MB whole | in place | s whole | in place | relative difference "
        f"| entries in float32 | of {ROWS} x inputs weights |\n|{'---|' * 10}"
    )
    for n in sizes:
        old, new = (alone("cost", way, n) for way in WAYS)
        found = alone("difference", n)
        mb = [f"{c['peak'] * n**2 / 1e6:.0f}" for c in (old, new)]
        print(
            f"| {n} | {old['peak']:.1f} | {new['peak']:.1f} | {' | '.join(mb)} | {old['s']:.2f} | {new['s']:.2f} "
            f"| {found['relative']:.1e} | {found['entries']:.0f} | {found['weights']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        kind, *rest = sys.argv[2:]
        torch.set_num_threads(1)
        print(json.dumps(cost(rest[0], int(rest[1])) if kind == "cost" else difference(int(rest[0]))))
    else:
        main([int(n) for n in sys.argv[1:]] or list(SIZES))
