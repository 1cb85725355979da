"""Which layers matter, and what bits they get: units, measurements, the solver, tensor statistics."""

import itertools
import re
import shlex
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import Bounds, LinearConstraint, milp

from qbench.algorithms.rtn import RTN
from qbench.calib.moments import Moments
from qbench.data.corpora import load_text
from qbench.engine import quantize
from qbench.errors import Unsuitable
from qbench.evaluate import divergence as divergences
from qbench.evaluate.divergence import divergence
from qbench.evaluate.evaluator import Evaluator
from qbench.evaluate.plan import EvalPlan
from qbench.models.family import family_of
from qbench.models.units import CUTS, component_of, units_of
from qbench.quant.allocation import Option, allocate
from qbench.quant.scheme import Scheme, fits
from qbench.report.sensitivity import difference
from qbench.statistics import tensor_statistics
from qbench.track.records import RecordStore

SMALL = ["model=nano-llama", "eval.max_windows=3", "eval.seq_len=64", "launcher=inline", "tracker=none"]
STORE = RecordStore(Path("results/sensitivity"))


# Units


@pytest.mark.parametrize("cut", CUTS)
def test_units_hold_each_linear_layer_once_and_their_patterns_fit_no_other(model, cut):
    family = family_of(model)
    n_blocks = len(model.get_submodule(family.blocks))
    linears = family.linears(model.get_submodule(family.blocks)[0])
    every = list(itertools.product(range(n_blocks), linears))
    units = units_of(model, cut)
    assert sorted((b, n) for unit in units for b, n, *_ in unit.layers) == sorted(every)
    for unit in units:
        fitting = [(b, n) for b, n in every if any(fits(p, b, n) for p in unit.patterns)]
        assert fitting == sorted(
            ((b, n) for b, n, *_ in unit.layers), key=lambda one: (one[0], linears.index(one[1]))
        )


def test_components_are_called_what_the_field_calls_them(llama):
    assert [component_of(link) for link in family_of(llama).links] == ["qkv", "o", "gate+up", "down"]
    assert [unit.name for unit in units_of(llama, "block,component")][:5] == [
        "0.qkv", "0.o", "0.gate+up", "0.down", "1.qkv",
    ]  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("alone", [True, False])
def test_a_job_quantizes_its_unit_and_nothing_else_or_all_but_it(llama, cut, alone):
    unit = units_of(llama, cut)[1]
    overrides = {"*": "w16a16"} | unit.overrides("w2a16") if alone else unit.overrides("w16a16")
    before = {name: p.clone() for name, p in llama.named_parameters()}
    quantize(llama, RTN(), Scheme.of(2, group_size=16, overrides=overrides))
    changed = {name for name, p in llama.named_parameters() if not torch.equal(p, before[name])}
    mine = {f"model.layers.{block}.{name}.weight" for block, name, *_ in unit.layers}
    linear = {f"model.layers.{b}.{n}.weight" for u in units_of(llama, cut) for b, n, *_ in u.layers}
    assert changed == (mine if alone else linear - mine)


# The solver

SIZES = st.integers(0, 40).map(lambda n: n / 4)
UNITS = st.lists(
    st.lists(st.tuples(SIZES, st.floats(-1, 10)), min_size=1, max_size=4), min_size=1, max_size=5
)


@settings(max_examples=300, deadline=None)
@given(UNITS, st.integers(0, 400).map(lambda n: Fraction(n, 8)))
def test_the_solver_finds_what_trying_everything_finds(units, capacity):
    options = [[Option(*pair) for pair in unit] for unit in units]
    losses = [
        sum(option.loss for option in picked)
        for picked in itertools.product(*options)
        if sum(Fraction(option.size) for option in picked) <= capacity
    ]
    if not losses:
        with pytest.raises(Unsuitable, match="below the smallest choice"):
            allocate(options, capacity)
        return
    taken = [unit[i] for unit, i in zip(options, allocate(options, capacity), strict=True)]
    assert sum(Fraction(option.size) for option in taken) <= capacity
    # Sums in another order differ by rounding: at most as many times eps x 10 as there are terms.
    assert sum(option.loss for option in taken) <= min(losses) + len(units) * 10 * np.finfo(float).eps


