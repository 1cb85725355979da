"""Published numbers: what they are here, how far a run may be from them, and which cannot be true."""

import io
import math
import re
import shlex

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from rich.console import Console

from qbench.models.families import DESCRIBED
from qbench.report import implausible
from qbench.report.ledger import command, ledger, show, summary, write
from qbench.report.naming import COLUMNS, FOLDER, UNSTATED, Names, names, read, translate
from qbench.report.published import Noise, beside, floating_point, load, match, noise
from qbench.sweep.settings import Jobs
from tests.test_grid import COMPOSER

GOOD = "GPTQ paper,Table 1,LLaMA-2-7B,GPTQ,w4a16,c4,wikitext2,ppl,5.83"
SURE = 0.006
CELL = {
    "model": "Llama-2-7b-hf", "algo": "gptq", "scheme": "w3a16g128", "calib": "c4", "metric": "ppl/wikitext2",
    "value": 6.318, "stderr": 0.03, "fingerprint": "a" * 16,
}  # fmt: skip
ALIGN = "llm-qbench-align"


def published(number: str) -> pd.Series:
    return load().set_index("number").loc[number]


def cells(*changes: dict) -> pd.DataFrame:
    return pd.DataFrame([CELL | change for change in changes], dtype=object)


def of_gptq_w3(found: pd.DataFrame) -> pd.Series:
    return found[found["number"] == "llm-qbench-align/weight-only-asym-alignment/2"].iloc[0]


def table(*rows: dict) -> pd.DataFrame:
    """Rows of a planted table, mapped as the shipped ones are."""
    base = dict(source="OmniQuant paper (arXiv:2308.13137)", table="planted", model="LLaMA-2-7B", method="RTN",
                scheme="w4a16", calib="none", dataset="wikitext2", metric="ppl")  # fmt: skip
    full = [base | row for row in rows]
    frame = pd.DataFrame(full, dtype=object).rename(columns={"value": "printed"})
    frame = frame.assign(value=frame["printed"].astype(float))
    return floating_point(translate(frame, names()))


# The file and its schema


@pytest.mark.parametrize(
    ("line", "field", "found"),
    [
        (GOOD.replace("5.83", "5,83"), "beyond the last column", "83"),
        (GOOD.replace("5.83", "5.8x"), "value", "5.8x"),
        (GOOD.replace("5.83", ""), "value", "''"),
        (GOOD.replace("GPTQ,", ","), "method", "''"),
        (GOOD.rpartition(",")[0], "value", "None"),
    ],
)
def test_a_malformed_row_is_refused_by_line_and_field(tmp_path, line, field, found):
    path = tmp_path / "numbers.csv"
    path.write_text("\n".join([",".join(COLUMNS), GOOD, line, GOOD]) + "\n")
    with pytest.raises(ValueError, match=rf"line 3: {field} is .*{re.escape(found)}"):
        read(path)


def test_other_columns_are_refused(tmp_path):
    path = tmp_path / "numbers.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="line 1: columns are"):
        read(path)


def test_diverged_values_stay_not_a_number():
    frame = read(FOLDER / "numbers.csv")
    diverged = frame[frame["value"].isna()]
    assert len(diverged) > 0
    assert set(diverged["printed"].str.lower()) == {"nan"}
    assert np.isinf(frame["value"]).sum() == (frame["printed"].str.lower() == "inf").sum()


def test_names_of_numbers_are_unique():
    assert load()["number"].is_unique
    assert published("llm-qbench/impact-of-calibration-data/17")["method"] == "OmniQuant"


# What words are here


def test_every_number_is_mapped_or_has_a_reason():
    frame = load()
    mapped = frame["why_not"].isna()
    assert not frame["why_not"].str.contains("no rule", na=False).any()
    assert (frame.loc[~mapped, "why_not"].str.len() > 0).all()
    for column in ("model_id", "our_model", "our_algo", "our_scheme", "our_metric"):
        assert frame.loc[mapped, column].notna().all()
    assert (frame.loc[mapped, "fp"].notna() | ~frame.loc[mapped, "our_metric"].str.startswith("ppl/")).all()


def test_an_unknown_word_has_a_reason_too():
    row = table({"model": "GPT-9", "value": "5.0"}).iloc[0]
    assert row["why_not"] == "names.toml has no rule of models for 'GPT-9'"


