"""Tests, intervals and ties: textbook answers, and how often they are wrong where the truth is known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from qbench.report import metrics
from qbench.report.power import detectable, detectable_rate, table_detectable
from qbench.report.resampling import interval
from qbench.report.significance import (
    Draws,
    differences,
    holm,
    table_ties,
    ties,
)
from tests.reference.statistics import bootstrap_interval, bootstrap_p, sign_flip_p

# Hours of sleep gained by ten patients under two drugs: Cushny & Peebles 1905, Student 1908.
SLEEP = (
    [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
)


def draws(values, **more) -> Draws:
    values = np.atleast_2d(np.asarray(values, dtype=float))
    return Draws(tuple(f"{i:06d}" for i in range(values.shape[1])), values, **more)


def difference(a, b):
    return differences([(a, b)])[0]


def above(level: float, n: int) -> float:
    """What a share of this level may reach by luck in `n` trials: three standard errors."""
    return level + 3 * np.sqrt(level * (1 - level) / n)


def tables(n_tables, n_columns, k, n_items, seed=0, effect=0.0):
    """Recipes that are equal but for their noise on windows; the last is worse by `effect`, in the first column."""
    rng = np.random.default_rng(seed)
    for _ in range(n_tables):
        hard = rng.normal(3, 1, (n_columns, 1, n_items))
        values = hard + rng.normal(0, 0.1, (n_columns, k, n_items))
        values[0, -1] += effect
        yield {c: {r: draws(values[c, r]) for r in range(k)} for c in range(n_columns)}


def surely_worse(standings):
    return [s for column in standings.values() for s in column.values() if not s.best and not s.tie]


@pytest.mark.parametrize(
    ("metric", "lower", "kind"),
    [
        ("ppl/x", True, "loss"), ("acc/x", False, "binary"), ("acc_norm/x", False, "binary"),
        ("exact_match,strict/x", False, "binary"), ("pass@1/x", False, "binary"), ("kl/x", True, "real"),
        ("pct_stereotype/crows_pairs_english", True, "binary"), ("likelihood_diff/crows_pairs_english", True, "real"),
        ("word_perplexity/x", True, "real"), ("perplexity/lambada_openai", True, "real"), ("rouge1/x", False, "real"),
        ("judge/mt_bench", False, "real"), ("bleu/x", False, "real"), ("calib_time_s", True, "real"),
    ],
)  # fmt: skip
def test_a_metric_is_better_in_the_direction_that_its_field_knows(metric, lower, kind):
    assert metrics.lower_is_better(metric) == lower
    assert metrics.kind(metric) == kind


def test_students_sleep_data_give_students_p_value():
    found = difference(draws(SLEEP[0]), draws(SLEEP[1]))
    assert found.test == "paired t"
    assert found.effect == pytest.approx(-1.58)
    assert found.p == pytest.approx(0.002833, abs=5e-7)
    assert found.effect / (found.sd / np.sqrt(found.n)) == pytest.approx(-4.0621, abs=5e-5)
    # Student's interval is (-2.4599, -0.7001); one difference is an outlier, so the bootstrap's reaches further that way.
    assert found.low < -2.4599
    assert found.effect < found.high < 0


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (1, 8, 2 * (1 + 9) / 2**9),  # by hand
        (86, 150, 3.716e-05),  # approval of a prime minister, Agresti; R's exact2x2
    ],
)
def test_answers_that_changed_are_counted_as_by_mcnemar(gained, lost, p):
    now = [1] * gained + [0] * lost + [1] * 20 + [0] * 20
    before = [0] * gained + [1] * lost + [1] * 20 + [0] * 20
    found = difference(draws(now), draws(before))
    assert (found.test, found.kind) == ("McNemar", "binary")
    assert found.p == pytest.approx(p, rel=1e-3)
    assert found.effect == pytest.approx((gained - lost) / len(now))
    assert found.low < found.effect < found.high


def test_holms_correction_is_the_textbooks_and_statsmodels():
    p = np.random.default_rng(0).uniform(size=30) ** 3
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, float("nan"), 0.04]) == pytest.approx([0.02, float("nan"), 0.04], nan_ok=True)
    assert holm([0.01, 0.02], family=10) == pytest.approx([0.1, 0.18])
    assert holm([]).tolist() == []


def test_what_is_identical_does_not_differ():
    same = draws(np.random.default_rng(0).normal(size=(3, 9)))
    found = difference(same, same)
    assert (found.effect, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert ties({"a": same, "b": same}, lower=True)["b"].tie


def test_of_a_single_item_nothing_is_known():
    found = difference(draws([1.5]), draws([1.0]))
    assert found.effect == 0.5
    assert np.isnan([found.p, found.sd, found.low, found.high]).all()
    assert ties({"a": draws([1.0]), "b": draws([2.0])}, lower=True)["b"].tie


def test_only_items_of_both_are_compared():
    a = Draws(("a", "b", "c", "d"), np.array([[1.0, 2.0, 4.0, 9.0]]))
    b = Draws(("b", "c", "d", "e"), np.array([[1.0, 2.0, 8.0, 7.0]]))
    found = difference(a, b)
    assert (found.n, found.effect) == (3, pytest.approx(4 / 3))
    with pytest.raises(ValueError, match="share none of their 4 and 1 items"):
        difference(a, draws([1.0]))


def test_draws_are_read_from_a_frame_in_any_order():
    rows = [(seed, item, 10 * seed + item) for seed in (1, 0) for item in (2, 0, 1)]
    found = Draws.of(pd.DataFrame(rows, columns=["draw", "item", "value"]), "ppl/docs [512]")
    assert found.items == ("0", "1", "2")
    assert found.values.tolist() == [[0, 1, 2], [10, 11, 12]]
    assert (found.drawn, found.loss) == (True, True)
    once = Draws.of(pd.DataFrame({"draw": None, "item": [0, 1], "value": [1.0, 0.0]}), "acc/task")
    assert (once.drawn, once.loss, once.values.shape) == (False, False, (1, 2))
    for wrong in (rows[:-1], [*rows, rows[0]], [*rows[:-1], rows[0]], []):
        with pytest.raises(ValueError, match="one of each is needed"):
            Draws.of(pd.DataFrame(wrong, columns=["draw", "item", "value"]))


def test_the_p_value_is_the_larger_of_items_and_draws():
    rng = np.random.default_rng(1)
    luck = rng.normal(0, 0.1, (2, 4, 1))
    a, b = luck + rng.normal(0, 0.001, (2, 4, 30))
    found = difference(draws(a), draws(b))
    welch = stats.ttest_ind(a.mean(1), b.mean(1), equal_var=False).pvalue
    assert found.test == "paired t and Welch over draws"
    assert found.p == pytest.approx(welch)
    one = draws(b[0], drawn=False)
    assert difference(draws(a), one).p == pytest.approx(stats.ttest_1samp(a.mean(1), b[0].mean()).pvalue)
    assert difference(one, draws(a)).p == pytest.approx(difference(draws(a), one).p)
    alone = stats.ttest_ind(a.mean(1), [b[0].mean()], equal_var=True).pvalue
    assert difference(draws(a), draws(b[0])).p == pytest.approx(alone)


def test_a_difference_does_not_depend_on_what_it_is_computed_beside():
    rng = np.random.default_rng(2)
    pairs = [(draws(rng.normal(size=(k, n))), draws(rng.normal(size=n))) for k in (1, 3) for n in (7, 12, 12)]
    together = differences(pairs)
    for pair, found in zip(pairs, together, strict=True):
        alone = difference(*pair)
        assert (alone.test, alone.n, alone.p) == (found.test, found.n, pytest.approx(found.p))
        assert (alone.low, alone.high) == (found.low, found.high)


def test_counting_draws_gives_the_intervals_of_drawing():
    values = np.random.default_rng(3).lognormal(size=(5, 24))
    # 4999 resamples in one batch on both sides are the same resamples.
    plain = [bootstrap_interval(row[None], "BCa", True, 4999)[:, 0] for row in values]
    assert np.array(interval(values)) == pytest.approx(np.stack(plain, axis=1))


def test_a_constant_difference_is_sure_and_broken_values_are_no_tie():
    rng = np.random.default_rng(4)
    values = rng.normal(size=20)
    found = difference(draws(values + 1), draws(values))
    assert found.p < 1e-12
    assert (found.low, found.high) == pytest.approx((1, 1))
    broken = values.copy()
    broken[3] = np.inf
    standings = ties({"a": draws(broken), "b": draws(values), "c": draws(values)}, lower=False)
    assert standings["b"].best
    assert not standings["a"].tie
    assert standings["c"].tie


def test_where_lower_or_higher_is_better_the_best_is_found():
    values = {"low": draws(np.arange(9.0)), "high": draws(np.arange(9.0) + 5 + 0.01 * np.arange(9) ** 2)}
    assert ties(values, lower=True)["low"].best
    found = ties(values, lower=False)
    assert found["high"].best
    assert not found["low"].tie
    assert found["low"].difference.effect < 0
    with pytest.raises(ValueError, match=r"not asked the same items \(low 9, other 2\)"):
        ties({"low": values["low"], "other": draws([1, 2])}, lower=True)


def test_a_table_counts_all_pairs_of_all_its_columns():
    groups = next(tables(1, n_columns=2, k=4, n_items=10))
    standings = table_ties(groups, {0: True, 1: True})
    found = [s for column in standings.values() for s in column.values()]
    assert {s.family for s in found} == {2 * 6}
    least = min(s.difference.p for s in found if s.difference)
    assert min(s.p for s in found if s.difference) == pytest.approx(min(1, 12 * least))
    assert sum(s.best for s in found) == 2


@pytest.mark.parametrize(("n", "differ", "alpha"), [(64, 0.1, 0.05), (200, 0.2, 0.05), (200, 0.1, 0.001)])
def test_a_detectable_difference_of_rates_is_found_in_four_of_five(n, differ, alpha):
    """By McNemar's exact test, which finds fewer than a t-test would."""
    effect, rng = detectable_rate(differ, n, alpha), np.random.default_rng(5)
    share, tries = max(differ, effect), 2000
    chance = [(share + effect) / 2, (share - effect) / 2, 1 - share]
    found = 0
    for lost, won, _ in rng.multinomial(n, chance, tries):
        found += 2 * stats.binom.cdf(min(lost, won), lost + won, 0.5) < alpha
    assert abs(found / tries - 0.8) < 3 * np.sqrt(0.8 * 0.2 / tries)
    assert effect > detectable(np.sqrt(differ), n, alpha) * 0.9
    assert np.isnan(detectable_rate(0.5, 4, alpha)), "four documents that all differ are no proof"