@pytest.mark.parametrize("seed", range(4))
def test_the_solver_is_as_good_as_integer_programming_on_a_model_of_real_size(seed):
    rng = np.random.default_rng(seed)
    weights = rng.choice([3 * 2**24, 2**24, 2 * 4096 * 11008, 4096 * 11008], 96)
    scale = rng.lognormal(sigma=2, size=96)
    widths = np.array([2, 3, 4, 8])
    kept = rng.integers(0, 10**6, (96, 1)) * (seed % 2)  # odd sizes, as outliers that are kept make them
    sizes = weights[:, None] * (widths + (16 + widths) / 128) + kept
    losses = scale[:, None] * 4.0**-widths * rng.lognormal(sigma=0.3, size=(96, 4))
    capacity = float(sizes[:, 0].sum() * 1.4)
    options = [
        [Option(*pair) for pair in zip(*unit, strict=True)] for unit in zip(sizes, losses, strict=True)
    ]
    taken = allocate(options, capacity)
    assert sum(Fraction(unit[i].size) for unit, i in zip(options, taken, strict=True)) <= Fraction(capacity)
    one_each = np.kron(np.eye(96), np.ones(4))
    solved = milp(
        losses.ravel() / losses.max() * 1e3, integrality=np.ones(losses.size), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes.ravel() / capacity, -np.inf, 1)],
        options={"mip_rel_gap": 0},
    )  # fmt: skip
    best = solved.fun * losses.max() / 1e3
    found = sum(unit[i].loss for unit, i in zip(options, taken, strict=True))
    assert found <= best * (1 + 1e-9)  # HiGHS stops at a gap of 1e-6 of its objective's unit


def test_a_budget_is_met_to_the_last_bit():
    weights = 2**40
    options = [[Option(3 * weights, 1.0), Option(4 * weights, 0.5)]] * 3
    exact = Fraction(10 * weights)
    assert sorted(allocate(options, exact)) == [0, 0, 1]
    assert allocate(options, exact - Fraction(1, 2**30)) == [0, 0, 0]


def test_of_equally_good_choices_the_smallest_is_taken():
    assert allocate([[Option(4, 1.0), Option(2, 1.0), Option(3, 1.0)]], 100) == [1]


def test_what_cannot_be_weighed_is_refused():
    with pytest.raises(ValueError, match="finite loss"):
        allocate([[Option(1, float("nan"))]], 2)


# The loss


def test_divergence_is_that_of_the_definition_and_nothing_where_nothing_changed(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 5, 30, generator=generator) * 4 for _ in range(2))
    found = divergence(p, q)
    probabilities = [torch.softmax(x.double(), -1).flatten(0, 1).numpy() for x in (p, q)]
    wanted = [stats.entropy(a, b) for a, b in zip(*probabilities, strict=True)]
    np.testing.assert_allclose(found.flatten().numpy(), wanted, rtol=1e-12)
    assert not divergence(p, p).any()
    monkeypatch.setattr(divergences, "_ELEMENTS", 64)  # rows are taken two at a time
    torch.testing.assert_close(divergence(p, q), found, rtol=1e-14, atol=0)


def test_an_evaluation_without_divergence_is_the_job_that_it_was():
    plain, kl = EvalPlan(("stdlib_docs",)), EvalPlan(("stdlib_docs",), against_fp=True)
    assert not {"against_fp", "split"} & plain.identity().keys()
    assert kl.identity() == plain.identity() | {"against_fp": True}
    with pytest.raises(ValueError, match="which are empty"):
        EvalPlan(decode_ppl=("stdlib_docs",), against_fp=True)
    with pytest.raises(ValueError, match="floating-point model's side"):
        Evaluator(kl, None, None).run()