def covering_settings() -> list:
    """Mapped numbers in which every algorithm, scheme, calibration set and metric that is named occurs."""
    frame = load()
    found, seen = [], set()
    for row in frame[frame["why_not"].isna()].itertuples():
        named = {("algo", row.our_algo), ("scheme", row.our_scheme), ("metric", row.our_metric)}
        named |= {("calib", row.our_calib, row.our_samples)}
        if named - seen:
            found.append(row)
        seen |= named
    return found


def test_every_named_algorithm_scheme_calibration_and_metric_exists_here():
    """Its command composes, to the labels that records would have."""
    jobs = Jobs()
    for row in covering_settings():
        words = [w for w in shlex.split(command(row))[1:] if w != "calib=..." and not w.startswith("model")]
        job = jobs.job(COMPOSER.config(words))
        assert (job.labels["algo"], job.labels["scheme"]) == (row.our_algo, row.our_scheme), command(row)
        assert (job.calib is None) == (row.our_algo in names().data_free), row.our_algo
        if row.our_calib:
            assert job.labels["calib"] == row.our_calib
            assert f"{job.calib.n_samples}x{job.calib.seq_len}" == row.our_samples


def test_every_named_metric_is_of_a_text_or_task_here():
    from qbench.data.corpora import CORPORA
    from qbench.sweep.shipped import CONF

    tasks = " ".join(path.read_text() for path in (CONF / "eval").glob("*.yaml"))
    for metric in load()["our_metric"].dropna().unique():
        kind, _, name = metric.partition("/")
        assert name in CORPORA if kind == "ppl" else re.search(rf"\b{name}\b", tasks), metric


def test_architectures_said_to_be_unsupported_are():
    reasons = {
        rule.why for rule in names().rules["models"] if rule.why and rule.why.startswith("architecture")
    }
    assert not {reason.split()[1] for reason in reasons} & set(DESCRIBED)


def test_the_protocol_of_c4_is_that_of_the_floating_point_value():
    """7.26 for LLaMA-2-7B is `c4`, 6.97 (7.08 for LLaMA-7B) is `c4_old`; half a unit of rounding."""
    known = {
        ("Llama-2-7b-hf", "ppl/c4"): 7.26,
        ("Llama-2-7b-hf", "ppl/c4_old"): 6.97,
        ("llama-7b", "ppl/c4_old"): 7.08,
    }
    frame = load()
    base = frame[(frame["our_algo"] == "fp") & frame["our_metric"].isin(["ppl/c4", "ppl/c4_old"])]
    checked = 0
    for row in base.itertuples():
        if (row.our_model, row.our_metric) in known:
            assert row.value == pytest.approx(known[row.our_model, row.our_metric], abs=0.005)
            checked += 1
    assert checked >= len(known)


def test_sizes_of_test_sets_are_those_of_which_values_are_whole_shares():
    frame = load()
    small = frame[
        (frame["source_name"] == "qllm-eval")
        & (frame["size"] < 5000)
        & ~frame["metric"].isin(["acc_drop", "MC2"])
    ]
    assert len(small) > 0
    for name, values in small.groupby("dataset"):
        unit = 100 if values["value"].max() > 1 else 1
        # As many digits as the longest value has: trailing zeros are not printed.
        digits = values["printed"].str.partition(".")[2].str.len().max()
        right = values["value"] / unit * values["size"]
        assert (
            (right - right.round()).abs() <= 0.5 * 10.0**-digits / unit * values["size"] * (1 + 1e-6)
        ).all(), name


def test_a_rule_must_say_one_thing_and_look_where_it_may():
    text = {"data_free": [], "sources": {}, "sizes": {}, "commands": {}}
    with pytest.raises(ValidationError, match="either ours"):
        Names.model_validate(text | {"rules": {"models": [{"model": "x"}]}})
    with pytest.raises(ValidationError, match="looks at dataset"):
        Names.model_validate(text | {"rules": {"models": [{"dataset": "x", "ours": "y"}]}})


# Beside our runs


def test_a_run_that_equals_a_published_number_is_within_and_one_20_percent_off_is_not():
    same, off = (of_gptq_w3(beside(cells({"value": v}), ALIGN)) for v in (6.318, 6.318 * 1.2))
    assert same["within"] is True
    assert same["difference"] == 0
    assert same["fingerprint"] == CELL["fingerprint"]
    assert off["within"] is False
    assert off["difference"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "Llama-2-13b-hf"}, {"model": "micro-llama"}, {"algo": "awq"}, {"scheme": "w3a16g128-wsym"},
        {"metric": "ppl/c4"}, {"metric": "ppl/c4_old"}, {"calib": "wikitext2"}, {"calib": None}, {"samples": "128x512"},
        {"protocol": "[512 x 32]"}, {"protocol": "[2048 x 16]"}, {"protocol": "[2048 @abcdef]"},
    ],
)  # fmt: skip
def test_a_run_of_something_else_never_stands_beside(change):
    assert of_gptq_w3(beside(cells(change), ALIGN))["ours"] is None


