"""Tables from records."""

import pandas as pd
import pytest
from rich.console import Console

from qbench.report.frame import tidy
from qbench.report.tables import by_metric, number, show, summary, write


def record(
    algo, wbits, ppl=None, *, model="micro-llama", calib=None, seed=None, damp=0.01, windows=32, reason=None
):
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
    identity = {
        "model": {"id": model}, "algorithm": {"name": algo, "damp": damp}, "scheme": scheme,
        "calib": calib and {"name": calib, "seed": seed},
        "evaluation": {"ppl": ["docs"], "seq_len": 512, "max_windows": windows, "limit": None},
    }  # fmt: skip
    return {
        "fingerprint": repr(identity), "status": status, "reason": reason, "labels": labels, "metrics": metrics,
        "identity": identity, "environment": {"versions": {"python": "3.11.7"}},
    }  # fmt: skip


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


@pytest.mark.parametrize(
    ("other", "setting"),
    [({"calib": "code", "seed": 0}, "calib=code"), ({"calib": "docs", "seed": 1}, "seed=1"),
     ({"calib": "docs", "seed": 0, "damp": 0.1}, "damp=0.1")],
)  # fmt: skip
def test_whatever_tells_two_jobs_apart_is_shown_and_neither_is_lost(other, setting):
    assert "setting" not in summary(tidy(RECORDS))
    frame = tidy([*RECORDS, record("gptq", 4, 14.7, **other)])
    for table in (summary(frame), by_metric(frame, "ppl/docs")):
        assert setting in set(table["setting"])
    cells = by_metric(frame, "ppl/docs").query("algo == 'gptq'")["w4a16g128"]
    assert {"12.50 ± 0.25", "14.70 ± 0.25"} <= set(cells)


def test_two_protocols_never_share_a_column():
    frame = tidy([*RECORDS, record("rtn", 4, 13.3, windows=None)])
    table = summary(frame)
    assert {"ppl/docs [512 x 32]", "ppl/docs [512]"} <= set(table.columns)
    assert list(table["ppl/docs [512]"]).count("") == len(table) - 1


def test_a_reason_with_brackets_is_shown_as_it_is(capsys):
    show(tidy([record("gptq", 4, reason="OSError: no [/tmp/x] or [cuda:0]")]), Console(width=200))
    assert "no [/tmp/x] or [cuda:0]" in capsys.readouterr().out


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
    [(12.3456, 0.25, "12.35 ± 0.25"), (12.3456, 0.005, "12.346 ± 0.005"), (0.8281, 0.0476, "0.83 ± 0.05"),
     (3132.5, 29.1, "3132.5 ± 29.1"),
     (0.01234, None, "0.0123"), (1234.5, None, "1234"), (float("nan"), None, "")],
)  # fmt: skip
def test_numbers_show_the_digits_that_mean_something(value, stderr, text):
    assert number(value, stderr) == text


@pytest.mark.parametrize("width", [80, 40])
def test_no_number_is_cut_short_in_a_narrow_terminal(width, capsys):
    show(tidy(RECORDS), Console(width=width))
    out = capsys.readouterr().out
    assert "12.50 ± 0.25" in out
    assert "0.50 ± 0.04" in out


def test_no_records_make_an_empty_table():
    assert summary(tidy([])).empty