def test_differences_are_paired_by_window():
    def samples(values: dict[int, float]) -> list[dict]:
        return [{"metric": "kl/a", "item": i, "value": v} for i, v in values.items()]

    mean, stderr, n = difference(samples({0: 1.0, 1: 5.0, 2: 3.0}), samples({2: 2.0, 1: 3.0, 0: 1.0}), "kl")
    assert (mean, n) == (1.0, 3)
    assert stderr == pytest.approx(np.std([0, 2, 1], ddof=1) / 3**0.5)
    with pytest.raises(ValueError, match="both jobs need the same"):
        difference(samples({0: 1.0, 1: 1.0}), samples({0: 1.0, 2: 1.0}), "kl")


# Tensor statistics


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_moments_are_those_of_the_whole_tensor_however_it_was_cut(mean):
    x = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)).double() ** 3 + mean
    observer = Moments()
    for part in x.split([1, 24, 15]):
        observer.update(part)
    values = x.numpy().ravel()
    wanted = [np.abs(values).max(), values.mean(), values.std(), stats.kurtosis(values, fisher=False)]
    # About a shift within a few standard deviations, powers lose at most their own rounding: 280 terms of eps.
    np.testing.assert_allclose(observer.value.numpy(), wanted, rtol=1e-11)


def test_statistics_are_those_of_weights_inputs_and_the_cache(model, tokens):
    cache = model(tokens, use_cache=True).past_key_values
    window = getattr(model.config, "sliding_window", None)
    inputs: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, args, out, name=name: inputs.update({name: args[0]}))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    model(tokens)
    for handle in handles:
        handle.remove()
    rows = {(r.block, r.layer, r.tensor): r for r in tensor_statistics(model, tokens, batch_size=4)}
    family = family_of(model)
    n_blocks = len(model.get_submodule(family.blocks))
    assert len(rows) == n_blocks * (2 * len(family.linears(model.get_submodule(family.blocks)[0])) + 2)
    for (block, layer, tensor), row in rows.items():
        path = f"{family.blocks}.{block}.{layer}"
        if tensor in "KV":
            if window:  # the cache has forgotten what is outside the window
                continue
            wanted = cache.layers[block].keys if tensor == "K" else cache.layers[block].values
        else:
            wanted = model.get_submodule(path).weight if tensor == "W" else inputs[path]
        values = wanted.detach().numpy().ravel()
        found = (row.absmax, row.std, row.kurtosis)
        expected = (np.abs(values).max(), values.std(), stats.kurtosis(values, fisher=False))
        # RMSNorm computes in float32 whatever the dtype.
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=f"{block} {layer} {tensor}")


# The command


def fingerprints() -> set[str]:
    return {record["fingerprint"] for record in STORE.all()}


def test_each_unit_and_width_is_a_job_and_the_table_has_their_divergence(qbench, capfd):
    command = ("sensitivity", "by=component", "bits=2,4", *SMALL)
    assert qbench(*command) == 0
    out = capfd.readouterr().out
    assert "gate+up" in out
    frame = pd.read_csv("results/tables/sensitivity-nano-llama-rtn-g128-in-component.csv")
    assert sorted(zip(frame["unit"], frame["bits"], strict=True)) == [
        (unit, bits) for unit in ("down", "gate+up", "o", "qkv") for bits in (2, 4)
    ]
    assert list(frame["kl"]) == sorted(frame["kl"], reverse=True)
    by_unit = frame.pivot_table(index="unit", columns="bits", values="kl")
    assert (by_unit[2] > by_unit[4]).all(), "fewer bits, more divergence"
    assert (by_unit > 0).all(axis=None)
    records = list(STORE.all())
    assert len(records) == 9
    (base,) = [r for r in records if r["labels"]["algo"] == "fp"]
    assert base["metrics"]["kl/stdlib_docs"] == 0.0
    text = load_text("stdlib_docs", "calibration")
    assert base["data"]["eval/stdlib_docs"]["sha256"] == text.sha256, "the test text is not looked at"
    down = next(
        r for r in records if r["identity"]["scheme"] == "w2a16g128-[*:w16a16]-[mlp.down_proj:w2a16g128]"
    )
    means = [down["metrics"][f"kl/{name}"] for name in ("stdlib_docs", "stdlib_code")]
    assert by_unit[2]["down"] == pytest.approx(np.mean(means))
    assert not Path("results/records").exists(), "other tables are not crowded"


