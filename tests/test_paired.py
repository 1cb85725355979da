"""Differences between jobs that met the same windows."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from qbench.report.paired import compare, holm, table

WINDOWS = 40


def record(algo: str, scheme: str = "w4a16", status: str = "done") -> dict:
    return {
        "fingerprint": f"{algo}-{scheme}",
        "status": status,
        "labels": {"model": "m", "algo": algo, "scheme": scheme, "wbits": 4, "abits": 16, "kvbits": 16},
        "identity": {
            "model": {"id": "m"},
            "scheme": scheme,
            "algorithm": {"name": algo},
            "calib": None,
            "evaluation": {"ppl": ["docs"], "seq_len": 512, "max_windows": None, "limit": None},
        },
        "environment": {"versions": {"python": "3"}},
        "metrics": {"ppl/docs": 10.0, "bits_per_weight": 4.5} if status == "done" else {},
    }


def samples(shifts: dict[str, float]):
    """Windows of very different difficulty; an algorithm adds its shift and a little noise."""
    hard = np.random.default_rng(0).normal(3, 1, WINDOWS)

    def of(fingerprint: str) -> list[dict]:
        algo = fingerprint.split("-")[0]
        noise = np.random.default_rng(sum(map(ord, algo))).normal(0, 0.01, WINDOWS)
        values = hard + shifts[algo] + noise
        return [{"metric": "ppl/docs", "item": i, "value": v} for i, v in enumerate(values)]

    return of


def test_a_difference_far_below_the_spread_of_windows_is_found():
    frame = compare([record("rtn"), record("gptq")], samples({"rtn": 0.0, "gptq": -0.02}), "rtn")
    assert frame["algo"].tolist() == ["gptq"]
    assert frame["n"].item() == WINDOWS
    assert frame["p"].item() < 1e-6
    assert frame["change"].item() == pytest.approx(np.expm1(-0.02), abs=0.005)
    shown = table(frame, "ppl/docs").set_index("algo")["w4a16"]
    assert shown["rtn"] == "10", "the baseline comes first"
    assert "*" in shown["gptq"]


def test_the_p_value_is_that_of_a_paired_t_test():
    of = samples({"rtn": 0.0, "gptq": 0.001})
    frame = compare([record("rtn"), record("gptq")], of, "rtn")
    a, b = (np.array([row["value"] for row in of(name)]) for name in ("gptq", "rtn"))
    assert frame["p"].item() == pytest.approx(stats.ttest_rel(a, b).pvalue)


def test_no_difference_is_no_evidence():
    frame = compare([record("rtn"), record("same")], lambda _: samples({"rtn": 0.0})("rtn-"), "rtn")
    assert frame["p"].item() == 1.0
    assert "*" not in table(frame, "ppl/docs").set_index("algo").loc["same", "w4a16"]


def test_only_jobs_of_one_scheme_and_evaluation_meet():
    records = [record("rtn"), record("gptq", "w3a16"), record("bad", status="failed")]
    with pytest.raises(ValueError, match="no job shares model, scheme and evaluation"):
        compare(records, samples({"rtn": 0.0, "gptq": 0.0}), "rtn")


def test_a_departure_from_a_plain_scheme_is_compared_with_the_plain_one():
    records = [
        record("rtn"),
        record("rtn", "w4a16-sym"),
        record("hqq", "w4a16-rz"),
        record("gptq", "w4a16-sym"),
    ]
    frame = compare(records, samples({"rtn": 0.0, "hqq": -0.02, "gptq": -0.01}), "rtn")
    met = {(row.algo, row.scheme): row.baseline_scheme for row in frame.itertuples()}
    assert met == {
        ("hqq", "w4a16-rz"): "w4a16",
        ("gptq", "w4a16-sym"): "w4a16-sym",
        ("rtn", "w4a16-sym"): "w4a16",
    }
    shown = table(frame, "ppl/docs")
    assert shown["algo"].tolist() == ["rtn", "rtn -sym", "hqq -rz", "gptq"]
    assert shown.columns.tolist() == ["model", "algo", "w4a16", "w4a16-sym"]


def test_what_costs_more_bits_than_the_baseline_says_so():
    dear = record("gptq") | {"metrics": {"ppl/docs": 10.0, "bits_per_weight": 4.75}}
    cheap = record("awq") | {"metrics": {"ppl/docs": 10.0, "bits_per_weight": 4.52}}
    frame = compare([record("rtn"), dear, cheap], samples({"rtn": 0.0, "gptq": -0.02, "awq": 0.0}), "rtn")
    shown = table(frame, "ppl/docs").set_index("algo")["w4a16"]
    assert shown["gptq"].endswith(" 4.75 bits")
    assert "bits" not in shown["awq"]


def test_overrides_are_bits_and_no_departure():
    records = [record("rtn"), record("owq", "w4a16-sym-[down_proj:w8a16]"), record("gptq", "w4a16-sym")]
    frame = compare(records, samples({"rtn": 0.0, "owq": -0.02, "gptq": -0.01}), "rtn")
    assert frame["algo"].tolist() == ["gptq"]


def test_a_baseline_is_calibrated_on_the_same_data():
    def seeded(algo, seed):
        one = record(algo)
        identity = one["identity"] | {"calib": {"name": "docs", "seed": seed}}
        return one | {"fingerprint": f"{algo}-{seed}", "identity": identity}

    rows, of = [seeded("gptq", 0), seeded("gptq", 1), seeded("awq", 1)], samples({"gptq": 0.0, "awq": -0.02})
    met = []
    frame = compare(rows, lambda fingerprint: met.append(fingerprint) or of(fingerprint), "gptq")
    assert frame["algo"].tolist() == ["awq"]
    assert met == ["awq-1", "gptq-1"]
    with pytest.raises(ValueError, match="2 jobs could be the baseline of awq"):
        compare([*rows[:2], seeded("awq", 2)], of, "gptq")


def test_a_baseline_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no job with algo=rtn is recorded; there are gptq"):
        compare([record("gptq")], samples({}), "rtn")


def test_many_comparisons_make_each_less_sure():
    """Holm's method by hand: times 3, 2, 1, and never smaller than the one before."""
    p = pd.Series([0.04, 0.01, 0.03])
    assert holm(p).tolist() == pytest.approx([0.06, 0.03, 0.06])
