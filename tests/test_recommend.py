"""A recommendation: planted optima are found, the confidence is what it says, and searches drop no winner."""

import itertools
import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from qbench.algorithms.gptq import GPTQ
from qbench.errors import UsageError
from qbench.report.cells import Cells, Recipe
from qbench.report.recommend.candidates import Candidate, Field, fields
from qbench.report.recommend.decision import QUANTITIES, RESAMPLES, Limits, decide
from qbench.report.recommend.halving import dropped, kept, settle
from qbench.report.recommend.telling import show
from qbench.sweep.contenders import predicted
from qbench.sweep.limits import read
from qbench.sweep.named import named
from qbench.sweep.recommend import recommend
from qbench.sweep.settings import Jobs
from qbench.track.records import RecordStore

SEEDS = range(4)


def candidate(name: str, megabytes: float, *texts, seconds: float | None = None) -> Candidate:
    """Of `texts`, each what a recipe adds to the losses: `(n_draws, n_windows)`, or `(n_windows,)`."""
    is_float = name == "fp"
    labels = {
        "model": "m",
        "algo": name,
        "scheme": "w16a16" if is_float else "w4",
        "calib": None,
        "seed": None,
    }
    record = {"fingerprint": name, "labels": labels}
    change = tuple(np.atleast_2d(np.asarray(text, dtype=float)) for text in texts)
    recipe = Recipe((labels["scheme"], name, ""), (), [record])
    return Candidate(recipe, (record,), megabytes * 1e6, seconds, change)


def field_of(*candidates: Candidate) -> Field:
    shapes = [text.shape[1] for text in candidates[0].change]
    seconds = None if candidates[0].seconds is None else 1.0
    floating = candidate("fp", 100, *(np.zeros(n) for n in shapes), seconds=seconds)
    return Field(("ppl/a",), "", (floating, *candidates), floating, ())


def planted(seed: int, n: int = 12, noise: float = 1e-4, windows: int = 16) -> Field:
    """Recipes with random costs, and windows that hardly differ from what a recipe adds to all of them."""
    rng = np.random.default_rng(seed)
    return field_of(
        *(
            candidate(
                f"r{i}", rng.uniform(10, 60), rng.uniform(0.001, 0.3) + noise * rng.standard_normal(windows),
                seconds=rng.uniform(0.1, 0.9),
            )
            for i in range(n)
        )
    )  # fmt: skip


def costs(c: Candidate) -> dict[str, float]:
    return {"max_bytes": c.bytes, "max_ppl_increase": c.increase, "max_latency": c.seconds}


def by_hand(field: Field, limits: Limits, prefer: str) -> Candidate | None:
    set_ = {q: limits.of(q) for q in QUANTITIES if limits.of(q) is not None}
    fit = [c for c in field.candidates if all(costs(c)[q] <= most for q, most in set_.items())]
    key = {"quality": "max_ppl_increase", "size": "max_bytes", "speed": "max_latency"}[prefer]
    return min(fit, key=lambda c: costs(c)[key], default=None)


ASKED = [
    Limits(**dict(zip(names, values, strict=True)))
    for n in (1, 2, 3)
    for names in itertools.combinations(QUANTITIES, n)
    for values in [[{"max_bytes": 40e6, "max_ppl_increase": 0.2, "max_latency": 0.7}[q] for q in names]]
]


# The decision


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("prefer", ["quality", "size", "speed"])
def test_a_planted_optimum_is_found_under_one_two_or_three_limits(seed, prefer):
    field = planted(seed, n=40)
    for limits in ASKED:
        best = by_hand(field, limits, prefer)
        decision = decide(field, limits, prefer)
        assert best is not None
        assert decision.meets
        assert decision.chosen is best
        rest = Field(
            field.metrics, "", tuple(c for c in field.candidates if c is not best), field.floating, ()
        )
        assert decision.runner_up is by_hand(rest, limits, prefer)
        assert not decision.binding
        assert {id(c) for c, _ in decision.reasons} == {id(c) for c in field.candidates} - {id(best)}