@pytest.mark.parametrize("n", [8, 24, 200])
@pytest.mark.parametrize("alpha", [0.05, 1e-4])
def test_a_detectable_difference_is_found_in_four_of_five(n, alpha):
    rng = np.random.default_rng(n)
    deltas = rng.normal(detectable(2.0, n, alpha), 2.0, (4000, n))
    found = (stats.ttest_1samp(deltas, 0, axis=1).pvalue < alpha).mean()
    assert abs(found - 0.8) < 3 * np.sqrt(0.8 * 0.2 / 4000)
    assert np.isnan(detectable(1.0, 1))
    assert detectable(0.0, 24) == 0


def test_where_nothing_differs_few_pairs_seem_to():
    rng = np.random.default_rng(5)
    for k in (1, 5):
        luck = rng.normal(0, 0.3, (2, 2000, k, 1)) * (k > 1)
        values = luck + rng.normal(size=(2, 2000, k, 24))
        found = differences([(draws(a), draws(b)) for a, b in zip(*values, strict=True)])
        assert np.mean([d.p < 0.05 for d in found]) <= above(0.05, 2000)


def test_a_single_draw_beside_several_is_not_surer_than_it_can_be():
    rng = np.random.default_rng(6)
    luck, items = rng.normal(0, 1, (2000, 6, 1)), rng.normal(0, 0.01, (2000, 6, 24))
    found = differences([(draws(v[:5]), draws(v[5:])) for v in luck + items])
    assert np.mean([d.p < 0.05 for d in found]) <= above(0.05, 2000)


