"""Speed of inference: floating point, int8 and int4 in turns, on micro-llama and a random Llama of 341 million weights.

    OMP_NUM_THREADS=1 python benchmarks/speed.py run [folder]       times what is not there yet, some 15 minutes on one core
    python benchmarks/speed.py table [folder]                       the section of benchmarks/README.md

Weights are rounded to nearest: what a kernel computes with does not change how long it takes. int8 are weights of one
scale a row and activations of one a token (`torch-int8-dynamic`); int4 are weights in groups of 128 (`torch-int4`). Each
pair of batch and prompt is a cell of `<folder>/speed.json`; a run that was broken off goes on with the next one. Pairs
of many tokens are run fewer times, and without a warm-up, which the smaller ones before have been; what would take
more than two and a half minutes, by the pairs before it, is left out.
"""

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qbench.deploy.bench.backend import Engine, Recipe, Subject
from qbench.deploy.bench.compare import BACKENDS
from qbench.deploy.bench.floating import bits
from qbench.deploy.bench.generation import Generator
from qbench.deploy.bench.measure import Plan, in_turns
from qbench.deploy.bench.outcome import BASELINE, Opened, Outcome, Row, load_now, machine_label
from qbench.deploy.bench.shares import Roof
from qbench.deploy.hardware import measured
from qbench.deploy.layers import QuantizedLayer
from qbench.models.family import family_of
from qbench.models.load import ModelRef
from qbench.models.shape import shape_of
from qbench.quant.grid import choose_qparams, grouped, round_to_grid
from qbench.quant.scheme import Scheme

BATCHES, PROMPTS, NEW_TOKENS = (1, 8, 32), (128, 512), 9
SCHEMES = {
    "torch-int8-dynamic": Scheme.of(8, 8, weight_symmetric=True),
    "torch-int4": Scheme.of(4, 16, group_size=128),
}
LONGEST = 150.0  # seconds of a run
ABOUT = """## Speed of inference

`OMP_NUM_THREADS=1 python benchmarks/speed.py run`: what `qbench bench` does, on micro-llama and on a random Llama of 341
million weights (hidden 1024, 24 blocks, intermediate 2816, 16 heads, 32,000 words, embeddings tied). Median tokens a second
(quartiles, where it was run more than once); how many times as fast as float32, repetition by repetition; and the share of
the time that the roofline of this machine says it must take. Decoding is after a prompt of 128. On {machines},
torch {torch}, {days}, load up to {load:.1f}.
"""
RANDOM = dict(
    vocab_size=32_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16,
    num_key_value_heads=16, max_position_embeddings=2048, tie_word_embeddings=True,
)  # fmt: skip


def repeats(name: str, batch: int, prompt: int) -> tuple[int, bool]:
    """Runs of a pair that count, and whether one goes before them."""
    tokens = batch * prompt
    if name == "micro-llama":
        return (7, True) if tokens < 4096 else (3, False)
    return (5, True) if tokens <= 128 else (3, False) if tokens <= 512 else (1, False)


def model_of(name: str) -> Any:
    if name == "micro-llama":
        return ModelRef("zoo/micro-llama").load()
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**RANDOM)).eval().requires_grad_(False)


def engines(model: Any) -> dict[str, Engine]:
    """One of each kind; no more than a copy of the model is made at a time."""
    found: dict[str, Engine] = {BASELINE: Generator(model, bits(torch.float32))}
    half = copy.deepcopy(model).bfloat16()
    found["transformers-bf16"] = Generator(half, bits(torch.bfloat16))
    for name, scheme in SCHEMES.items():
        subject = Subject("random", model.config.vocab_size, recipe=rounded(copy.deepcopy(model), scheme))
        if why := BACKENDS[name].why_not(subject):
            raise ValueError(f"{name}: {why}")
        found[name] = BACKENDS[name].open(subject)
    return found


@torch.no_grad()
def rounded(model: Any, scheme: Scheme) -> Recipe:
    """The model with weights rounded to nearest, in place."""
    family, layers = family_of(model), []
    for index, block in enumerate(model.get_submodule(family.blocks)):
        for name in family.linears(block):
            weight, spec = block.get_submodule(name).weight, scheme.weight
            assert spec is not None, "both schemes have weights"
            grid = choose_qparams(weight, spec)
            weight.copy_(round_to_grid(grouped(weight, spec), *grid, spec).reshape(weight.shape))
            full = f"{family.blocks}.{index}.{name}"
            layers.append(QuantizedLayer(full, weight, spec, grid, scheme.activation))
    return Recipe(model, layers, scheme)


