"""Measured speed: kernels compute what the recipe says, backends are timed in turns, and records carry what came of it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoConfig

from qbench.deploy.bench.backend import Engine, Recipe, Run, Subject
from qbench.deploy.bench.compare import BACKENDS, chosen, compare
from qbench.deploy.bench.floating import bits
from qbench.deploy.bench.generation import Generator, in_float32, stored
from qbench.deploy.bench.int4 import TorchInt4
from qbench.deploy.bench.int8 import TorchInt8, TorchInt8Dynamic
from qbench.deploy.bench.kernels import TorchKernels, widths
from qbench.deploy.bench.llamacpp import LlamaCppEngine
from qbench.deploy.bench.measure import Middle, Plan, Timing, in_turns
from qbench.deploy.bench.outcome import BASELINE, machine_label
from qbench.deploy.bench.shares import Roof
from qbench.deploy.bench.vllm import VLLMEngine
from qbench.deploy.hardware import Measured
from qbench.deploy.layers import QuantizedLayer
from qbench.deploy.operators import Bits, Layer
from qbench.models.load import ModelRef
from qbench.models.manifest import write_manifest
from qbench.models.shape import shape_of
from qbench.quant.grid import choose_qparams, fake_quantize, grouped, round_to_grid
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec
from qbench.report.cells import Cells
from qbench.report.frame import tidy
from qbench.report.metrics import is_cost, lower_is_better
from qbench.report.points import points_of
from qbench.report.tables import show, summary
from qbench.track.records import RecordStore
from tests.synthetic import Grid, Memory, made
from tests.test_shape import EXPERTS

BF16 = 2.0**-8  # the distance of 1 from the next number of bfloat16, twice the rounding error
TINY = ("batch=1,2", "prompt=8", "new_tokens=3", "repeats=3", "threads=1")


def machine(here="this") -> Measured:
    """A processor that nothing was measured of."""
    return Measured(
        here, "Some(R) CPU @ 2.00GHz", 1, "0", {"sum": 1e10}, 1e10, {"fp32": 1e11, "fp16": 1e11, "int8": 1e11}, 1e6, 1e7,
        1e10, {},
    )  # fmt: skip


def layer(spec: QuantSpec, rows=32, columns=512, activation=None, seed=0) -> QuantizedLayer:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    grid = choose_qparams(weight, spec)
    rounded = round_to_grid(grouped(weight, spec), *grid, spec).reshape(weight.shape)
    return QuantizedLayer("0.linear", rounded, spec, grid, activation)


def recipe_of(found: QuantizedLayer, scheme: Scheme | None = None, bias=False) -> Recipe:
    rows, columns = found.weight.shape
    model = nn.ModuleList([nn.ModuleDict({"linear": nn.Linear(columns, rows, bias=bias)})])
    model.get_submodule(found.name).weight.data = found.weight
    return Recipe(model, [found], scheme or Scheme())


def kernel_of(backend: TorchKernels, found: QuantizedLayer, bias=None) -> nn.Module:
    assert backend.why_not(Subject("a layer", 8, recipe=recipe_of(found))) == ""
    return backend.kernel(found, found.codes(), bias)


def inputs(columns=512, rows=5) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


# Kernels


INT4 = {
    f"{bits} bits, {size or 'row'}, {'symmetric ' + mode if symmetric else 'asymmetric'}": QuantSpec(
        bits, symmetric, "group" if size else "row", size, symmetric_mode=mode
    )
    for bits in (2, 3, 4)
    for size in (32, 64, 128, 256, 512, None)
    for symmetric, mode in ((False, "full"), (True, "full"), (True, "gptq"))
} | {"real zero-points": QuantSpec(4, False, "group", 64, real_zero=True)}


@pytest.mark.parametrize("spec", INT4.values(), ids=INT4)
def test_int4_kernel_multiplies_with_the_dequantized_weight(spec):
    """The scale and the offset, the input, and the result are rounded to bfloat16; sums are in float32."""
    found, x, bias = layer(spec), inputs(rows=70), torch.randn(32)
    made = kernel_of(TorchInt4(), found, bias)
    y = torch.cat([made(part) for part in x.split([1, 5, 64])])  # few and many rows take other paths
    scale, zero = (part.repeat_interleave(512 // part.shape[1], 1).squeeze(-1) for part in found.grid)
    if spec.granularity == "row":
        scale, zero = scale.expand(32, 512), zero.expand(32, 512)
    shift = -spec.qmin
    # Both terms of (q - 8) scale + offset are rounded, so that each counts with its size.
    sizes = ((found.codes() + shift - 8).abs() + (8 - zero - shift).abs()) * scale
    tolerance = 2 * BF16 * (x.abs() @ sizes.T + bias.abs())
    assert ((y - (x @ found.weight.T + bias)).abs() <= tolerance).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_int8_weight_kernel_multiplies_with_the_dequantized_weight(bits):
    found, x = layer(QuantSpec(bits, symmetric=True)), inputs()
    y = kernel_of(TorchInt8(), found)(x)
    assert ((y - x @ found.weight.T).abs() <= 2 * BF16 * (x.abs() @ found.weight.abs().T)).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_int8_dynamic_kernel_is_the_simulation_of_w8a8(bits, symmetric):
    """Integers are multiplied exactly, so that only the order of float32 operations differs."""
    act = Scheme.of(8, 8).activation
    found, x = layer(QuantSpec(bits, symmetric), activation=act), inputs()
    y = kernel_of(TorchInt8Dynamic(), found)(x)
    expected = fake_quantize(x, act) @ found.weight.T
    scale = fake_quantize(x, act).abs() @ (found.weight.abs() + found.grid.scale[:, 0] * 2**bits).T
    assert ((y - expected).abs() <= 512 * torch.finfo(torch.float32).eps * scale).all()


@pytest.mark.parametrize("backend", [TorchInt4(), TorchInt8(), TorchInt8Dynamic()], ids=lambda b: b.name)
def test_kernels_keep_the_shape_of_what_comes_before_the_last_axis(backend):
    spec = QuantSpec(4, True, "group", 128) if backend.name == "torch-int4" else QuantSpec(8, True)
    made = kernel_of(backend, layer(spec))
    x = inputs(rows=6)
    assert torch.equal(made(x.view(2, 3, -1)), made(x).view(2, 3, -1))


REFUSED = {
    "float codes": (TorchInt4(), layer(QuantSpec(4, True, "group", 32, "e2m1")), "its codes are e2m1"),
    "five bits": (TorchInt4(), layer(QuantSpec(5, True, "group", 32)), "integers of at most 4"),
    "short groups": (TorchInt4(), layer(QuantSpec(4, True, "group", 16)), "multiples of 32"),
    "rows": (TorchInt4(), layer(QuantSpec(4, True, "group", 32), rows=24), "multiples of 16"),
    "activations": (
        TorchInt4(),
        layer(QuantSpec(4, True, "group", 32), activation=Scheme.of(4, 8).activation),
        "leaves it in floating point",
    ),
    "one scale": (TorchInt4(), layer(QuantSpec(4, True, "tensor")), "shares a scale"),
    "kept": (
        TorchInt4(),
        replace(layer(QuantSpec(4, True)), kept=torch.ones(512).bool()),
        "in floating point",
    ),
    "no grid": (TorchInt4(), replace(layer(QuantSpec(4, True)), grid=None), "leaves no grid"),
    "groups": (TorchInt8(), layer(QuantSpec(8, True, "group", 32)), "one scale a row"),
    "zero-points": (TorchInt8(), layer(QuantSpec(8)), "it has zero-points"),
    "columns": (TorchInt8(), layer(QuantSpec(8, True), columns=40), "multiples of 32"),
    "static": (
        TorchInt8Dynamic(),
        layer(QuantSpec(8, True), activation=Scheme.of(8, 8, act_granularity="tensor").activation),
        "not rounded as here",
    ),
    "scales by the whole range": (
        TorchInt8Dynamic(),
        layer(QuantSpec(8, True), activation=Scheme.of(8, 8, act_symmetric_mode="gptq").activation),
        "not rounded as here",
    ),
}


@pytest.mark.parametrize(("backend", "found", "why"), REFUSED.values(), ids=REFUSED)
def test_what_a_kernel_cannot_compute_is_refused_with_the_reason(backend, found, why):
    said = backend.why_not(Subject("a layer", 8, recipe=recipe_of(found)))
    assert said.startswith("0.linear: ")
    assert why in said


def test_weights_that_are_off_their_grid_leave_a_backend_out_with_the_reason():
    found = layer(QuantSpec(4, True, "group", 32))
    recipe = recipe_of(replace(found, weight=found.weight + found.grid.scale.min() / 3))
    with pytest.raises(
        ValueError, match=r"no backend can run a layer: torch-int4: .* weights are not on the grid"
    ):
        compare(Subject("a layer", 8, recipe=recipe), Plan(), chosen(["torch-int4"]), None)


def test_what_changes_a_layers_input_is_not_left_out_of_its_kernel():
    recipe = recipe_of(layer(QuantSpec(4, True, "group", 32)))
    recipe.model.get_submodule("0.linear").register_forward_pre_hook(lambda module, args: args)
    assert "changed on the way" in TorchInt4().why_not(Subject("a layer", 8, recipe=recipe))


def test_quantized_attention_is_not_timed_as_floating_point():
    recipe = recipe_of(layer(QuantSpec(4, True, "group", 32)), Scheme.of(4, 16, 4, 32))
    assert "in floating point here" in TorchInt4().why_not(Subject("a layer", 8, recipe=recipe))


def test_one_layer_whose_input_the_recipe_leaves_is_another_model_in_the_dynamic_kernel():
    act = Scheme.of(8, 8).activation
    whole = recipe_of(layer(QuantSpec(8, True), activation=act), Scheme.of(8, 8))
    mixed = replace(whole, layers=[*whole.layers, layer(QuantSpec(8, True))])
    assert TorchInt8Dynamic().remark(Subject("", 8, recipe=whole)) == ""
    assert "another model" in TorchInt8Dynamic().remark(Subject("", 8, recipe=mixed))


def test_inputs_that_some_layers_alone_round_are_not_timed_as_unpacked_weights():
    mixed = Scheme.of(4, group_size=32, overrides={"down_proj": "w8a8"})
    recipe = recipe_of(layer(QuantSpec(4, True, "group", 32)), mixed)
    assert "only simulated" in BACKENDS["transformers-dequantized"].why_not(Subject("", 8, recipe=recipe))


def test_what_a_kernel_replaces_is_not_copied_to_float32(monkeypatch):
    found = layer(QuantSpec(4, True, "group", 32))
    model = recipe_of(found).model.bfloat16()
    copied = []
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda self, memo: copied.append(self.shape) or self)
    made = kernel_of(TorchInt4(), found)
    assert in_float32(model, {found.name: made}).get_submodule(found.name) is made
    assert copied == []
    in_float32(model, {})
    assert copied == [(32, 512)]


def test_layers_in_floating_point_stay_as_they_are():
    found = layer(QuantSpec(4, True, "group", 32))
    recipe = recipe_of(found)
    model = nn.ModuleList([*recipe.model, nn.Linear(512, 32)])
    engine = TorchInt4().open(
        Subject("", 8, recipe=Recipe(model, [found, replace(found, name="1", spec=None)], Scheme()))
    )
    assert engine.model[1].weight is model[1].weight
    assert isinstance(model.get_submodule(found.name), nn.Linear)  # the recipe's model is not changed
    assert engine.bits.layers[0, "linear"].weight == 4 + 2 * 16 / 32


def test_shared_parameters_count_once(llama):
    model = llama.float()
    n = stored(model)
    assert n == 4 * sum(p.numel() for p in model.parameters()) + sum(
        b.numel() * b.element_size() for b in model.buffers()
    )
    both = nn.ModuleList([model, in_float32(model, {})])
    assert stored(both) == n


# Timing


class Clock:
    """Goes on by as much as the engine that is asked takes."""

    def __init__(self) -> None:
        self.now, self.asked = 0.0, list[str]()


class Fake(Engine):
    """Takes `seconds` of a drifting clock, which slows down all alike."""

    weight_bytes, bits = 1000, Bits(32.0)

    def __init__(self, name: str, clock: Clock, seconds: float) -> None:
        self.name, self.clock, self.seconds = name, clock, seconds

    def run(self, prompts: torch.Tensor, new_tokens: int) -> Run:
        self.clock.asked.append(self.name)
        self.clock.now += 1.0
        drift = 1.0 + self.clock.now
        return Run(drift * self.seconds * prompts.numel(), drift * self.seconds * (new_tokens - 1))


def test_backends_are_asked_in_turns_each_as_often_as_the_others_and_first_in_its_turn():
    clock = Clock()
    engines = {name: Fake(name, clock, 1.0) for name in "abc"}
    in_turns(engines, Plan((1,), (4,), 3, repeats=3, warm_ups=2), vocab=8)
    assert clock.asked[:6] == list("aabbcc")
    assert clock.asked[6:] == list("abcbcacab")


@pytest.mark.parametrize("warm_ups", [0, 1])
def test_an_engine_that_fails_is_asked_no_more_and_the_others_go_on(warm_ups):
    class Large(Fake):
        def run(self, prompts: torch.Tensor, new_tokens: int) -> Run:
            if len(prompts) > 1:
                raise RuntimeError("can't allocate memory")
            return super().run(prompts, new_tokens)

    clock, failed = Clock(), dict[str, str]()
    engines = {"large": Large("large", clock, 1.0), "small": Fake("small", clock, 1.0)}
    plan = Plan((1, 2, 3), (4,), 3, repeats=2, warm_ups=warm_ups)
    timings = in_turns(engines, plan, vocab=8, failed=failed)
    assert [(t.name, t.batch) for t in timings] == [("large", 1), ("small", 1), ("small", 2), ("small", 3)]
    assert all(len(t.runs) == 2 for t in timings)
    assert failed == {"large": "failed at batch 2, prompt 4: RuntimeError: can't allocate memory"}
    with pytest.raises(RuntimeError, match="allocate"):
        in_turns(engines, plan, vocab=8)


def test_what_slows_all_alike_is_not_in_the_ratio():
    """The clock drifts fivefold over the run; repetition by repetition the ratio is what it is to within one turn."""
    clock = Clock()
    engines = {"slow": Fake("slow", clock, 2.0), "fast": Fake("fast", clock, 1.0)}
    slow, fast = in_turns(engines, Plan((2,), (4,), 3, repeats=40), vocab=8)
    gain = fast.against(slow, "decode")
    assert 1.9 < gain.low <= gain.value <= gain.high < 2.1
    alone = Middle.of([run.rest for run in fast.runs])
    assert alone.high - alone.low > 0.4 * alone.value


def test_rates_are_tokens_of_all_sequences_and_steps_exclude_the_first():
    timing = Timing("x", 8, 100, 5, (Run(2.0, 4.0),) * 3, None)
    assert timing.prefill() == Middle(400.0, 400.0, 400.0, 3)
    assert timing.decode().value == 8 * 4 / 4.0
    assert timing.step().value == 1.0
    assert timing.first().value == 2.0


def test_the_middle_of_repetitions_is_their_median_with_quartiles():
    found = Middle.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.value, found.low, found.high, found.n) == (3.0, 2.0, 4.0, 5)
    assert Middle.of([1.0, 2.0]).stderr is None


def test_the_standard_error_of_a_median_is_that_of_many_medians():
    draws = torch.randn(4000, 101, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    medians = draws.median(1).values.std().item()
    assert Middle.of(draws[0].tolist() * 1).stderr == pytest.approx(medians, rel=0.4)
    said = [Middle.of(row.tolist()).stderr for row in draws[:400]]
    assert sum(said) / len(said) == pytest.approx(medians, rel=0.1)


@pytest.mark.parametrize("wrong", [dict(batches=()), dict(prompts=(0,)), dict(new_tokens=1), dict(repeats=0)])
def test_a_plan_without_anything_to_time_is_refused(wrong):
    with pytest.raises(ValueError, match=r"must be 1 or more|takes 2 new tokens"):
        Plan(**wrong)


def test_generation_makes_the_tokens_of_the_model_with_its_cache(llama, tokens):
    """Each step sees one token and the cache; the clock is read before, behind the first token, and at the end."""
    model, seen, ticks = llama.float(), [], iter(range(100))
    model.register_forward_pre_hook(lambda m, a, k: seen.append(a[0].shape), with_kwargs=True)
    run = Generator(model, Bits(32.0), clock=lambda: float(next(ticks))).run(tokens[:2, :8], 4)
    assert seen == [(2, 8), (2, 1), (2, 1), (2, 1)]
    assert run == Run(1.0, 1.0)


# The comparison


@pytest.fixture(autouse=True)
def machine_at_hand(monkeypatch):
    """Measuring this machine takes seconds."""
    monkeypatch.setattr("qbench.deploy.bench.compare.measured", machine)


def fake_subject(llama) -> Subject:
    return Subject("llama", 96, floating=lambda dtype: llama.to(dtype))


def test_an_outcome_says_what_was_left_out_and_why(llama):
    plan = Plan((1,), (4,), 3, 3)
    found = compare(fake_subject(llama), plan, [*BACKENDS.values()], shape_of(llama.config))
    assert set(found.left_out) == set(BACKENDS) - {"transformers-fp32", "transformers-bf16"}
    assert "not installed" in found.left_out["vllm"] or "GPU" in found.left_out["vllm"]
    assert "name the recipe" in found.left_out["torch-int4"]
    assert {row.timing.name for row in found.rows()} == {"transformers-fp32", "transformers-bf16"}
    assert json.loads(json.dumps(found.plain()))["machine"] == "some-2.00ghz-1t"


def test_the_share_of_the_roofline_falls_with_the_time_that_was_measured(llama):
    found = compare(fake_subject(llama), Plan((1,), (4,), 3, 3), chosen([BASELINE]), shape_of(llama.config))
    (row,) = found.rows()
    slower = replace(row.timing, runs=tuple(Run(2 * r.first, 2 * r.rest) for r in row.timing.runs))
    assert found.roof.decode_share(row.opened.bits, slower) == pytest.approx(row.decode_share / 2)
    assert found.roof.prefill_share(row.opened.bits, slower) == pytest.approx(row.prefill_share / 2)


@pytest.mark.parametrize(("spread", "told"), [(0.05, False), (0.24, True)])
def test_a_machine_that_was_measured_while_it_was_busy_is_told(llama, monkeypatch, spread, told):
    monkeypatch.setattr(
        "qbench.deploy.bench.compare.measured", lambda here: replace(machine(here), spread={"fp32": spread})
    )
    said = []
    compare(fake_subject(llama), Plan((1,), (4,), 2, 1), chosen([BASELINE]), None, say=said.append)
    assert any("spreads by 24%" in line and "hardware=this remeasure=true" in line for line in said) == told


def test_blocks_with_kernels_of_their_own_count_with_their_own_widths(llama):
    shape, n = shape_of(llama.config), len(llama.model.layers)
    here, timing = machine().device, Timing("x", 1, 4, 3, (Run(1.0, 1.0),) * 3, None)

    def share(layers):
        return Roof(shape, here).decode_share(replace(bits(torch.float32), layers=layers), timing)

    names, narrow = [linear.name for linear in shape.blocks[0].linears], Layer(4.0, 32.0, "fp32")
    none, first, every = (
        share({(index, name): narrow for index in range(count) for name in names}) for count in (0, 1, n)
    )
    assert none - first == pytest.approx((none - every) / n)
    assert every < none


@pytest.mark.parametrize(("each", "unit"), [(4.5, "int8"), (8.5, "int8"), (16, "fp32"), (32, "fp32")])
def test_llama_cpp_multiplies_integers_where_a_file_is_quantized(each, unit):
    library = SimpleNamespace(llama_model_size=lambda m: each * 100, llama_model_n_params=lambda m: 800)
    found = LlamaCppEngine(library, None, 1).bits
    assert (found.layer(0, "q_proj").unit, found.weight, found.floating) == (unit, each, 32)


def test_kernels_of_experts_are_those_of_the_shape():
    shape = shape_of(AutoConfig.for_model("mixtral", **EXPERTS))
    names = {linear.name for linear in shape.blocks[0].linears if linear.role == "expert"}
    made = kernel_of(TorchInt4(), layer(QuantSpec(4, True, "group", 32)))
    kernels = {f"model.layers.1.{name.replace('experts', 'experts.3')}": made for name in names}
    assert widths(kernels).layers.keys() == {(1, name) for name in names}


def test_floating_point_is_as_wide_in_all_its_parts():
    for dtype, width in ((torch.float32, 32), (torch.bfloat16, 16)):
        found = bits(dtype)
        assert {found.weight, found.activation, found.kv, found.head, found.floating} == {width}


def test_the_floating_point_model_is_never_timed_as_its_recipe(llama):
    """Not even where nothing could run the recipe."""
    shape, plan = shape_of(llama.config), Plan((1,), (4,), 3, 3)
    recipe = replace(recipe_of(layer(QuantSpec(4, True))), scheme=Scheme.of(4, kvbits=4))
    found = compare(replace(fake_subject(llama), recipe=recipe), plan, chosen([]), shape)
    assert not any(one.runs_recipe for one in found.opened.values())
    assert found.metrics() == {}
    assert compare(fake_subject(llama), plan, chosen([BASELINE]), shape).metrics()


def test_metrics_of_speed_are_costs_of_one_machine_each(llama):
    found = compare(fake_subject(llama), Plan((1,), (4,), 3, 3), chosen([]), shape_of(llama.config))
    metrics = found.metrics()
    assert metrics
    for name in metrics:
        assert is_cost(name)
        assert f"@{found.machine}:" in name
    rates = [
        n for n in metrics if n.startswith(("decode_tokens_per_s", "prefill_tokens_per_s", "decode_speedup"))
    ]
    assert rates
    assert not any(map(lower_is_better, rates))
    assert all(lower_is_better(n) for n in metrics if n.startswith(("decode_ms", "ttft_ms", "run_mb")))


def test_no_backend_at_all_is_an_error_with_all_reasons():
    with pytest.raises(ValueError, match=r"no backend can run nothing: torch-int4: .*; vllm: "):
        compare(Subject("nothing", 8), Plan(), chosen(["torch-int4", "vllm"]), None)


@pytest.mark.parametrize(
    ("title", "label"),
    [
        ("Intel(R) Xeon(R) Processor @ 2.80GHz", "intel-xeon-processor-2.80ghz-2t"),
        ("AMD EPYC 9354 32-Core Processor", "amd-epyc-9354-32-core-processor-2t"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3-2t"),
    ],
)
def test_a_machine_is_named_by_one_word(title, label):
    assert machine_label(title, 2) == label


# Records and the command


def done(fingerprint="0123456789abcdef") -> dict:
    return {
        "fingerprint": fingerprint,
        "status": "done",
        "metrics": {"bits_per_weight": 4.5},
        "started": "2026",
    }


def test_a_record_carries_what_was_measured_until_it_is_written_again(tmp_path):
    store = RecordStore(tmp_path)
    store.prepare()
    store.write(done(), [])
    store.add_speed(done()["fingerprint"], "a", {"metrics": {"decode_ms@a:x:b001:p0008": 2.0}})
    store.add_speed(done()["fingerprint"], "b", {"metrics": {"decode_ms@b:x:b001:p0008": 3.0}})
    store.add_speed(done()["fingerprint"], "a", {"metrics": {"decode_ms@a:y:b001:p0008": 1.0}})
    expected = {"bits_per_weight": 4.5, "decode_ms@a:y:b001:p0008": 1.0, "decode_ms@b:x:b001:p0008": 3.0}
    assert store.read(done()["fingerprint"])["metrics"] == expected
    assert next(store.all())["metrics"] == expected
    store.write(done(), [])
    assert store.read(done()["fingerprint"])["metrics"] == {"bits_per_weight": 4.5}
    assert not list(tmp_path.rglob(".speed*"))


def timed(jobs, how):
    """Made-up jobs with what `how(labels)` says was measured of them, by the part of the name behind @."""
    return [
        (
            record
            | {
                "metrics": record["metrics"] | {f"decode_ms@{k}": v for k, v in how(record["labels"]).items()}
            },
            rows,
        )
        for record, rows in jobs
    ]


def test_a_front_of_measured_speed_has_one_machine_and_one_setting_and_the_fastest_backend():
    """What was timed elsewhere, with another prompt or with another batch is not on it."""

    def how(labels):
        here = {
            "a:slow:b001:p0128": 9.0,
            "a:fast:b001:p0128": float(labels["wbits"]),
            "a:fast:b008:p0128": 1.0,
        }
        return {3: {"b:fast:b001:p0128": 0.1}, 2: {"a:fast:b001:p0512": 0.2}}.get(labels["wbits"], here)

    grid = Grid(algos=("rtn",), schemes=("w8a16", "w4a16", "w3a16", "w2a16"))
    source = Memory(timed(made(grid), how))
    cells = Cells.of([*source.all()], source, ("model", "scheme", "algo", "calib"))
    points = points_of(cells, cells.metrics[0], "decode_ms@measured")
    assert sorted(points.frame["x"]) == [4.0, 8.0]
    assert "a, batch 1, prompt 128" in points.note


def test_measured_rates_are_columns_of_the_files_of_tables(tmp_path, capsys):
    source = Memory(timed(made(Grid(algos=("rtn",))), lambda labels: {}))
    records = [
        r | {"metrics": r["metrics"] | {"decode_tokens_per_s@a:x:b001:p0128": 7.0}} for r in source.all()
    ]
    frame = tidy(records)
    assert set(summary(frame)["decode_tokens_per_s@a:x:b001:p0128"]) == {"7"}
    show(frame, Console(width=200))
    assert "tokens_per_s" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_recommendation_by_measured_speed_keeps_to_the_limit(qbench, tmp_path, capsys):
    shared = ("model=nano-llama", "eval.tasks=[]", "eval.max_windows=8", "tracker=none", "launcher=inline")
    assert qbench("-m", "algo=rtn", "wbits=4,3", "baseline=true", *shared) == 0
    asked = ("recommend", "model=nano-llama", "hardware=measured", "max_latency=6ms")
    assert qbench(*asked) == 2
    assert "`qbench bench <fingerprint> batch=1` times a record's recipe" in capsys.readouterr().err
    store = RecordStore(tmp_path / "results")
    for record in store.all():
        value = {16: 9.0, 4: 7.0, 3: 5.0}[record["labels"]["wbits"]]
        store.add_speed(record["fingerprint"], "a", {"metrics": {"decode_ms@a:x:b001:p0128": value}})
    assert qbench(*asked) == 0
    shown = capsys.readouterr().out
    assert "as measured on a, batch 1, prompt 128" in " ".join(shown.split())
    assert "roofline" not in shown
    assert "rtn" in shown
    assert qbench(*asked[:3], "max_latency=4ms") == 3
    assert qbench(*asked, "search=true") == 2


@pytest.mark.slow
def test_the_command_times_a_record_beside_its_floating_point_model_and_keeps_it(qbench, tmp_path, capsys):
    recipe = ("model=nano-llama", "scheme=w4a16g128", "group_size=64", "tracker=none")
    assert qbench(*recipe, "eval.tasks=[]", "eval.max_windows=2", "launcher=inline") == 0
    (path,) = (tmp_path / "results" / "records").iterdir()
    assert qbench("bench", path.name[:8], *TINY, "csv=speed.csv") == 0
    shown = capsys.readouterr().out
    for name in ("transformers-fp32", "transformers-bf16", "transformers-dequantized", "torch-int4"):
        assert shown.count(f" {name} ") == 2
    assert "torch-int8 " in shown
    assert "left out: model.layers.0.self_attn.q_proj: its scales are shared by groups" in shown
    (kept,) = json.loads((path / "speed.json").read_text()).values()
    assert {len(one["first_s"]) for one in kept["timings"]} == {3}
    assert {one["backend"] for one in kept["timings"]} >= {BASELINE, "torch-int4"}
    assert kept["command"].startswith("qbench bench")
    metrics = RecordStore(tmp_path / "results").read(path.name)["metrics"]
    rate = metrics["decode_tokens_per_s@some-2.00ghz-1t:torch-int4:b002:p0008"]
    runs = next(t for t in kept["timings"] if (t["backend"], t["batch"]) == ("torch-int4", 2))["rest_s"]
    assert rate == pytest.approx(2 * 2 / sorted(runs)[1])
    assert len((tmp_path / "speed.csv").read_text().splitlines()) == 1 + 2 * 4 * 3


def test_the_command_times_a_recipe_that_has_no_record(qbench, capsys):
    recipe = ("model=nano-llama", "scheme=w8a8", "weight_symmetric=true", "algo=rtn")
    assert qbench("bench", *recipe, *TINY, f"backends={BASELINE},torch-int8-dynamic") == 0
    shown = capsys.readouterr().out
    assert shown.count(" torch-int8-dynamic ") == 2
    assert "not kept" in shown


def test_the_command_times_a_checkpoint(qbench, tmp_path, capsys):
    ModelRef("zoo/nano-llama").load().save_pretrained(tmp_path / "mine")
    assert qbench("bench", str(tmp_path / "mine"), *TINY, f"backends={BASELINE}") == 0
    assert capsys.readouterr().out.count(f" {BASELINE} ") == 2


def test_a_folder_with_a_gguf_file_is_timed_by_that_file_if_it_is_whole(qbench, tmp_path, capsys):
    (tmp_path / "o").mkdir()
    file = tmp_path / "o" / "model.gguf"
    file.write_bytes(b"GGUF that is none")
    write_manifest(file.parent)
    assert qbench("bench", str(file.parent), *TINY) == 2
    assert "model.gguf" in (error := capsys.readouterr().err)
    assert "to be a checkpoint" not in error
    file.write_bytes(b"GGUF that is bad.")
    assert qbench("bench", str(file.parent), *TINY) == 2
    assert "is not what was exported" in capsys.readouterr().err


def test_generations_that_take_no_time_are_an_error():
    slow_first = VLLMEngine(SimpleNamespace(), 0)
    slow_first._timed = lambda prompts, n: 1.0
    with pytest.raises(ValueError, match="made 4 tokens no slower than one; raise new_tokens="):
        slow_first.run(torch.zeros(1, 2), 4)


WRONG = {
    "nothing": ((), "name what is to be timed"),
    "two": (("abcd", "ef01"), "one model is timed at a time"),
    "no such record": (("abcd",), "no records under"),
    "no such folder": (("./nothing-here",), "neither a folder nor a GGUF file"),
    "backend": (("model=nano-llama", "backends=tensorrt"), "backend 'tensorrt' is not known; there are transformers-fp32"),
    "key": (("model=nano-llama", "batchs=3"), "did you mean batch=?"),
    "count": (("model=nano-llama", "batch=0"), "must be a whole number from 1"),
    "option": (("--fast",), "there is no option --fast here"),
    "none can": (("model=nano-llama", "algo=fp", "backends=torch-int4"), "no backend can run nano-llama fp"),
    "gguf": (("nothing.gguf",), "there is no file"),
    "checkpoint": (("model=nano-llama", "checkpoint=nowhere", f"backends={BASELINE}"), "to be a checkpoint"),
    "settings": (("abcd", "wbits=3"), "abcd has its own settings, and wbits=3 would not count"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_timed_is_refused_in_one_line(qbench, capsys, arguments, said):
    assert qbench("bench", *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.splitlines()[-1].startswith("qbench: ")


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_each_backend_says_what_it_computes_with_or_why_it_does_not(backend):
    assert backend.about
    assert backend.why_not(Subject("nothing", 8))