def test_what_is_recorded_is_not_measured_again(qbench, capfd):
    command = ("sensitivity", "by=component", "bits=3", *SMALL)
    assert qbench(*command) == 0
    before = {f: STORE.written(f) for f in fingerprints()}
    lost = sorted(before)[0]
    for path in STORE.path(lost).iterdir():
        path.unlink()
    STORE.path(lost).rmdir()
    capfd.readouterr()
    assert qbench(*command) == 0
    assert "4 of 5 jobs are recorded already, 1 left to run" in capfd.readouterr().err
    after = {f: STORE.written(f) for f in fingerprints()}
    assert {f for f in before if before[f] != after[f]} == {lost}


def test_leaving_a_unit_out_is_measured_against_quantizing_everything(qbench):
    assert qbench("sensitivity", "mode=out", "by=component", "bits=2", *SMALL) == 0
    frame = pd.read_csv("results/tables/sensitivity-nano-llama-rtn-g128-out-component.csv").set_index("unit")
    schemes = {r["identity"]["scheme"]: r["fingerprint"] for r in STORE.all()}
    every, but_down = schemes["w2a16g128"], schemes["w2a16g128-[mlp.down_proj:w16a16]"]
    kl = [
        np.array([s["value"] for s in STORE.samples(f) if s["metric"].startswith("kl/")])
        for f in (every, but_down)
    ]
    delta = kl[0] - kl[1]
    assert frame["kl"]["down"] == pytest.approx(delta.mean())
    assert frame["kl_stderr"]["down"] == pytest.approx(delta.std(ddof=1) / len(delta) ** 0.5)
    assert (frame["kl"] > 0).all()


def test_the_command_that_the_solver_prints_keeps_the_budget_and_its_prediction_is_near(qbench, capfd):
    keys = ("by=component", "bits=2,3,4", "eval.tasks=[]")
    assert qbench("sensitivity", "solve", "budget=3.3", "check=true", *keys, *SMALL) == 0
    out = capfd.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("qbench "))
    solved = next(line for line in out.splitlines() if line.startswith("solved"))
    bits, predicted = (float(word) for word in solved.split()[1:3])
    assert bits <= 3.3
    before = len(list(RecordStore(Path("results")).all()))
    assert qbench(*shlex.split(line)[1:]) == 0
    records = list(RecordStore(Path("results")).all())
    assert len(records) == before, "the check has run that very job"
    stored = max(r["metrics"]["bits_per_linear_weight"] for r in records if "-[" in r["identity"]["scheme"])
    assert stored <= 3.3
    assert stored == pytest.approx(bits, abs=5e-4)
    measured = float(solved.split()[3])
    assert 0.5 < predicted / measured < 2, "divergences add up, roughly"
    uniform = next(line for line in out.splitlines() if line.startswith("all w3"))
    assert predicted < float(uniform.split()[3])


def test_floating_point_costs_the_solver_bits_and_nothing_else(qbench, capfd):
    command = ("sensitivity", "solve", "budget=10", "by=component", "bits=4,16", *SMALL)
    assert qbench(*command) == 0
    out = capfd.readouterr().out
    assert "w16a16" in next(line for line in out.splitlines() if line.startswith("qbench "))
    assert len(fingerprints()) == 5
    solved = next(line for line in out.splitlines() if line.startswith("solved"))
    assert 4.156 < float(solved.split()[1]) <= 10


def test_a_budget_that_nothing_meets_says_what_the_least_is(qbench, capfd):
    assert qbench("sensitivity", "solve", "budget=3.1", "by=component", "bits=3,4", *SMALL) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    # 3 bits, and a scale of 16 and a zero-point of 3 bits for each group of 128.
    assert "budget=3.1 is below 3.1484 bits a weight" in error
    assert "raise the budget, or offer fewer bits or larger groups" in error