def run(file: Path) -> None:
    """Time all cells that are not in the file."""
    kept = json.loads(file.read_text()) if file.is_file() else {}
    here = measured("this")
    for name in ("micro-llama", "random-llama"):
        pairs = [(b, p) for b, p in Plan(BATCHES, PROMPTS).pairs() if f"{name} {b} {p}" not in kept]
        if not pairs:
            continue
        model = model_of(name)
        opened, roof = engines(model), Roof(shape_of(model.config), here.device)
        about = {n: Opened(n in SCHEMES, "", "", e.weight_bytes, e.bits) for n, e in opened.items()}
        for batch, prompt in pairs:
            n, warm = repeats(name, batch, prompt)
            plan = Plan((batch,), (prompt,), NEW_TOKENS, n, int(warm))
            before = load_now()
            quick = {n: e for n, e in opened.items() if batch * prompt < LONGEST * rate_of(kept, name, n)}
            timings = in_turns(quick, plan, model.config.vocab_size)
            machine = machine_label(here.title, torch.get_num_threads())
            outcome = Outcome(
                name, machine, torch.get_num_threads(), plan, about, {}, timings, roof, "", (before, load_now())
            )  # fmt: skip
            kept[f"{name} {batch} {prompt}"] = [cell(row, outcome) for row in outcome.rows()]
            draft = file.with_suffix(".tmp")
            draft.write_text(json.dumps(kept, indent=1))
            draft.replace(file)
            print(f"{name} batch {batch} prompt {prompt}: load {outcome.load}", flush=True)
            for line in kept[f"{name} {batch} {prompt}"]:
                print(f"  {line}", flush=True)


def rate_of(kept: dict[str, Any], name: str, backend: str) -> float:
    """Tokens read a second, in the slowest of the pairs that were timed."""
    cells = [one for key, found in kept.items() if key.split()[0] == name for one in found]
    return min((one["prefill"][0] for one in cells if one["backend"] == backend), default=float("inf"))


def cell(row: Row, outcome: Outcome) -> dict[str, Any]:
    """What the table needs of an engine's runs."""
    found = row.plain() | {
        "machine": outcome.machine, "measured": outcome.measured, "load": outcome.load,
        "weight_mb": row.opened.weight_bytes / 1e6,
    }  # fmt: skip
    for phase, rate, gain in (
        ("prefill", row.timing.prefill(), row.prefill_gain),
        ("decode", row.timing.decode(), row.decode_gain),
    ):
        found[phase] = [rate.value, rate.low, rate.high]
        found[f"{phase}_gain"] = gain and [gain.value, gain.low, gain.high]
    return found


def table(file: Path) -> Iterator[str]:
    """Markdown: backends down, prefill 128, prefill 512 and decode across, for each model and batch."""
    kept = json.loads(file.read_text())
    cells = [one for found in kept.values() for one in found]
    machines = ", ".join(dict.fromkeys(one["machine"] for one in cells))
    days = ", ".join(sorted({one["measured"][:10] for one in cells}))
    load = max(max(one["load"]) for one in cells)
    yield ABOUT.format(machines=machines, days=days, load=load, torch=torch.__version__)
    for name in dict.fromkeys(key.split()[0] for key in kept):
        yield f"\n{name}:\n"
        yield "| batch | backend | weights MB | prefill 128, tokens/s | prefill 512, tokens/s | decode, tokens/s |"
        yield "|---|---|---|---|---|---|"
        for batch in BATCHES:
            short, long = (
                {one["backend"]: one for one in kept.get(f"{name} {batch} {prompt}", ())}
                for prompt in PROMPTS
            )
            for backend, one in short.items():
                late = shown(long[backend], "prefill") if backend in long else "not run"
                cells = (shown(one, "prefill"), late, shown(one, "decode"))
                yield f"| {batch} | {backend} | {one['weight_mb']:.0f} | {' | '.join(cells)} |"


def shown(one: dict[str, Any], phase: str) -> str:
    """Median (quartiles), times as fast as float32, share of the roofline."""
    value, low, high = one[phase]
    gain = one[f"{phase}_gain"]
    spread = f" ({number(low)}-{number(high)})" if len(one["first_s"]) > 1 else ""
    told = [] if one["backend"] == BASELINE else [f"{gain[0]:.2f}x"]
    return f"{number(value)}{spread}; {', '.join([*told, format(one[f'{phase}_roofline_share'], '.0%')])}"


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in ("run", "table"):
        sys.exit(__doc__)
    folder = Path(sys.argv[2] if len(sys.argv) == 3 else "speed")
    folder.mkdir(parents=True, exist_ok=True)
    if sys.argv[1] == "run":
        run(folder / "speed.json")
    else:
        print("\n".join(table(folder / "speed.json")))


if __name__ == "__main__":
    main()