@pytest.mark.parametrize("seed", SEEDS)
def test_limits_that_cannot_be_met_give_the_nearest_and_what_binds(seed):
    field = planted(seed)
    for factors in itertools.product((0.2, 1.0), repeat=3):
        wanted = {"max_bytes": 12e6, "max_ppl_increase": 0.05, "max_latency": 0.2}
        limits = Limits(*(wanted[q] * f for q, f in zip(QUANTITIES, factors, strict=True)))
        if by_hand(field, limits, "quality") is not None:
            continue
        decision = decide(field, limits, "quality")
        excess = {id(c): max(costs(c)[q] / limits.of(q) for q in QUANTITIES) for c in field.candidates}
        assert not decision.meets
        assert excess[id(decision.chosen)] == pytest.approx(min(excess.values()))
        alone = [q for q in QUANTITIES if by_hand(field, limits.without(q), "quality") is not None]
        assert [b.quantity for b in decision.binding] == (alone or list(QUANTITIES))
        for binding in decision.binding:
            if binding.needed is None:
                assert not alone
                continue
            # What it says would do does, and anything less does not.
            for factor, would_do in ((1 + 1e-9, True), (1 - 1e-9, False)):
                loosened = Limits(
                    **{q: limits.of(q) for q in QUANTITIES} | {binding.quantity: binding.needed * factor}
                )
                assert (by_hand(field, loosened, "quality") is not None) == would_do


def test_where_no_limit_binds_alone_all_are_named():
    field = field_of(*(candidate(f"r{i}", 50, np.full(8, 0.5), seconds=9.0) for i in range(2)))
    floating = candidate("fp", 100, np.zeros(8), seconds=5.0)  # keeps to perplexity alone
    field = Field(field.metrics, "", (floating, *field.candidates[1:]), floating, ())
    decision = decide(field, Limits(40e6, 0.1, 1.0))
    assert [(b.quantity, b.needed) for b in decision.binding] == [(q, None) for q in QUANTITIES]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_looser_limit_never_gives_a_worse_choice(seed):
    field, last = planted(seed), math.inf
    for most in np.linspace(15e6, 100e6, 12):
        decision = decide(field, Limits(max_bytes=most), "quality")
        if decision.meets:
            assert decision.chosen.increase <= last
            last = decision.chosen.increase
    assert decision.chosen.recipe.is_float, "which fits now, and adds nothing"


def test_equal_recipes_are_told_apart_by_what_the_preference_does_not_name():
    same = np.linspace(0.01, 0.02, 8)
    large, small, again = (
        candidate("large", 40, same),
        candidate("small", 30, same),
        candidate("again", 30, same),
    )
    better = candidate("better", 40, same / 2)
    assert decide(field_of(large, small, again), Limits(max_bytes=50e6), "quality").chosen is small
    assert decide(field_of(again, small), Limits(max_bytes=50e6), "quality").chosen is again, (
        "the first of equals"
    )
    assert decide(field_of(large, better), Limits(max_ppl_increase=0.1), "size").chosen is better
    decision = decide(field_of(large, small, again), Limits(max_bytes=50e6), "quality")
    assert decision.share == 1, "equal recipes do not take turns"
    assert [reason for _, reason in decision.reasons] == ["too large", "no better, larger", "the same"]


def test_the_floating_point_model_is_a_candidate():
    field = field_of(candidate("a", 40, np.full(8, 0.05)))
    assert decide(field, Limits(max_ppl_increase=0.01)).chosen.recipe.is_float
    assert not decide(field, Limits(max_bytes=50e6)).chosen.recipe.is_float


def naive_share(field: Field, limits: Limits, prefer: str, times: int, seed: int) -> float:
    """The share of resamples that choose as the data do, one resample at a time."""
    rng = np.random.default_rng(seed)

    def choice(changes) -> Candidate | None:
        copies = [Candidate(c.recipe, c.records, c.bytes, c.seconds, change) for c, change in changes]
        found = by_hand(Field((), "", tuple(copies), copies[0], ()), limits, prefer)
        return None if found is None else found.recipe

    def resampled():
        # One fewer than there are: the spread of a mean is then unbiased.
        windows = [rng.integers(0, t.shape[1], t.shape[1] - 1) for t in field.floating.change]
        for c in field.candidates:
            draws = rng.integers(0, len(c.change[0]), max(1, len(c.change[0]) - 1))
            yield c, tuple(text[draws][:, w] for text, w in zip(c.change, windows, strict=True))

    best = choice([(c, c.change) for c in field.candidates])
    return float(np.mean([choice(list(resampled())) is best for _ in range(times)]))


