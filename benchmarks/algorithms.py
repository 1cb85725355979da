"""Where the time of every algorithm goes, and how near GPTQ comes to the machine's arithmetic.

    OMP_NUM_THREADS=1 python benchmarks/algorithms.py [algo ...] [calib=16x512] [scheme=w4a16g128]

Each algorithm quantizes micro-llama once, in this process, and its time is split: *forward* (running blocks to let
activations through), *statistics* (observers), *train* (gradient descent, forward and backward together) and *solve* (all
else: searching, rounding, rewriting weights). GPTQ's floor is its arithmetic divided by the matrix product's
measured peak: forward passes, Gram matrices of half the entries, and the rounding's rank-one and block updates.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from qbench.algorithms import learn
from qbench.calib import observers
from qbench.calib.block import Block
from qbench.calib.stages import Stages
from qbench.calib.stream import Stream
from qbench.data.calibration import CalibrationSet
from qbench.engine import needs_data, quantize
from qbench.models.family import family_of
from qbench.models.load import ModelRef
from qbench.quant.scheme import Scheme
from qbench.sweep.settings import build_algorithm
from qbench.sweep.shipped import CONF
from qbench.sweep.steps import in_full

MODEL = ModelRef("zoo/micro-llama")
PHASES = ("forward", "statistics", "train", "solve")


class Clock:
    """Time by phase, each phase without the phases inside it."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._open: list[list[Any]] = []

    @contextmanager
    def phase(self, name: str):
        self._open.append([name, 0.0])
        began = time.perf_counter()
        try:
            yield
        finally:
            whole = time.perf_counter() - began
            _, inner = self._open.pop()
            self.spent[name] += whole - inner
            if self._open:
                self._open[-1][1] += whole

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if any(opened == "train" for opened, _ in self._open):  # what training calls is training
                return function(*args, **kwargs)
            with self.phase(name):
                return function(*args, **kwargs)

        return timed


def listen(clock: Clock) -> None:
    """Have the clock told of everything that runs a block or updates a statistic."""
    for owner, method, name in (
        (Stream, "through", "forward"), (Block, "observe", "forward"), (Stages, "_resume", "forward"),
        (Block, "run", "forward"),
    ):  # fmt: skip
        setattr(owner, method, clock.around(name, getattr(owner, method)))
    for kind in vars(observers).values():
        if isinstance(kind, type) and "update" in vars(kind):
            kind.update = clock.around("statistics", kind.update)
    timed = clock.around("train", learn.fit)
    for module in list(sys.modules.values()):
        if getattr(module, "fit", None) is learn.fit and module is not learn:
            module.fit = timed


def peak() -> float:
    """Floating-point operations a second of a square float32 matrix product, the best of ten."""
    a, best = torch.randn(2048, 2048), 0.0
    for _ in range(10):
        began = time.perf_counter()
        a @ a
        best = max(best, 2 * 2048**3 / (time.perf_counter() - began))
    return best


def gptq_arithmetic(model: Any, n_samples: int, length: int) -> float:
    """Operations of GPTQ with one forward pass, and one of 16 samples for the blocks' errors."""
    family, total = family_of(model), 0.0
    layers = model.get_submodule(family.blocks)
    heads = model.config.num_attention_heads * model.config.head_dim
    for index, layer in enumerate(layers):
        samples = (16 if index + 1 == len(layers) else n_samples) + 16
        weights = sum(layer.get_submodule(name).weight.numel() for name in family.linears)
        total += samples * length * (2 * weights + 4 * length * heads)
        for link in family.links:
            sinks = [layer.get_submodule(name).weight for name in link.sinks]
            rows, n = sum(len(w) for w in sinks), sinks[0].shape[1]
            total += n_samples * length * n * n + rows * n * n + 2 * n**3
    return total


def main(arguments: list[str]) -> None:
    options = dict(a.split("=", 1) for a in arguments if "=" in a)
    names = [a for a in arguments if "=" not in a] or sorted(p.stem for p in (CONF / "algo").glob("*.yaml"))
    n_samples, length = (int(n) for n in options.get("calib", "16x512").split("x"))
    scheme = Scheme.parse(options.get("scheme", "w4a16g128"))
    tokens = CalibrationSet("stdlib_docs", n_samples, length, seed=0).tokens(MODEL.tokenizer())
    speed = peak()
    print(f"matrix product: {speed / 1e9:.0f} GFLOP/s, {torch.get_num_threads()} thread(s)\n")
    print(f"| algo | total s | {' | '.join(PHASES)} |\n|---|{'---|' * (len(PHASES) + 1)}")
    clock = Clock()
    listen(clock)
    for name in names:
        if name in ("fp", "custom"):
            continue
        algorithm, model = build_algorithm(name, _config(name)), MODEL.load()
        try:
            algorithm.check(scheme)
        except ValueError:
            continue
        clock.spent.clear()
        began = time.perf_counter()
        with clock.phase("solve"):
            quantize(model, algorithm, scheme, tokens if needs_data(algorithm, scheme) else None)
        whole = time.perf_counter() - began
        print(f"| {name} | {whole:.2f} | {' | '.join(f'{clock.spent[p]:.2f}' for p in PHASES)} |", flush=True)
        if name == "gptq":
            floor = gptq_arithmetic(model, n_samples, length) / speed
            note = f"GPTQ: floor {floor:.2f} s, {floor / whole:.0%} of the peak"
    if "gptq" in names:
        print(f"\n{note}")


def _config(name: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    root = OmegaConf.create({"seed": 0, "algo": OmegaConf.load(CONF / "algo" / f"{name}.yaml")})
    return in_full(OmegaConf.to_container(root, resolve=True)["algo"])  # type: ignore[call-overload,index]


if __name__ == "__main__":
    main(sys.argv[1:])