def test_the_same_run_with_its_protocol_and_samples_does():
    found = of_gptq_w3(beside(cells({"protocol": "[2048]", "samples": "128x2048"}), ALIGN))
    assert found["within"] is True


def test_of_several_runs_the_middle_one_counts():
    seeds = [{"value": v, "fingerprint": f"{v}"} for v in (6.5, 6.3, 6.4)]
    assert of_gptq_w3(beside(cells(*seeds), ALIGN))["ours"] == 6.4


def test_runs_with_other_hyperparameters_are_no_run_of_what_was_published():
    """Which of them the paper's was is not known, and their middle is nobody's."""
    seeds = [{"value": v, "fingerprint": f"{v}", "recipe": "damp 0.01"} for v in (6.5, 6.3, 6.4)]
    assert of_gptq_w3(beside(cells(*seeds), ALIGN))["ours"] == 6.4
    seeds[0]["recipe"] = "damp 0.1"
    assert of_gptq_w3(beside(cells(*seeds), ALIGN))["ours"] is None


def test_a_caveat_is_shown_but_not_judged():
    number = "omniquant/table-1/95"
    row = published(number)
    assert row["caveat"] == UNSTATED
    cell = {
        "model": row["our_model"],
        "algo": row["our_algo"],
        "scheme": row["our_scheme"],
        "value": row["value"],
    }
    found = beside(cells(cell), "omniquant", "Table 1").set_index("number").loc[number]
    assert found["difference"] == 0
    assert found["within"] is None


def test_an_accuracy_is_compared_in_our_unit_by_its_binomial_error():
    row = load().query("source_name == 'slim-llm' and dataset == 'PIQA' and method == 'FP16'").iloc[0]
    error = math.sqrt(row["our_value"] * (1 - row["our_value"]) / 1838)
    base = {"model": row["our_model"], "algo": "fp", "scheme": "w16a16", "calib": None, "metric": "acc/piqa"}
    close, far = ({**base, "value": row["our_value"] + k * error} for k in (1.9, 2.5))
    for cell, within in ((close, True), (far, False)):
        found = beside(cells(cell), "slim-llm", "Table 3").set_index("number").loc[row["number"]]
        assert found["within"] is within
        assert found["difference"] == pytest.approx(cell["value"] - row["value"] / 100)


def test_unknown_sources_and_tables_are_named():
    with pytest.raises(ValueError, match="no source 'x' is known; known: llm-qbench"):
        beside(cells({}), "x")
    with pytest.raises(ValueError, match="has no table 'x'; known: 'weight-only asym alignment'"):
        beside(cells({}), ALIGN, "x")


def test_noise_is_the_spread_of_sources_in_parts_of_the_damage():
    """Two sources with damage d and a ratio r have a standard deviation of ln(r) / sqrt(2) of the logarithm."""
    gptq = "IST-DASLab/gptq README"
    frame = table(
        {"method": "FP16", "value": "5.000"}, {"method": "FP16", "value": "5.010", "source": gptq},
        {"value": "6.000"}, {"value": "6.300", "source": gptq},
        {"scheme": "w3a16", "value": "9.000"}, {"scheme": "w3a16", "value": "9.000", "source": gptq},  # a copy
    )  # fmt: skip
    found = noise(frame)
    damage = (math.log(6.0 / 5.0) + math.log(6.3 / 5.01)) / 2
    assert found.floor == pytest.approx(math.log(5.01 / 5) / math.sqrt(2))
    assert found.share == pytest.approx(math.log(6.3 / 6) / math.sqrt(2) / damage)


def test_tolerance_grows_with_damage_and_predicts_the_spread_between_gpus():
    """GPTQ's author ran three OPT models at 4 bits on three GPUs, on PTB; the damage is WikiText-2's (OmniQuant)."""
    frame = load()
    known = noise(frame)
    assert (
        Noise(0.002, 0.1).tolerance(-0.1)
        == Noise(0.002, 0.1).tolerance(0.0)
        < known.tolerance(0.1)
        < known.tolerance(1.0)
    )
    runs = frame[frame["source_name"] == "gptq-issue"].groupby("our_model")["value"]
    ppl = frame[(frame["source_name"] == "omniquant") & (frame["table"] == "Table A20")]
    for model, value in runs:
        gptq = ppl[
            (ppl["our_model"] == model) & (ppl["our_algo"] == "gptq") & (ppl["our_scheme"] == "w4a16")
        ].iloc[0]
        assert value.max() / value.min() - 1 <= known.tolerance(math.log(gptq["value"] / gptq["fp"])), model