BAD = {
    "unknown mode": (["mode=both"], "mode=both: there are in, out"),
    "unknown unit": (["by=head"], "by=head: there are block, component, block,component, layer"),
    "too many bits": (["bits=3,9"], "bits=3,9: widths are 1 to 8, and 16"),
    "no bits": (["bits=16"], "bits=16: widths are 1 to 8"),
    "unknown word": (["solved"], "there are stats and solve"),
    "no budget": (["solve"], "solve needs a budget"),
    "a budget that is no number": (["solve", "budget=low"], "budget=low"),
    "solving what is left out": (["solve", "budget=3", "mode=out"], "leave mode=in"),
    "floating point": (["algo=fp"], "algo=fp quantizes nothing"),
    "a cache": (["kvbits=4"], "leave kvbits=16"),
    "overrides": (["scheme.overrides={down_proj: w8a16}"], "sets scheme.overrides itself"),
    "a misspelt key": (["wbit=3"], "unknown key 'wbit'"),
    "an algorithm for activations": (["algo=smoothquant"], "SmoothQuant needs activation bits"),
    "a group size that fits no layer": (["group_size=100"], "group_size=100 does not divide"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_measured_is_one_line_and_exit_code_2(case, qbench, capfd):
    arguments, message = BAD[case]
    assert qbench("sensitivity", *arguments, *SMALL) == 2
    captured = capfd.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("qbench: ")
    assert message in line
    assert not captured.out


def test_failed_measurements_are_named_and_the_solver_refuses_to_guess(qbench, capfd, monkeypatch):
    evaluate = Evaluator.run
    calls = []

    def break_third(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the third breaks")
        return evaluate(self, *arguments)

    monkeypatch.setattr(Evaluator, "run", break_third)
    assert qbench("sensitivity", "solve", "budget=3.5", "by=component", "bits=3,4", *SMALL) == 2
    captured = capfd.readouterr()
    assert "the third breaks" in captured.out
    assert "solve needs every measurement" in captured.err


def test_a_plan_is_shown_and_nothing_is_run(qbench, capfd):
    assert qbench("sensitivity", "plan=true", *SMALL) == 0
    # 4 blocks of 4 components at 3 widths, and the floating-point model.
    assert re.search(r"49 jobs, .* 49 to run", capfd.readouterr().out)
    assert not STORE.records.exists()


def test_the_command_writes_statistics_of_every_tensor(qbench, capfd):
    assert qbench("sensitivity", "stats", "calib.n_samples=2", "calib.seq_len=64", *SMALL) == 0
    frame = pd.read_csv("results/tables/statistics-nano-llama-stdlib_docs.csv")
    assert dict(frame["tensor"].value_counts()) == {"W": 28, "A": 28, "K": 4, "V": 4}
    assert "K and V" in capfd.readouterr().out
    assert (frame[["absmax", "std", "kurtosis"]] > 0).all(axis=None)


def test_statistics_need_samples_that_the_model_can_read(qbench, capfd):
    assert qbench("sensitivity", "stats", "calib.seq_len=4096", *SMALL) == 2
    assert "reads at most 512 tokens" in capfd.readouterr().err


# Labels


def test_a_scheme_with_many_overrides_has_a_short_name_of_its_own_in_tables():
    few = Scheme.of(3, overrides={"*": "w16a16", "0.mlp.up_proj": "w3a16", "0.mlp.gate_proj": "w3a16"})
    assert few.label == "w3a16-[*:w16a16]-[0.mlp.up_proj,0.mlp.gate_proj:w3a16]"
    many = [Scheme.of(3, overrides={f"{i}.self_attn.q_proj": f"w{b}a16" for i in range(9)}) for b in (2, 4)]
    assert re.fullmatch(r"w3a16-\[9 overrides [0-9a-f]{6}\]", many[0].label)
    assert many[0].label != many[1].label
    assert Scheme.parse("w4a16g128").label == "w4a16g128"