def noisy(seed: int, draws: int = 3) -> Field:
    rng = np.random.default_rng(seed)
    recipes = [
        candidate(
            f"r{i}", 20 + 5 * i,
            *(rng.normal(0.1, 0.02, (draws, 1)) + rng.normal(0, 0.1, (draws, n)) for n in (6, 10)),
        )
        for i in range(4)
    ]  # fmt: skip
    return field_of(*recipes)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("prefer", ["quality", "size"])
def test_the_confidence_is_the_share_of_resamples_with_the_same_choice(seed, prefer):
    field, times = noisy(seed), 400
    limits = Limits(max_ppl_increase=0.11, max_bytes=50e6)
    if by_hand(field, limits, prefer) is None:
        limits = Limits(max_ppl_increase=0.2, max_bytes=50e6)
    decision = decide(field, limits, prefer)
    naive = naive_share(field, limits, prefer, times, seed)
    spread = math.sqrt(max(decision.share * (1 - decision.share), 1 / times) * (1 / times + 1 / RESAMPLES))
    assert abs(decision.share - naive) <= 4 * spread
    assert decide(field, limits, prefer).share == decision.share, "it is seeded"
    assert sum(decision.shares) == pytest.approx(1)


def test_noise_makes_it_unsure_and_more_windows_make_it_sure():
    shares = {}
    for n in (16, 4096):  # `a` is better by 0.02 on windows that scatter by 0.2: 0.4 and 6.4 standard errors
        a, b = (
            candidate("a", 30, np.full(n, 0.1)),
            candidate("b", 30, 0.12 + np.array([-0.2, 0.2] * (n // 2))),
        )
        shares[n] = decide(field_of(a, b), Limits(max_bytes=50e6)).share
    # `b` is worse where 7 of 15 fair steps or more are upwards: one window fewer than there are is drawn.
    expected = 1 / 2 + math.comb(15, 7) / 2**15
    assert shares[16] == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(RESAMPLES))
    assert shares[4096] == 1


def test_draws_that_differ_make_it_less_sure_than_their_mean():
    rng = np.random.default_rng(1)
    lucky = np.array([[-0.1], [0.0], [0.1]]) + 0.1 + 0.001 * rng.standard_normal((3, 16))
    other = candidate("other", 30, np.full(16, 0.11))
    limits = Limits(max_bytes=50e6)
    drawn = decide(field_of(candidate("lucky", 30, lucky), other), limits)
    averaged = decide(field_of(candidate("lucky", 30, lucky.mean(0)), other), limits)
    assert drawn.chosen.title == averaged.chosen.title == "w4 lucky"
    assert averaged.share == 1
    # Two draws of three, whose sum of -1, 0 and 1 must not be above 0: 6 of 9 are not.
    assert drawn.share == pytest.approx(6 / 9, abs=4 * math.sqrt(6 / 9 * 3 / 9 / RESAMPLES))


def test_a_choice_near_its_limit_says_in_how_many_resamples_it_keeps_to_it():
    text = np.log1p(0.05) + np.array([-0.02, 0.02] * 8)
    decision = decide(field_of(candidate("a", 30, text)), Limits(max_ppl_increase=0.05 + 1e-12))
    expected = 1 / 2  # of the means of 15 fair steps are below 0
    assert decision.surely_meets == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(RESAMPLES))
    assert decision.share == decision.surely_meets, "the floating-point model is the choice in the others"


@pytest.mark.parametrize(("draws", "windows", "least"), [(1, 8, 0.93), (3, 64, 0.9), (5, 64, 0.93)])
def test_the_interval_of_the_increase_holds_the_true_one(draws, windows, least):
    rng, times, held = np.random.default_rng(0), 1000, 0
    for _ in range(times):
        luck = rng.normal(0, 0.05, (draws, 1)) if draws > 1 else 0.0
        text = 0.1 + luck + rng.normal(0, 0.05, windows)
        low, high = candidate("a", 30, text).interval
        held += low <= np.expm1(0.1) <= high
    # Three standard errors; quantiles of resamples hold 86 %, 82 % and 89 %.
    assert held / times > least - 3 * math.sqrt(least * (1 - least) / times)


def test_a_folder_without_records_is_not_searched_without_a_limit(tmp_path):
    """It may be a misspelt one."""
    with pytest.raises(UsageError, match=r"nothing is recorded of micro-llama under .*search=true"):
        recommend([f"results={tmp_path / 'nowhere'}"])
    assert not (tmp_path / "nowhere").exists()


def test_what_does_not_vary_has_no_interval_around_it():
    assert candidate("fp", 100, np.zeros(8)).interval == (0.0, 0.0)


# Rounds


def rounds_of(seed: int, n: int = 24) -> list[Field]:
    """The same recipes on 8, 16, 32 and 64 windows, evenly spread."""
    rng = np.random.default_rng(seed)
    means = np.sort(rng.exponential(0.1, n)) + 0.02
    texts = means[:, None] * (1 + 0.5 * rng.standard_normal((n, 64)))
    sizes = rng.uniform(20, 60, n)
    return [
        field_of(*(candidate(f"r{i}", sizes[i], texts[i, :: 64 // w]) for i in range(n)))
        for w in (8, 16, 32, 64)
    ]


def among(field: Field, candidates) -> Field:
    names = {c.title for c in candidates}
    left = tuple(c for c in field.candidates if c.title in names or c is field.floating)
    return Field(field.metrics, "", left, field.floating, ())


@pytest.mark.parametrize("limits", [Limits(max_bytes=40e6), Limits(max_ppl_increase=0.1), Limits(25e6, 0.08)])
def test_rounds_never_drop_what_all_windows_would_choose(limits):
    for seed in range(12):
        *fewer, whole = rounds_of(seed)
        winner = decide(whole, limits).chosen
        left = whole.candidates
        for field in fewer:
            left = kept(decide(among(field, left), limits))
            assert winner.recipe.is_float or winner.title in {c.title for c in left}
        assert len(left) < len(whole.candidates) / 2, "most are dropped"


def test_more_windows_decide_where_all_that_may_be_chosen_were_read_on_them():
    few, _, _, many = rounds_of(3)
    limits = Limits(max_bytes=40e6)
    first = decide(few, limits)
    going_on = among(many, kept(first))
    settled = settle([few, going_on], limits)
    assert settled.found is going_on
    assert settled.decision.chosen.title == decide(many, limits).chosen.title
    assert {d.candidate.title for d in settled.dropped} == {c.title for c in few.candidates} - {
        c.title for c in going_on.candidates
    }
    assert all(d.n_windows == few.n_windows and d.reason for d in settled.dropped)


def test_other_jobs_with_more_windows_decide_nothing_where_they_lack_one_that_may_be_chosen():
    few, _, _, many = rounds_of(3)
    limits = Limits(max_bytes=40e6)
    first = decide(few, limits)
    others = among(many, kept(first)[1:])
    settled = settle([few, others], limits)
    assert settled.found is few
    assert settled.decision.chosen.title == first.chosen.title
    assert not settled.dropped


def test_what_meets_the_limits_in_some_resamples_goes_on_even_if_nothing_seems_to():
    at_limit = candidate("near", 60, 0.1 + np.array([-0.02, 0.021] * 4))
    worse = [candidate(f"r{i}", 20 + i, np.full(8, 0.104 + 0.001 * i)) for i in range(9)]
    decision = decide(field_of(*worse, at_limit), Limits(30e6, 0.02))
    assert not decision.meets
    decision = decide(field_of(*worse, at_limit), Limits(70e6, float(np.expm1(0.1))))
    assert not decision.meets
    assert "w4 near" in {c.title for c in kept(decision)}


def test_dropped_says_why_on_how_many_windows():
    few, _, _, many = rounds_of(5)
    decision = decide(few, Limits(max_bytes=40e6))
    gone = dropped(few, decision, among(many, [decision.chosen]))
    assert len(gone) == len(few.candidates) - 2
    reasons = {one.candidate.title: one.reason for one in gone}
    heavy = [c.title for c in few.candidates if c.bytes > 40e6 and not c.recipe.is_float]
    assert all(reasons[title].startswith("too large") for title in heavy)


# Records to candidates


def record(algo, scheme, texts, windows=4, seed=None, digest="d", mb=30.0, status="done", seq_len=8):
    """A record and its samples: `texts` gives each text's loss, the same on every window."""
    calib = None if seed is None else "docs"
    name = f"{algo}-{scheme}-{'.'.join(texts)}-{windows}-{seed}-{seq_len}-{digest}"
    evaluation = {"ppl": list(texts), "tasks": [], "seq_len": seq_len, "max_windows": windows, "limit": None}
    bits = 16 if algo == "fp" else 4
    about = {
        "fingerprint": name, "status": status, "started": name, "finished": name,
        "labels": {
            "model": "m", "algo": algo, "scheme": scheme, "wbits": bits, "abits": 16, "kvbits": 16,
            "group_size": None, "calib": calib, "seed": seed,
        },
        "identity": {
            "model": {"id": "m"}, "algorithm": {"name": algo}, "scheme": scheme, "evaluation": evaluation,
            "calib": None if seed is None else {"name": "docs", "seed": seed},
        },
        "config": {}, "environment": {"versions": {"python": "3.11"}, "command": ""},
        "metrics": {f"ppl/{t}": math.exp(loss) for t, loss in texts.items()} | {"model_mb": mb, "bits_per_weight": bits},
        "data": {f"eval/{t}": {"sha256": digest} for t in texts},
    }  # fmt: skip
    samples = [
        {"metric": f"ppl/{t}", "item": i, "value": loss} for t, loss in texts.items() for i in range(windows)
    ]
    return about, samples


def found(tmp_path, *records, texts=()) -> list[Field]:
    store = RecordStore(tmp_path / "results")
    store.prepare()
    for about, samples in records:
        store.write(about, samples)
    cells = Cells.of(list(store.all()), store, ("scheme", "algo", "calib"), metrics=("ppl/*",))
    return fields(cells, texts=texts)


def titles(field: Field) -> list[str]:
    return sorted(c.title for c in field.candidates)


def test_a_text_that_few_were_read_on_does_not_narrow_the_comparison(tmp_path):
    both = {"a": 1.0, "b": 2.0}
    records = [record("fp", "w16a16", both), record("rtn", "w4", both), record("rtn", "w3", both)]
    more = both | {"c": 3.0}
    first, *rest = found(tmp_path, *records, record("fp", "w16a16", more), record("rtn", "w2", more))
    assert first.metrics == ("ppl/a", "ppl/b")
    assert titles(first) == ["w16a16 fp", "w2 rtn", "w3 rtn", "w4 rtn"]
    assert not first.left_out
    (three,) = [f for f in rest if len(f.metrics) == 3]
    assert titles(three) == ["w16a16 fp", "w2 rtn"]
    assert set(three.left_out) == {"w3 rtn", "w4 rtn"}


def test_protocols_do_not_mix(tmp_path):
    few = [
        record(algo, scheme, {"a": 1.0}) for algo, scheme in (("fp", "w16a16"), ("rtn", "w4"), ("rtn", "w3"))
    ]
    many = [record(algo, scheme, {"a": 2.0}, windows=9) for algo, scheme in (("fp", "w16a16"), ("rtn", "w3"))]
    long = [record("rtn", "w2", {"a": 0.1}, seq_len=16)]
    by_few, by_many = found(tmp_path, *few, *many, *long)
    assert (by_few.n_windows, titles(by_few)) == (4, ["w16a16 fp", "w3 rtn", "w4 rtn"])
    assert (by_many.n_windows, titles(by_many)) == (9, ["w16a16 fp", "w3 rtn"])
    assert (by_few.protocol, by_many.protocol) == ("[8 x 4]", "[8 x 9]")
    assert [c.record["identity"]["evaluation"]["max_windows"] for c in by_many.candidates] == [9, 9]
    assert [c.record["identity"]["evaluation"]["max_windows"] for c in by_few.candidates] == [4, 4, 4]
    assert "w2 rtn" in by_few.left_out


def test_a_text_that_is_another_under_the_same_name_is_not_compared(tmp_path):
    (only,) = found(
        tmp_path, record("fp", "w16a16", {"a": 1.0}), record("rtn", "w4", {"a": 1.1}),
        record("rtn", "w3", {"a": 1.2}, digest="other"),
    )  # fmt: skip
    assert titles(only) == ["w16a16 fp", "w4 rtn"]
    assert only.left_out == ("w3 rtn",)


def test_seeds_are_draws_and_the_first_is_the_record_to_run_again(tmp_path):
    (only,) = found(
        tmp_path, record("fp", "w16a16", {"a": 1.0}),
        *(record("gptq", "w4", {"a": 1.1 + seed / 100}, seed=seed) for seed in (2, 0, 1)),
    )  # fmt: skip
    (gptq,) = [c for c in only.candidates if c is not only.floating]
    np.testing.assert_allclose(gptq.change[0], [[0.1] * 4, [0.11] * 4, [0.12] * 4])
    assert gptq.record["labels"]["seed"] == 0
    assert not gptq.has_luck


def test_texts_that_were_asked_for_are_the_only_ones_that_decide(tmp_path):
    both = {"a": 1.0, "b": 2.0}
    records = [record("fp", "w16a16", both), record("rtn", "w4", both)]
    (only,) = found(tmp_path, *records, texts=("b",))
    assert only.metrics == ("ppl/b",)
    assert not found(tmp_path, *records, texts=("b", "c"))


def test_without_the_floating_point_model_nothing_is_compared(tmp_path):
    assert not found(tmp_path, record("rtn", "w4", {"a": 1.0}), record("rtn", "w3", {"a": 1.0}))


# The command line


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("max_byte=3GB", "unknown key 'max_byte'; did you mean max_bytes"),
        ("max_ppl=2%", "did you mean max_ppl_increase"),
        ("hardwear=h100", "did you mean hardware"),
        ("hardware=h1000", "did you mean h100"),
        ("max_ppl_increase=2", "write 2% or 200%"),
        ("max_ppl_increase=-1%", "above zero"),
        ("max_bytes=3parsec", "a size, as in 3.5GB"),
        ("max_latency=8ms", "need hardware="),
        ("batch=8", "needs hardware="),
        ("prefer=best", "there are quality, size, speed"),
        ("fast", "takes key=value"),
    ],
)
def test_a_constraint_that_cannot_be_understood_says_what_is_needed(argument, message):
    with pytest.raises(UsageError, match=message):
        read([argument])


def test_constraints_are_read_with_their_units():
    asked = read(
        ["max_bytes=2GiB", "max_ppl_increase=200%", "max_latency=8ms", "hardware=H100", "max_bits=4", "x.y=1"]
    )
    assert asked.limits == Limits(2 * 2**30, 2.0, 0.008)
    assert asked.arguments == ("x.y=1",)
    assert asked.with_size(1e9).max_bytes == 5e8, "4 bits of each of 10^9 weights, fewer than 2 GiB"


def test_records_are_of_the_recipes_that_were_named():
    def rec(algo="gptq", calib="c4", seed=0, **config):
        content = {
            "algo_name": algo,
            "wbits": 4,
            "algo": {"damp": 0.01},
            "calib": {"name": calib, "n_samples": 8},
        }
        is_drawn = algo != "rtn"
        labels = {"algo": algo, "calib": calib if is_drawn else None, "seed": seed if is_drawn else None}
        return {"labels": labels, "config": content | {"seed": seed} | config}

    names = named(
        ["algo=gptq,rtn", "calib=c4", "seed=0,1", "eval=quick", "model=nano-llama", "calib.n_samples=8"]
    )
    assert names.base == ("calib=c4", "eval=quick", "model=nano-llama", "calib.n_samples=8")
    assert names.holds(rec())
    assert names.holds(rec("rtn", calib="ptb", seed=7)), "it draws no samples"
    assert names.holds(rec("fp"))
    assert not names.holds(rec("awq"))
    assert not names.holds(rec(calib="ptb"))
    assert not names.holds(rec(seed=2))
    assert not named(["wbits=3,2"]).holds(rec())
    assert not named(["algo.damp=0.05"]).holds(rec())
    assert named(["eval.ppl=[ptb,texts/mine.txt]"]).texts == ("ptb", "mine")
    for wrong in ("model=a,b", "+sweep=quickstart"):
        with pytest.raises(UsageError):
            named([wrong])


def test_a_recommendation_fits_a_narrow_terminal(capsys):
    few, _, _, many = rounds_of(3)
    limits = Limits(max_bytes=40e6)
    settled = settle([few, among(many, kept(decide(few, limits)))], limits)
    show(settled, limits, Console(width=80))
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    assert f"on {few.n_windows} windows" in told


# The command, from the first search to the file

SMALL = [
    "model=nano-llama", "calib.n_samples=2", "calib.seq_len=32", "eval.ppl=[stdlib_docs]", "eval.tasks=[]",
    "eval.seq_len=32", "eval.max_windows=16", "launcher=inline", "tracker=none",
]  # fmt: skip
THREE = [*SMALL, "algo=rtn,gptq,awq", "scheme=w3a16g64"]
FOLDER = Path("results")


def answer() -> dict:
    return json.loads((FOLDER / "tables" / "recommendation-nano-llama.json").read_text())


def fingerprints() -> set[str]:
    return {path.name for path in (FOLDER / "records").glob("[!.]*")}


def test_a_plan_runs_nothing(qbench, capsys):
    assert qbench("recommend", *THREE, "max_ppl_increase=5%", "plan=true") == 0
    told = capsys.readouterr().out
    assert "3 candidates, on 8, then 16 windows" in told
    assert "4 jobs, floating-point baselines included: 0 done, 4 to run" in told
    assert not FOLDER.exists()


def test_a_search_ends_in_a_recipe_and_the_same_command_says_the_same(qbench, capsys):
    command = ["recommend", *THREE, "scheme=w3a16g64,w4a16g128_down8", "algo=rtn", "max_bits=12"]
    assert qbench(*command) == 0
    told, before, first = capsys.readouterr().out, fingerprints(), answer()
    (ship,) = [line.split("qbench ")[1].split() for line in told.splitlines() if line.startswith("ship ")]
    assert qbench(*ship) == 0
    assert "equal to the bit" in capsys.readouterr().out
    assert qbench(*command) == 0
    assert fingerprints() == before
    assert answer() == first
    assert capsys.readouterr().out == told


def test_what_is_predicted_is_what_is_stored_and_a_failure_is_told_and_left_out(qbench, capsys, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no such luck")

    assert qbench("recommend", *THREE, "max_bits=5") in (0, 3)
    records = [r for r in RecordStore(FOLDER).all() if r["labels"]["algo"] != "fp"]
    assert {r["labels"]["algo"] for r in records} == {"rtn", "gptq", "awq"}
    for done in records:
        about = predicted(Jobs().job(done["config"]))
        assert about["metrics"]["model_mb"] == done["metrics"]["model_mb"]
        assert about["metrics"]["bits_per_linear_weight"] == done["metrics"]["bits_per_linear_weight"]
    capsys.readouterr()
    monkeypatch.setattr(GPTQ, "process", fail)
    assert qbench("recommend", *THREE, "max_ppl_increase=900%", "scheme=w4a16g64", "search=true") == 0
    out, err = capsys.readouterr()
    assert "left out nano-llama gptq w4a16g64 stdlib_docs: ValueError: no such luck" in err
    assert {one["recipe"].split()[1] for one in answer()["candidates"]} == {"fp", "rtn", "awq"}
    assert "w4a16g64" in out


def test_the_file_holds_what_it_takes_to_make_the_model_again(qbench):
    arguments = [*SMALL, "algo=gptq", "algo.damp=0.05", "scheme=w4a16g64", "seed=0,1"]
    assert qbench("recommend", *arguments, "max_bits=12") == 0
    about = answer()
    record = RecordStore(FOLDER).read(about["fingerprint"])
    assert about["recipe"] == {"algo": "gptq", "scheme": "w4a16g64", "calib": "stdlib_docs", "seed": 0}
    assert about["algorithm"]["damp"] == 0.05
    drawn = about["calibration"]["drawn"]["stdlib_docs"]
    assert (drawn["shape"], len(drawn["sha256"])) == ([2, 32], 64)
    assert about["metrics"]["ppl/stdlib_docs"] == {
        "value": record["metrics"]["ppl/stdlib_docs"], "stderr": record["metrics"]["ppl/stdlib_docs_stderr"],
    }  # fmt: skip
    assert about["versions"]["torch"]
    assert about["judged_on"]["metrics"] == ["ppl/stdlib_docs"]
    assert about["judged_on"]["windows"] == 8, "it was sure after the first round"
    (chosen,) = [one for one in about["candidates"] if one["why_not"] is None]
    assert len(chosen["records"]) == 2, "a draw each"
    before = fingerprints()
    assert qbench(*shlex.split(about["command"])[1:], "launcher=inline", "tracker=none") == 0
    assert fingerprints() == before, "the command is the recorded job"


@pytest.mark.slow
def test_rounds_list_what_they_drop_and_records_alone_tell_the_same(qbench, capsys):
    schemes = "scheme=w8a16g64,w4a16g64,w4a16g128,w3a16g64,w2a16g64"
    command = ["recommend", *SMALL, "algo=rtn,gptq", schemes, "max_bits=9"]
    assert qbench(*command, "plan=true") == 0
    assert qbench(*command) == 0
    told, first, ran = capsys.readouterr().out, answer(), fingerprints()
    assert first["judged_on"]["windows"] == 16, "the first round was not sure"
    assert first["dropped"]
    assert {one["windows"] for one in first["dropped"]} == {8}
    listed = [one["recipe"] for part in ("candidates", "dropped") for one in first[part]]
    assert len(listed) == len(set(listed))
    assert all(f"{one['recipe']} " in told for part in ("candidates", "dropped") for one in first[part])
    assert not any("w8a16" in title for title in listed), "it is larger than was asked for"
    for path in (FOLDER / "sweeps").iterdir():
        path.unlink()  # nothing is left that says there was a search
    assert qbench(*command) == 0
    assert fingerprints() == ran
    assert answer() == first


@pytest.mark.slow
def test_an_interrupted_search_takes_up_from_its_records(qbench):
    command = ["recommend", *SMALL, "algo=rtn", "scheme=w4a16g64,w3a16g64,w2a16g64", "max_ppl_increase=40%"]
    assert qbench(*command) in (0, 3)
    whole, first = fingerprints(), answer()
    store = RecordStore(FOLDER)
    lost = next(r for r in store.all() if r["labels"]["scheme"] == "w4a16g64")
    for path in (*store.path(lost["fingerprint"]).iterdir(), store.path(lost["fingerprint"])):
        path.unlink() if path.is_file() else path.rmdir()
    assert qbench(*command, "max_ppl_increase=41%") in (0, 3), "other limits, and the search is not over"
    assert fingerprints() == whole
    assert qbench(*command) in (0, 3)
    assert fingerprints() == whole
    assert answer() == first


@pytest.mark.slow
def test_where_nothing_small_enough_is_good_enough_the_others_tell_what_would_do(qbench, capsys):
    arguments = [*SMALL, "algo=rtn", "scheme=w8a16g64,w2a16g64"]
    assert qbench("recommend", *arguments, "max_bits=8", "max_ppl_increase=0.5%") == 3
    told = capsys.readouterr().out
    assert "nothing keeps to all limits" in told
    assert "in the way max_bytes" in told
    needed = {one["limit"]: one["needed"] for one in answer()["binding"]}
    eight = next(r for r in RecordStore(FOLDER).all() if r["labels"]["scheme"] == "w8a16g64")
    assert needed["max_bytes"] == eight["metrics"]["model_mb"] * 1e6