# What cannot be true

FP = {"method": "FP16", "scheme": "fp16", "value": "5.47"}


def below(value: str, **more: str) -> str:
    found = implausible.below_floating_point(table(FP, {"value": value, **more}))
    return found.iloc[0] if len(found) else ""


def test_a_perplexity_below_floating_point_is_impossible_or_suspicious_by_how_far():
    assert below("5.00").startswith("impossible: 5 is below floating point, 5.47")
    assert below("5.43").startswith("suspicious")
    assert below("5.47") == below("5.48") == below("5.5") == below("5.4") * 0 == ""
    # What an earlier table gives is no proof: protocols differ.
    assert below("5.00", table="another").startswith("suspicious")


def test_one_row_with_two_values_is_found():
    found = implausible.conflicts(
        table({"value": "6.0"}, {"value": "6.1"}, {"value": "7", "scheme": "w3a16"})
    )
    assert list(found) == ["impossible: one row has several values, 6.0, 6.1"] * 2
    assert implausible.conflicts(table({"value": "6.0"}, {"value": "6.0"})).empty


def test_rows_that_stand_twice_are_found():
    assert len(implausible.repeats(table({"value": "6.0"}, {"value": "6.0"}, {"value": "6.1"}))) == 2
    assert implausible.repeats(table({"value": "6.0"}, {"value": "6.1"})).empty


@pytest.mark.parametrize(
    ("unit", "good", "bad"),
    [("percent", "67.3", "4967"), ("shares", "0.61", "61.0"), ("percent", "50", "-1")],
)
def test_accuracies_out_of_range_are_found(unit, good, bad):
    acc = {
        "metric": "accuracy",
        "dataset": "arc-c",
        "source": "thu-nics/qllm-eval visualization assets (arXiv:2402.18158)",
    }
    fine = [acc | {"value": good, "scheme": f"W{i}"} for i in range(5)]
    assert implausible.out_of_range(table(*fine)).empty
    found = implausible.out_of_range(table(*fine, acc | {"value": bad, "scheme": "W9"}))
    assert list(found) == [f"impossible: {bad} is no accuracy"]


def test_a_perplexity_below_one_is_found():
    assert list(implausible.out_of_range(table({"value": "0.9"}, {"value": "5"}))) == [
        "impossible: 0.9 is below 1, which no perplexity is"
    ]


def grid(**rows: list[str]) -> pd.DataFrame:
    sets = ("wikitext2", "c4", "ptb", "x")
    return table(*(
        {"scheme": scheme, "dataset": name, "value": value}
        for scheme, values in rows.items() for name, value in zip(sets, values, strict=False)
    ))  # fmt: skip


def test_rows_equal_in_all_values_are_found():
    others = {f"w{i}a8": [f"{i}.1", f"{i}.2", f"{i}.3"] for i in range(6, 16)}
    found = implausible.twins(grid(w4a16=["6.1", "7.2", "30.3"], w3a16=["6.1", "7.2", "30.3"], **others))
    assert len(found) == 6
    assert found.iloc[0] == "suspicious: all 3 values are those of LLaMA-2-7B RTN w3a16"
    assert implausible.twins(grid(w4a16=["6.1", "7.2", "30.3"], w3a16=["6.1", "7.2", "30.4"], **others)).empty
    assert implausible.twins(grid(w4a16=["6.1", "7.2"], w3a16=["6.1", "7.2"], **others)).empty, (
        "two may be chance"
    )
    broken = ["0.0", "1.0", "100"]
    assert implausible.twins(grid(w4a16=broken, w3a16=broken, **others)).empty, "what is broken is alike"


def test_fewer_bits_that_do_better_are_suspicious():
    def of(*values: str) -> pd.Series:
        return implausible.fewer_bits_better(
            table(*({"scheme": f"w{b}a16", "value": v} for b, v in zip((4, 3), values, strict=True))), SURE
        )

    assert list(of("6.3", "5.9")) == ["suspicious: 5.9 is better than 6.3 with 4 bits"]
    assert of("5.9", "6.3").empty
    assert of("6.3", "6.28").empty, "a little is chance"