def test_where_nothing_differs_few_tables_say_that_something_does():
    n_tables, lower = 120, dict.fromkeys(range(3), True)
    claims = [bool(surely_worse(table_ties(t, lower))) for t in tables(n_tables, 3, k=5, n_items=24)]
    assert np.mean(claims) <= above(0.05, n_tables)


def test_a_table_finds_what_it_says_it_would():
    n_tables, lower = 150, dict.fromkeys(range(3), True)
    sd = 0.1 * np.sqrt(2)
    effect = detectable(sd, 24, 0.05 / 3)
    found = [table_ties(t, lower) for t in tables(n_tables, 3, k=2, n_items=24, effect=effect)]
    power = np.mean([any(s is found_[0][1] for s in surely_worse(found_)) for found_ in found])
    assert abs(power - 0.8) < 3 * np.sqrt(0.8 * 0.2 / n_tables)
    # The table knows only its own estimate of the spread.
    said = np.mean([table_detectable(f)[0] for f in found])
    assert said == pytest.approx(effect, rel=0.05)


@pytest.mark.parametrize(
    ("metric", "lower", "kind", "cost", "shown"),
    [
        ("ppl/docs [512 x 32]", True, "loss", False, "+1.0%"),
        ("decode_ppl/docs", True, "loss", False, "+1.0%"),
        ("bpb/docs", True, "loss", False, "+0.00995"),
        ("kl/docs", True, "real", False, "+0.00995"),
        ("acc/piqa [limit 50]", False, "binary", False, "+1.0 points"),
        ("flips/piqa", True, "binary", False, "+1.0 points"),
        ("agreement/docs", False, "binary", False, "+1.0 points"),
        ("judge/mt_bench", False, "real", False, "+0.00995"),
        ("rougeL/xsum", False, "real", False, "+0.00995"),
        ("pass@1/humaneval", False, "binary", False, "+1.0 points"),
        ("calib_time_s", True, "real", True, "+0.00995"),
        ("tokens_per_s", False, "real", True, "+0.00995"),
    ],
)
def test_a_metrics_name_says_which_way_is_better(metric, lower, kind, cost, shown):
    assert metrics.lower_is_better(metric) is lower
    assert metrics.kind(metric) == kind
    assert metrics.is_cost(metric) is cost
    assert metrics.shown_effect(metric, np.log(1.01)) == shown
    assert " " not in metrics.base(metric)


