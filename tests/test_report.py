"""Tables from records."""

import pandas as pd
import pytest

from qbench.report.frame import tidy
from qbench.report.tables import by_metric, number, summary, write


def record(algo, wbits, ppl=None, *, model="micro-llama", calib=None, seed=None, reason=None):
    scheme = f"w{wbits}a16" + ("g128" if wbits < 16 else "")
    labels = {
        "model": model, "algo": algo, "scheme": scheme, "wbits": wbits, "abits": 16, "kvbits": 16,
        "group_size": 128 if wbits < 16 else None, "calib": calib, "seed": seed,
    }  # fmt: skip
    metrics = {} if ppl is None else {
        "bits_per_weight": float(wbits), "calib_time_s": 1.5, "eval_time_s": 2.5, "peak_mem_calib_mb": 512.0,
        "ppl/docs": ppl, "ppl/docs_stderr": 0.25, "acc/cloze": 0.5, "acc/cloze_stderr": 0.04,
    }  # fmt: skip
    status = "failed" if reason else "done"
    name = f"{model}-{algo}-{scheme}-{calib}-{seed}"
    return {"fingerprint": name, "status": status, "reason": reason, "labels": labels, "metrics": metrics}


RECORDS = [
    record("rtn", 3, 20.0),
    record("gptq", 4, 12.5, calib="docs", seed=0),
    record("gptq", 3, reason="LinAlgError: not positive definite", calib="docs", seed=0),
    record("rtn", 4, 13.0),
    record("fp", 16, 12.0),
]


def test_the_floating_point_row_comes_first_then_more_bits_before_fewer():
    table = summary(tidy(RECORDS))
    assert list(zip(table["scheme"], table["algo"], strict=True)) == [
        ("w16a16", "fp"), ("w4a16g128", "rtn"), ("w4a16g128", "gptq"), ("w3a16g128", "rtn"), ("w3a16g128", "gptq"),
    ]  # fmt: skip
    assert list(table["bits"][:2]) == ["16", "4"]


def test_cells_have_values_with_errors_reasons_or_nothing():
    table = by_metric(tidy(RECORDS), "ppl/docs").set_index("algo")
    assert table.loc["fp", "w16a16"] == "12.00 ± 0.25"
    assert table.loc["fp", "w3a16g128"] == ""
    assert table.loc["gptq", "w3a16g128"] == "failed: LinAlgError: not positive definite"
    assert list(table.columns) == ["model", "w16a16", "w4a16g128", "w3a16g128"]


def test_calibration_and_seed_are_shown_where_they_tell_rows_apart():
    more = [*RECORDS, record("gptq", 4, 12.7, calib="code", seed=0)]
    assert "calib" not in summary(tidy(RECORDS))
    table = by_metric(tidy(more), "ppl/docs")
    assert set(table[table["algo"] == "gptq"]["calib"]) == {"docs", "code"}
    seeds = [*RECORDS, record("gptq", 4, 12.7, calib="docs", seed=1)]
    assert set(summary(tidy(seeds))["seed"]) >= {0, 1}


def test_every_table_is_written_in_every_format(tmp_path):
    frame = tidy(RECORDS)
    paths = write(frame, tmp_path)
    assert {p.name for p in paths} == {
        f"{t}.{s}" for t in ("summary", "ppl-docs", "acc-cloze") for s in ("csv", "md", "tex")
    }
    read = pd.read_csv(tmp_path / "ppl-docs.csv", keep_default_na=False)
    assert read.loc[0, "w16a16"] == "12.00 ± 0.25"
    tex = (tmp_path / "summary.tex").read_text()
    assert "\\toprule" in tex
    assert "$\\pm$" in tex
    assert (tmp_path / "ppl-docs.md").read_text().startswith("|")


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [(12.3456, 0.25, "12.35 ± 0.25"), (12.3456, 0.01, "12.346 ± 0.010"), (3132.5, 29.1, "3132.5 ± 29.1"),
     (0.01234, None, "0.0123"), (1234.5, None, "1234"), (float("nan"), None, "")],
)  # fmt: skip
def test_numbers_show_the_digits_that_mean_something(value, stderr, text):
    assert number(value, stderr) == text


def test_no_records_make_an_empty_table():
    assert summary(tidy([])).empty