def test_better_accuracy_with_fewer_bits_counts_only_beyond_chance():
    source = "thu-nics/qllm-eval visualization assets (arXiv:2402.18158)"
    acc = {"source": source, "dataset": "arc-c", "metric": "accuracy"}
    sigma = 100 * math.sqrt(2 * 0.5 * 0.5 / 295)
    for change, n in ((5 * sigma, 1), (2 * sigma, 0)):
        rows = table(
            acc | {"scheme": "W8", "value": "50"}, acc | {"scheme": "W3", "value": f"{50 + change:.2f}"}
        )
        assert len(implausible.fewer_bits_better(rows, SURE)) == n


def test_sources_that_disagree_where_nothing_is_random_are_found():
    sources = ("OmniQuant paper (arXiv:2308.13137)", "AWQ paper (arXiv:2306.00978)", "IST-DASLab/gptq README")

    def of(method: str, *values: str) -> int:
        rows = ({"source": s, "method": method, "value": v} for s, v in zip(sources, values, strict=True))
        return len(implausible.disagreements(table(*rows), SURE))

    assert of("RTN", "6.11", "6.99", "6.11") == 1, "the majority is not told"
    assert of("RTN", "6.11", "6.12", "6.11") == 0
    assert of("GPTQ", "6.11", "6.99", "6.11") == 0, "a calibrated method is random"


def test_a_drop_that_is_not_what_its_accuracies_give_is_found():
    source = "thu-nics/qllm-eval visualization assets (arXiv:2402.18158)"

    def of(drop: str) -> pd.Series:
        rows = {"acc_drop": drop, "acc_after": "39.67", "acc_before": "54.55"}
        return implausible.drops(
            table(*({"source": source, "metric": m, "value": v} for m, v in rows.items()))
        )

    assert of("0.27").empty
    assert list(of("0.37")) == ["impossible: drop 0.37 is not 1 - 39.67 / 54.55"]


def test_the_shipped_numbers_flags_are_few_and_name_what_is_known():
    frame = load()
    flagged = frame[frame["flags"] != ""]
    assert len(flagged) < 0.02 * len(frame)
    assert "is no accuracy" in published("qllm-eval/emergent-mmlu-calib-wa/7")["flags"]
    assert "6.11 in omniquant" in published("quarot/table-7/1")["flags"]


# The ledger


def record(**labels: object) -> dict:
    name = {"model": "Llama-2-7b-hf", "algo": "gptq", "scheme": "w3a16g128", "calib": "c4"} | labels
    evaluation = {"ppl": ["wikitext2"], "tasks": [], "seq_len": 2048, "max_windows": None, "limit": None}
    return {
        "status": "done", "fingerprint": "f" * 16, "labels": name,
        "metrics": {"ppl/wikitext2": 6.318, "ppl/wikitext2_stderr": 0.1},
        "identity": {
            "algorithm": {"name": "GPTQ", "damp": 0.01}, "evaluation": evaluation,
            "calib": {"name": "c4", "n_samples": 128, "seq_len": 2048},
        },
    }  # fmt: skip


def test_the_ledger_has_every_number_and_says_what_became_of_it():
    found = ledger([record()])
    assert list(found["number"]) == list(load()["number"])
    assert of_gptq_w3(found)["state"] == "within"
    assert of_gptq_w3(found)["fingerprint"] == "f" * 16
    assert found.loc[found["state"].isin(["not mapped", "not run", "not judged"]), "why"].notna().all()
    by_source = summary(found).set_index("source")
    assert by_source.loc["all", "numbers"] == len(found)
    assert by_source.loc[ALIGN, "within"] == 2, "the original and LLMC's are one thing here"


def test_a_shorter_evaluation_is_in_no_ledger():
    short = record()
    short["identity"]["evaluation"] |= {"seq_len": 512, "max_windows": 32}
    failed = record() | {"status": "failed"}
    assert ledger([short, failed])["fingerprint"].isna().all()


def test_the_ledger_is_shown_and_written_alike_each_time(tmp_path):
    found = ledger([])
    first, second = ([p.read_bytes() for p in write(found, tmp_path / name)] for name in "ab")
    assert first == second
    text = io.StringIO()
    show(found, Console(file=text, width=120))
    assert "4967 is no accuracy" in text.getvalue()


def test_matching_changes_nothing_that_is_published():
    frame = load()
    kept = [*COLUMNS, "printed", "number"]
    pd.testing.assert_frame_equal(match(frame, cells({}))[kept], frame[kept])