def skewed(rng, size):
    return rng.lognormal(size=size) - np.exp(0.5)


SHAPES = {
    "normal": lambda rng, size: rng.normal(size=size),
    "skewed": skewed,
    "heavy tails": lambda rng, size: skewed(rng, size) - skewed(rng, size),
}


@pytest.mark.slow
def test_widened_bca_intervals_cover_best():
    """Prints the shares of docs/statistics.md."""
    n_rows = 4000
    for shape in ("normal", "skewed"):
        for n in (16, 24, 64):
            values, shares = SHAPES[shape](np.random.default_rng(n), (n_rows, n)), {}
            for widened in (False, True):
                for method in ("percentile", "BCa", "basic"):
                    parts = [bootstrap_interval(v, method, widened) for v in np.split(values, 20)]
                    low, high = np.concatenate(parts, axis=1)
                    shares[f"{method}{' widened' * widened}"] = np.mean((low <= 0) & (high >= 0))
            ours = interval(values)
            shares["qbench"] = np.mean((ours[0] <= 0) & (ours[1] >= 0))
            print(shape, n, {name: f"{share:.1%}" for name, share in shares.items()})
            noise = 3 * np.sqrt(0.25 / n_rows)
            assert shares["qbench"] >= max(shares.values()) - noise
            if shape == "normal":
                assert abs(shares["qbench"] - 0.95) <= above(0.05, n_rows) - 0.05


@pytest.mark.slow
def test_the_t_test_holds_its_level_where_recipes_are_alike():
    """Prints the shares of docs/statistics.md."""
    n_rows, rng = 4000, np.random.default_rng(0)
    for shape, sample in SHAPES.items():
        values = sample(rng, (n_rows, 24))
        p = {
            "t": stats.ttest_1samp(values, 0, axis=1).pvalue,
            "bootstrap": bootstrap_p(values, rng),
            "sign flips": sign_flip_p(values, rng),
        }
        for alpha in (0.05, 0.01, 0.001):
            shares = {name: (found <= alpha).mean() for name, found in p.items()}
            print(shape, alpha, {name: f"{share:.2%}" for name, share in shares.items()})
            if shape != "skewed":  # there no test of these keeps its level
                assert shares["t"] <= above(alpha, n_rows)


@pytest.mark.slow
@pytest.mark.parametrize(("n_columns", "k"), [(1, 2), (1, 5), (1, 10), (6, 5), (6, 10)])
def test_tables_of_equal_recipes_claim_nothing(n_columns, k):
    """Prints the shares of docs/statistics.md: as it is, and had only the comparisons with the best been counted."""
    n_tables, lower = 1000, dict.fromkeys(range(n_columns), True)
    claims = np.zeros(2)
    for table in tables(n_tables, n_columns, k, n_items=24, seed=k):
        standings = table_ties(table, lower)
        p = [s.difference.p for column in standings.values() for s in column.values() if s.difference]
        claims += [bool(surely_worse(standings)), holm(p).min() < 0.05]
    print(n_columns, k, [f"{share:.1%}" for share in claims / n_tables])
    assert claims[0] / n_tables <= above(0.05, n_tables)
