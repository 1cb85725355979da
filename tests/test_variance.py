"""Shares of variance and correlations: textbook answers, and designs that are not the textbooks'."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from qbench.report.correlation import pearson, spearman
from qbench.report.variance import decompose

# Length of guinea pigs' teeth by supplement and dose: Crampton 1947, the example of R's ToothGrowth.
TEETH = {
    ("VC", 0.5): [4.2, 11.5, 7.3, 5.8, 6.4, 10, 11.2, 11.2, 5.2, 7],
    ("VC", 1.0): [16.5, 16.5, 15.2, 17.3, 22.5, 17.3, 13.6, 14.5, 18.8, 15.5],
    ("VC", 2.0): [23.6, 18.5, 33.9, 25.5, 26.4, 32.5, 26.7, 21.5, 23.3, 29.5],
    ("OJ", 0.5): [15.2, 21.5, 17.6, 9.7, 14.5, 10, 8.2, 9.4, 16.5, 9.7],
    ("OJ", 1.0): [19.7, 23.3, 23.6, 26.4, 20, 25.2, 25.8, 21.2, 14.5, 27.3],
    ("OJ", 2.0): [25.5, 26.4, 22.4, 24.5, 24.8, 30.9, 26.4, 27.3, 29.4, 23],
}
ANSCOMBE_X = [10, 8, 13, 9, 11, 14, 6, 4, 12, 7, 5]
ANSCOMBE_Y = [8.04, 6.95, 7.58, 8.81, 8.33, 9.96, 7.24, 4.26, 10.84, 4.82, 5.68]


def teeth() -> pd.DataFrame:
    rows = [(*key, length) for key, lengths in TEETH.items() for length in lengths]
    return pd.DataFrame(rows, columns=["supp", "dose", "value"])


def sweep(effects=None, noise=0.01, seed=0) -> pd.DataFrame:
    """Logarithms of perplexity: two algorithms on three sets with four seeds, and one that needs no data."""
    rng, effects = np.random.default_rng(seed), effects or {}
    rows = [
        {"algo": algo, "calib": calib, "seed": draw, "scheme": "w4", "model": "m"}
        for algo in ("gptq", "awq")
        for calib in ("a", "b", "c")
        for draw in range(4)
    ]
    rows += [{"algo": "rtn", "calib": None, "seed": None, "scheme": "w4", "model": "m"}]
    for row in rows:
        row["value"] = 3 + sum(effects.get(level, 0.0) for level in row.values()) + rng.normal(0, noise)
    return pd.DataFrame(rows)


def test_guinea_pigs_teeth_give_the_published_table():
    found = decompose(teeth(), ("supp", "dose")).set_index("term")
    assert found["df"].dropna().to_dict() == {"supp": 1, "dose": 2, "supp:dose": 2, "residual": 54}
    published = {"supp": 205.4, "dose": 2426.4, "supp:dose": 108.3, "residual": 712.1}
    for term, sum_sq in published.items():
        assert found.loc[term, "sum_sq"] == pytest.approx(sum_sq, abs=0.05)
    assert found["F"].dropna().tolist() == pytest.approx([15.572, 92.0, 4.107], abs=5e-4)
    assert found.loc["supp:dose", "p"] == pytest.approx(0.02186, abs=5e-6)
    assert found.loc["shared", "sum_sq"] == 0, "a balanced design shares nothing"
    assert found["share"].sum() == pytest.approx(1)


def test_an_unbalanced_design_is_decomposed_as_by_statsmodels():
    frame = teeth().drop(index=[0, 1, 2, 3, 14, 27, 28, 41, 55])
    found = decompose(frame, ("supp", "dose")).set_index("term")
    theirs = anova_lm(ols("value ~ C(supp) * C(dose)", frame).fit(), typ=2)
    terms = {"C(supp)": "supp", "C(dose)": "dose", "C(supp):C(dose)": "supp:dose", "Residual": "residual"}
    for name, term in terms.items():
        assert found.loc[term, "sum_sq"] == pytest.approx(theirs.loc[name, "sum_sq"])
        if term != "residual":
            assert found.loc[term, "p"] == pytest.approx(theirs.loc[name, "PR(>F)"])
    assert found["share"].sum() == pytest.approx(1)


def test_what_needs_no_data_does_not_hide_the_other_algorithms():
    frame = sweep({"gptq": 0.1, "b": 0.05, "rtn": 1.0})
    found = decompose(frame).set_index("term")
    calibrated = decompose(frame[frame["algo"] != "rtn"]).set_index("term")
    for term in ("algo", "calib", "seed", "algo:calib"):
        assert found.loc[term, ["df", "sum_sq", "p"]].tolist() == pytest.approx(
            calibrated.loc[term, ["df", "sum_sq", "p"]].tolist()
        )
    assert found.loc["shared", "share"] > 0.5, (
        "algorithm, set or seed: no record can tell what makes rtn worse"
    )
    assert found.loc["scheme", "note"] == "one level: w4"
    assert found["share"].sum() == pytest.approx(1)


def test_factors_that_imply_one_another_are_said_to():
    frame = sweep({"gptq": 0.1})
    frame["scheme"] = frame["algo"]
    found = decompose(frame).set_index("term")
    assert found.loc["scheme", "note"] == found.loc["algo", "note"] == "told by the other factors"
    assert found.loc[["scheme", "algo"], "share"].isna().all()
    assert found.loc["algo:scheme", "note"] == "does not vary beside the factors"


def test_an_interaction_that_would_leave_no_residual_is_the_residual():
    frame = teeth().groupby(["supp", "dose"], as_index=False)["value"].mean()
    found = decompose(frame, ("supp", "dose")).set_index("term")
    assert found.loc["supp:dose", "note"] == "would leave nothing for the residual"
    assert found.loc["residual", "df"] == 2


def test_perplexities_are_decomposed_as_logarithms():
    frame = sweep({"gptq": 0.1})
    named = frame.assign(metric="ppl/docs [512]", value=np.exp(frame["value"]))
    pd.testing.assert_frame_equal(decompose(named), decompose(frame))


def test_what_cannot_be_decomposed_is_refused():
    frame = sweep()
    for wrong, message in (
        (frame.drop(columns="seed"), "the frame has no seed"),
        (frame.assign(metric=["ppl/a"] + ["ppl/b"] * 24), "2 metrics"),
        (frame.assign(value=[np.inf] + [1.0] * 24), "1 of 25 values are not finite"),
        (frame.assign(value=1.0), "all equal"),
        (frame.iloc[[0, 0]].assign(value=[1.0, 2.0]), "varies in 2 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            decompose(wrong)


@pytest.mark.slow
def test_a_factor_without_effect_is_seldom_significant():
    p = [decompose(sweep(seed=s), ("algo", "calib")).set_index("term").loc["calib", "p"] for s in range(200)]
    assert np.mean(np.array(p) < 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


def test_spearmans_textbook_case_is_found():
    """Intelligence against hours of television, as every introduction has it: rho = -29/165."""
    wide = pd.DataFrame({
        "iq": [106, 100, 86, 101, 99, 103, 97, 113, 112, 110],
        "hours": [7, 27, 2, 50, 28, 29, 20, 12, 6, 17],
    })  # fmt: skip
    found = spearman(wide)
    assert found.rho.loc["iq", "hours"] == found.rho.loc["hours", "iq"] == pytest.approx(-29 / 165)
    assert found.p.loc["iq", "hours"] == pytest.approx(0.627188, abs=5e-7)
    assert found.n.loc["iq", "hours"] == 10


def test_few_recipes_get_exact_p_values_and_too_few_none():
    """Of the 5! orders, one agrees wholly and one disagrees wholly; three pairs of columns are tested."""
    wide = pd.DataFrame({"a": [1, 2, 3, 4, 5], "b": [2, 3, 5, 7, 9.0], "c": [np.nan, np.nan, np.nan, 1, 2]})
    found = spearman(wide.assign(d=1.0))
    assert found.rho.loc["a", "b"] == pytest.approx(1)
    assert found.p.loc["a", "b"] == pytest.approx(2 / 120)
    assert np.isnan(found.rho.loc["a", "c"])
    assert np.isnan(found.p.loc["a", "d"])
    assert found.n.loc["a", "c"] == 2


def test_anscombes_first_quartet_has_its_published_correlation():
    wide = pd.DataFrame({"x": ANSCOMBE_X, "y": ANSCOMBE_Y, "same": 1.0})
    found = pearson(wide, "x", ["y", "same"]).set_index("y")
    assert found.loc["y", "r"] == pytest.approx(0.81642, abs=5e-6)
    assert found.loc["y", ["low", "high"]].tolist() == pytest.approx([0.42439, 0.95069], abs=5e-6)
    assert found.loc["y", "p"] == pytest.approx(0.00217, abs=5e-6)
    assert found.loc["same", ["r", "low", "p"]].isna().all()


def test_fishers_interval_covers_the_true_correlation():
    rng, inside = np.random.default_rng(0), []
    for _ in range(150):
        x, e = rng.normal(size=(2, 20))
        found = pearson(pd.DataFrame({"x": x, "y": 0.6 * x + 0.8 * e}), "x", ["y"]).iloc[0]
        inside.append(found["low"] <= 0.6 <= found["high"])
    assert abs(np.mean(inside) - 0.95) <= 3 * np.sqrt(0.05 * 0.95 / 150)


def test_columns_that_have_nothing_to_do_with_one_another_seldom_correlate():
    rng, claims = np.random.default_rng(1), []
    for _ in range(100):
        claims.append(np.nanmin(spearman(pd.DataFrame(rng.normal(size=(15, 4)))).p.to_numpy()) < 0.05)
    assert np.mean(claims) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 100)
    assert (
        stats.spearmanr([1, 2, 3], [3, 1, 2]).statistic
        == spearman(pd.DataFrame([[1, 3], [2, 1], [3, 2]])).rho.iloc[0, 1]
    )
