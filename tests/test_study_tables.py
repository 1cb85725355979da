"""The tables of a study: what is marked, noted and left out, and that they are the same wherever records are read."""

import io
from dataclasses import replace
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from qbench.report.cells import Cells
from qbench.report.marked import Made, show, tex, write
from qbench.report.page.content import Cell, PageTable
from qbench.report.results import compared, results_table
from qbench.report.retention import kept, polygons, retention, retention_table, tasks
from qbench.report.significance import holm
from qbench.report.spec import FigureSpec, TableKind, TableSpec
from qbench.report.study import tables as study_tables
from qbench.report.wins import duels
from qbench.track.records import in_order
from qbench.track.source import source_of
from tests.synthetic import Grid, Memory, failed, made, none
from tests.test_source import NAME, fill

ROWS = ("model", "scheme", "algo")
TEXT = "ppl/stdlib_docs"


def cells(jobs, rows=ROWS, columns=(), metrics=("ppl/*", "acc/*")):
    return Cells.of(in_order(record for record, _ in jobs), Memory(jobs), rows, columns, metrics)


def table(jobs, **spec):
    about = TableSpec("T", **spec)
    return results_table(cells(jobs, about.rows, about.columns, about.metrics), about, "t")


def study(jobs, algorithms=(), **specs):
    return study_tables(specs, in_order(record for record, _ in jobs), Memory(jobs), algorithms)


def marks(made_table, label="algo", metric=TEXT):
    columns = made_table.table.columns
    at, of = columns.index(metric), columns.index(label)
    return {row[of].text: row[at].mark for row in made_table.table.rows}


def harm(**by_algo):
    return lambda labels, metric: by_algo.get(labels["algo"], 0.0)


# Results: marks and notes


def test_the_best_what_ties_with_it_and_what_is_surely_worse_are_told_apart():
    found = table(made(Grid(), harm(rtn=0.3)))
    assert marks(found) | {"gptq": "", "awq": ""} == {"fp": "", "rtn": "worse", "gptq": "", "awq": ""}
    assert sorted(marks(found)[algo] for algo in ("gptq", "awq")) == ["best", "tie"]


def test_of_equals_the_first_is_best_and_the_others_tie():
    found = table(made(Grid(noise=0.0), none))
    assert marks(found) == {"fp": "", "rtn": "best", "gptq": "tie", "awq": "tie"}
    assert set(found.numbers.loc[found.numbers["tie"].eq(True), "p"]) == {1.0}


def test_floating_point_costs_and_what_stands_alone_are_not_marked():
    jobs = made(Grid(algos=("gptq", "awq"), schemes=("w4a16", "w3a16"))) + made(
        Grid(schemes=("w2a16",), algos=("rtn",), floating=False)
    )
    found = table(jobs, metrics=("ppl/*", "model_mb"))
    for row in found.table.rows:
        labels = [cell.text for cell in row[:3]]
        assert bool(row[3].mark) == (labels[2] != "fp" and labels[1] != "w2a16"), labels
        assert not row[4].mark


def test_accuracy_is_best_when_highest():
    found = table(made(Grid(tasks={"piqa": 400}), harm(rtn=2.0)), metrics=("acc/*",))
    assert marks(found, metric="acc/piqa")["rtn"] == "worse"


def test_the_note_says_how_many_pairs_are_corrected_for():
    found = table(made(Grid(schemes=("w4a16", "w3a16"), texts={"stdlib_docs": 24, "c4": 24})))
    assert "all 12 pairs" in found.table.notes[0]  # three recipes, two schemes, two texts


def test_least_differences_that_are_unlike_are_a_range():
    def noisy(labels, metric):
        return 0.0

    alike = made(Grid(schemes=("w4a16",), noise=0.01), noisy) + made(
        Grid(schemes=("w3a16",), noise=0.01, floating=False), noisy
    )
    unlike = made(Grid(schemes=("w4a16",), noise=0.01), noisy) + made(
        Grid(schemes=("w3a16",), noise=0.1, floating=False), noisy
    )
    assert " to " not in table(alike).table.notes[1]
    assert " to " in table(unlike).table.notes[1]


def test_failed_jobs_are_named_with_their_reason():
    jobs = made(Grid(algos=("rtn", "gptq", "awq"), seeds=(0, 1, 2)))
    jobs = [failed(*job[:1]) if job[0]["labels"]["algo"] == "gptq" else job for job in jobs]
    note = table(jobs).table.notes[-1]
    assert note.startswith("Failed: micro-llama gptq w3a16g128 stdlib_docs seed 0 (LinAlgError: not positive")
    four = [*jobs, failed(made(Grid(algos=("quip",), floating=False))[0][0])]
    assert table(four).table.notes[-1].endswith("and 1 more.")


def test_recipes_that_were_asked_other_items_are_not_compared_and_this_is_said():
    jobs = made(Grid(floating=False))
    jobs[2] = (jobs[2][0], jobs[2][1][:-1])
    found = table(jobs)
    assert set(marks(found).values()) == {""}
    assert found.table.notes == (f"Not compared, for want of equal windows or documents: {TEXT}.",)


def of_another_text(job, text="stdlib_docs"):
    record, samples = job
    return record | {"data": record["data"] | {f"eval/{text}": {"sha256": "0" * 64}}}, samples


def test_recipes_of_another_text_of_that_name_are_not_compared():
    """Items are numbered, so that windows of two texts have the same names."""
    jobs = made(Grid(floating=False))
    found = table([*jobs[:2], of_another_text(jobs[2])])
    assert set(marks(found).values()) == {""}
    assert found.table.notes == (f"Not compared, for want of equal windows or documents: {TEXT}.",)
    with pytest.raises(ValueError, match="no two recipes differ"):
        duels(cells([jobs[0], of_another_text(jobs[1])]), "algo")


def test_what_kept_no_items_is_named():
    jobs = made(Grid(floating=False))
    found = table([*jobs[:2], (jobs[2][0], [])])
    assert marks(found)["awq"] == ""
    assert found.table.notes[-1] == (
        f"Not compared, for want of windows or documents that all draws kept: {TEXT} of micro-llama w3a16g128 awq."
    )


def test_a_recipe_without_calibration_data_is_compared_with_those_of_every_set():
    jobs = made(Grid(algos=("rtn", "gptq"), calibs=("stdlib_docs", "random")), harm(gptq=0.3))
    about = TableSpec("T", rows=(*ROWS, "calib"), within=("model", "scheme", "calib"))
    found = results_table(cells(jobs, about.rows), about, "t")
    assert marks(found) == {"fp": "", "rtn": "best", "gptq": "worse"}
    assert "compared with those of every set" in found.table.notes[0]
    assert "all 2 pairs" in found.table.notes[0]
    other_way = results_table(
        cells(made(Grid(algos=("rtn", "gptq"), calibs=("stdlib_docs", "random")), harm(rtn=0.3)), about.rows),
        about,
        "t",
    )
    assert marks(other_way) == {"fp": "", "rtn": "worse", "gptq": "best"}


def test_a_table_without_its_metrics_says_so():
    with pytest.raises(ValueError, match=r"no record of these has a metric like acc/\*"):
        table(made(Grid()), metrics=("acc/*",))


# Wins


def test_an_algorithm_without_calibration_data_meets_those_of_every_set():
    jobs = made(Grid(algos=("rtn", "hqq", "gptq", "awq"), calibs=("stdlib_docs", "random")), harm(rtn=0.5))
    found = duels(cells(jobs, (*ROWS, "calib")), "algo")
    met = found.groupby(["one", "other"]).size().to_dict()
    # Once each where neither reads data; once in each set's context where one does.
    assert met == {
        ("rtn", "hqq"): 1, ("rtn", "gptq"): 2, ("rtn", "awq"): 2, ("hqq", "gptq"): 2, ("hqq", "awq"): 2, ("gptq", "awq"): 2,
    }  # fmt: skip
    assert set(found.loc[found["other"] == "gptq", "context"]) == {
        "micro-llama w3a16g128 stdlib_docs", "micro-llama w3a16g128 random",
    }  # fmt: skip
    against_rtn = found[found["one"] == "rtn"]
    assert (against_rtn["winner"] == against_rtn["other"]).all()


def test_sets_are_not_compared_across_algorithms_nor_numbers_of_samples():
    grid = Grid(algos=("rtn", "gptq", "awq"), calibs=("stdlib_docs", "random"))
    more = replace(grid, algos=("gptq",), floating=False, identity={"calib.n_samples": 64})
    found = duels(cells(made(grid) + made(more), (*ROWS, "calib")), "calib")
    assert len(found) == 3  # gptq with 16 and with 64 samples, awq
    assert set(found["one"]) == {"stdlib_docs"}


def test_windows_that_two_protocols_share_are_compared_once():
    """The first 12 windows of a text may be the same text whether 12 or 24 are read."""
    grid = Grid(floating=False)
    short = replace(grid, texts={"stdlib_docs": 12}, identity={"evaluation.max_windows": 12})
    found = duels(cells(made(grid) + made(short)), "algo")
    assert set(found["metric"]) == {f"{TEXT} [256 x 24]"}
    assert len(found) == 3


def test_sets_of_files_meet_whatever_says_which_text_they_are():
    sets = [
        made(Grid(algos=("gptq",), calibs=(name,), floating=False, identity={"calib.path": f"{name}.txt"}))
        for name in ("one", "two")
    ]
    assert len(duels(cells([*sets[0], *sets[1]], (*ROWS, "calib")), "calib")) == 1


def test_hyperparameters_belong_to_their_algorithm():
    damped = [made(Grid(algos=("gptq",), hyper={"damp": d}, floating=d < 0.05)) for d in (0.01, 0.1)]
    found = duels(cells([*damped[0], *damped[1], *made(Grid(algos=("awq",), floating=False))]), "algo")
    assert [{row["one"], row["other"]} for _, row in found.iterrows()] == [{"gptq", "awq"}] * 2
    assert {context.rpartition(" ")[2] for context in found["context"]} == {"damp=0.01", "damp=0.1"}


def test_what_is_compared_need_not_be_among_the_labels_of_rows():
    jobs = made(Grid(algos=("gptq", "awq"), calibs=("stdlib_docs", "random"), seeds=(0, 1)))
    found, lacking = study(jobs, w=TableSpec("W", "wins", factor="calib"))
    assert not lacking
    assert len(found["w"].numbers) == 2


@pytest.mark.parametrize(("factor", "pairs"), [("algo", 4), ("scheme", 12), ("wbits", 4), ("group_size", 4)])
@pytest.mark.parametrize("rows", [("model",), ROWS, ("model", "algo", "wbits", "group_size")], ids=len)
def test_recipes_meet_where_all_but_one_thing_is_the_same_whatever_rows_say(rows, factor, pairs):
    schemes = ("w4a16g128", "w3a16g128", "w4a16g64", "w3a16g64")
    jobs = made(Grid(algos=("gptq", "awq"), schemes=schemes))
    assert len(duels(cells(jobs, rows), factor)) == pairs


def test_other_revisions_of_a_model_do_not_meet():
    other = made(Grid(algos=("awq",), identity={"model.revision": "v2"}))
    with pytest.raises(ValueError, match="no two recipes differ in algo alone"):
        duels(cells(made(Grid(algos=("gptq",))) + other), "algo")


# Retention


def results(accuracies, chance=0.25, n=2000, seed=0):
    """Of a quantized and a floating-point model, on the same documents."""
    jobs = made(Grid(algos=("rtn",), tasks={"mmlu": n}, seed=seed), harm(rtn=accuracies))
    found = cells(jobs, metrics=("acc/*",))
    fp, rtn = (found.result(recipe, "acc/mmlu") for recipe in found.recipes)
    return rtn, fp, chance


def test_the_error_of_a_share_is_that_of_resampled_documents():
    mine, floating, chance = results(0.8)
    share = kept(mine, floating, chance)
    rng, n = np.random.default_rng(0), len(mine.draws.items)
    drawn = rng.integers(0, n, (4000, n))
    above = [side.draws.values[0][drawn].mean(axis=1) - chance for side in (mine, floating)]
    # The standard deviation of 4000 resamples is known to 1/sqrt(8000); first order in the items adds as much.
    assert share.stderr == pytest.approx((above[0] / above[1]).std(ddof=1), rel=4 / np.sqrt(8000))


def test_a_share_is_not_below_nothing_nor_told_of_a_model_that_guesses():
    mine, floating, _ = results(5.0)
    assert kept(mine, floating, 0.45).value == 0.0
    assert kept(mine, floating, floating.value) is None
    assert kept(floating, floating, 0.25).value == 1.0
    assert kept(floating, floating, 0.25).stderr == 0.0


def test_shares_are_of_the_very_same_model_in_floating_point():
    jobs = made(Grid(models=("a", "b"), algos=("rtn",), tasks={"piqa": 200}))
    jobs += made(
        Grid(models=("a",), algos=("gptq",), tasks={"piqa": 200}, identity={"model.revision": "v2"})
    )[1:]
    found = retention_table(cells(jobs), TableSpec("T", "retention"), "t")
    by = {record["fingerprint"]: record for record, _ in jobs}
    assert len(found.numbers) == 2  # the second revision was never run in floating point
    for _, row in found.numbers.iterrows():
        mine, floating = (by[name] for name in row["records"].split())
        assert floating["labels"] | {"algo": "rtn"} == mine["labels"] | {
            key: floating["labels"][key] for key in ("scheme", "wbits", "group_size")
        }
        share = (mine["metrics"]["acc/piqa"] - 0.5) / (floating["metrics"]["acc/piqa"] - 0.5)
        assert row["value"] == pytest.approx(max(share, 0))
    assert (
        "Left out: acc/piqa (a in floating point has no such result of the same text)." in found.table.notes
    )


def test_shares_are_of_floating_point_on_the_same_text():
    jobs = made(Grid(algos=("rtn", "gptq"), tasks={"piqa": 200}))
    jobs[2] = of_another_text(jobs[2], "piqa")
    found = retention_table(cells(jobs), TableSpec("T", "retention"), "t")
    assert found.numbers["algo"].tolist() == ["rtn"]
    assert "Left out: acc/piqa (micro-llama in floating point has no such result of the same text)." in (
        found.table.notes
    )


def test_polygons_and_axes_of_a_radar_are_told_apart_by_all_that_differs():
    grid = Grid(algos=("rtn", "gptq"), calibs=("c4", "random"), tasks={"piqa": 200, "boolq": 200})
    jobs = made(grid) + made(replace(grid, algos=("gptq",), floating=False, hyper={"damp": 0.1}))
    for record, samples in jobs:
        record["metrics"]["acc_norm/piqa"] = record["metrics"]["acc/piqa"]
        samples += [row | {"metric": "acc_norm/piqa"} for row in samples if row["metric"] == "acc/piqa"]
    mine = cells(jobs, (*ROWS, "calib"), metrics=("acc*/*",))
    found, _ = retention(mine)
    shown = pd.DataFrame({"scheme": polygons(found, mine.names), "task": tasks(found["metric"])})
    assert not shown.duplicated().any()
    assert shown["scheme"].nunique() == 5  # gptq by two sets and two settings, rtn
    assert set(shown["task"]) == {"acc/piqa", "acc_norm/piqa", "boolq"}


def test_what_cannot_be_told_of_a_task_is_said_and_perplexity_is_no_task():
    jobs = made(Grid(algos=("rtn",), tasks={"piqa": 200, "unheard_of": 50}))
    notes = " ".join(retention_table(cells(jobs), TableSpec("T", "retention"), "t").table.notes)
    assert "unheard_of (what guessing scores is not known)" in notes
    assert "stdlib_docs" not in notes
    with pytest.raises(ValueError, match="no share can be told"):
        retention_table(cells(made(Grid())), TableSpec("T", "retention"), "t")


# Other tables


def test_spread_is_taken_apart_within_one_protocol():
    jobs = made(Grid(algos=("rtn", "gptq", "awq"), schemes=("w4a16", "w3a16")))
    shorter = made(
        Grid(algos=("rtn", "gptq", "awq"), schemes=("w4a16", "w3a16"), texts={"stdlib_docs": 8}, seed=1, floating=False,
             identity={"evaluation.max_windows": 8})
    )  # fmt: skip
    found, _ = study(jobs + shorter, v=TableSpec("V", "variance"))
    alone, _ = study(jobs, v=TableSpec("V", "variance"))
    both = found["v"].numbers
    mine = both[both["metric"] == f"{TEXT} [256 x 24]"].reset_index(drop=True)
    np.testing.assert_array_equal(mine["share"], alone["v"].numbers["share"])


def test_constant_metrics_leave_correlations_empty():
    jobs = made(Grid(schemes=("w4a16", "w3a16"), tasks={"piqa": 50}))
    for record, _ in jobs:
        record["metrics"]["acc/piqa"] = 0.5
    found, lacking = study(
        jobs, s=TableSpec("S", "spearman", metrics=("ppl/*", "acc/*")), p=TableSpec("P", "pearson")
    )
    assert not lacking
    assert not any("nan" in cell.text for one in found.values() for row in one.table.rows for cell in row)


def test_what_does_not_vary_is_said_below_the_shares():
    found, _ = study(made(Grid(schemes=("w4a16", "w3a16"))), v=TableSpec("V", "variance"))
    shares = found["v"].table
    assert "model (one level: micro-llama)" in shares.notes[0]
    assert {"algo", "scheme", "shared", "residual"} <= {row[0].text for row in shares.rows}
    assert not any("nan" in cell.text for row in shares.rows for cell in row)


def test_stars_of_a_spread_are_corrected_for_the_whole_table():
    grid = Grid(
        schemes=("w4a16", "w3a16"), texts={"stdlib_docs": 24, "c4": 24}, calibs=("c4", "random"), seeds=(0, 1)
    )
    found, _ = study(made(grid), v=TableSpec("V", "variance"))
    numbers, raw = found["v"].numbers, []
    for _, part in numbers.groupby("metric", sort=False):
        rest = part.loc[part["term"] == "residual", "df"].item()
        raw += stats.f.sf(part["F"], part["df"], rest).tolist()
    np.testing.assert_allclose(numbers["p"], holm(raw))


def test_other_hyperparameters_are_a_factor_of_the_spread():
    grid = Grid(schemes=("w4a16", "w3a16"))
    jobs = made(grid) + made(replace(grid, algos=("gptq", "awq"), floating=False, hyper={"damp": 0.1}))
    found, _ = study(jobs, v=TableSpec("V", "variance"))
    assert "setting" in {row[0].text for row in found["v"].table.rows}
    assert "hyperparameters" in found["v"].table.notes[0]
    alone, _ = study(made(grid), v=TableSpec("V", "variance"))
    assert "setting" not in {row[0].text for row in alone["v"].table.rows}


# Studies


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (
            {"kind": "matrix", "rows": ["model"]},
            "rows is nothing that kind matrix reads; it reads title, kind, metrics",
        ),
        ({"kind": "matrix", "published": "x"}, "published is nothing"),
        ({"kind": "retention", "within": ["model"]}, "within is nothing that kind retention reads"),
        ({"factor": "algo"}, "factor is nothing that kind results reads"),
        ({"within": None}, r"within has no value; give one, \[\] for none, or leave the key out"),
    ],
)
def test_what_a_table_does_not_read_is_refused(about, message):
    with pytest.raises(ValueError, match=message):
        TableSpec.of({"title": "T"} | about)


def test_what_a_figure_does_not_read_is_refused_and_a_stated_cost_is_read():
    with pytest.raises(ValueError, match="x is nothing that kind radar reads"):
        FigureSpec.of({"title": "F", "kind": "radar", "x": "model_mb"})
    stated = FigureSpec.of({"title": "F", "kind": "curves", "x": "model_mb"})
    assert (stated.cost, FigureSpec("F", "curves").cost) == ("model_mb", "bits_per_linear_weight")


@pytest.mark.parametrize("key", ["rows", "columns", "within", "where"])
def test_a_label_that_no_record_has_is_refused(key):
    stated = {"modle": "micro*"} if key == "where" else ["model", "modle"]
    _, lacking = study(made(Grid()), t=TableSpec.of({"title": "T", key: stated}))
    assert lacking["t"].startswith("no record has a label or a key modle; there are the labels model, algo")
    _, lacking = study(made(Grid()), w=TableSpec("W", "wins", factor="modle"))
    assert "key modle" in lacking["w"]


def test_a_key_that_some_config_has_is_a_label():
    found, lacking = study(made(Grid()), t=TableSpec("T", rows=(*ROWS, "calib.n_samples")))
    assert not lacking
    assert found["t"].table.columns[3] == "calib.n_samples"


def test_a_study_says_what_is_missing_and_makes_the_rest():
    jobs = made(Grid(algos=("rtn", "gptq"), schemes=("w4a16", "w3a16")))
    jobs = [failed(job[0]) if job[0]["labels"]["scheme"] == "w3a16" else job for job in jobs]
    found, lacking = study(
        jobs,
        four=TableSpec("4", where={"scheme": ("w4a16",)}),
        three=TableSpec("3", where={"scheme": ("w3a16",)}),
        two=TableSpec("2", where={"scheme": ("w2a16",)}),
        tasks=TableSpec("tasks", metrics=("acc/*",)),
        published=TableSpec("published", published=("no such paper",)),
    )
    assert list(found) == ["four", "published"]
    assert (
        lacking["three"] == "all 2 jobs of it failed, the first for this: LinAlgError: not positive definite"
    )
    assert lacking["two"] == "no record is of it"
    assert "no record of these has a metric like acc/*" in lacking["tasks"]
    assert "no source 'no such paper' is known" in lacking["published-published"]
    assert found["published"].table.notes[-1].startswith("Failed: micro-llama rtn w3a16 (")


def test_a_study_is_of_its_algorithms_unless_a_table_says_otherwise():
    jobs = made(Grid())
    found, _ = study(jobs, ["gptq", "awq"], a=TableSpec("A"), b=TableSpec("B", where={"algo": ("rtn",)}))
    assert list(marks(found["a"])) == ["fp", "gptq", "awq"]
    assert list(marks(found["b"])) == ["fp", "rtn"]


WIDE = Grid(
    models=("Llama-2-7b-hf", "micro-opt"), algos=("rtn", "gptq"), schemes=("w4a16g128", "w3a16g128"),
    calibs=("wikitext2", "random"), seeds=(0, 1), texts={"wikitext2": 24, "c4": 16}, tasks={"piqa": 60, "boolq": 60},
    luck=0.01, identity={"evaluation.seq_len": 2048, "evaluation.max_windows": None},
)  # fmt: skip


def with_parts(jobs):
    return [
        (
            record,
            [
                row | {"part": "ab"[row["item"] % 2] if row["metric"] == "acc/piqa" else None}
                for row in samples
            ],
        )
        for record, samples in jobs
    ]


SPECS = {kind: TableSpec(f"of {kind}", kind, rows=(*ROWS, "calib")) for kind in get_args(TableKind)}
SPECS["results"] = replace(
    SPECS["results"], published=("MI-optimize README (arXiv:2406.12928) :: PPL of LLaMA-2-7B",)
)


def written(folder, source):
    found, lacking = study_tables(SPECS, list(source.all()), source)
    assert not lacking
    for name, one in found.items():
        write(one, folder, name)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_tables_are_the_same_files_from_a_folder_and_from_its_mirror(tmp_path, uri):
    jobs = with_parts(made(WIDE))
    jobs += [
        failed(record) for record, _ in made(Grid(models=("micro-opt",), algos=("quip",), floating=False))
    ]
    store = fill(tmp_path / "results", uri, jobs[::-1])
    of_folder = written(tmp_path / "one", store)
    assert {name.partition(".")[0] for name in of_folder} >= set(SPECS) - {"parts"} | {"results-published"}
    assert any(name.startswith("parts-") for name in of_folder)
    assert written(tmp_path / "two", source_of(store.root, uri, NAME)) == of_folder
    assert written(tmp_path / "three", Memory(jobs)) == of_folder


def test_published_numbers_stand_beside_runs_of_their_protocol_alone():
    about = replace(SPECS["results"], rows=(*ROWS, "calib"))
    source = Memory(made(replace(WIDE, calibs=("wikitext2",))))
    ours, _ = study_tables({"t": about}, list(source.all()), source)
    assert ours["t-published"].numbers["ours"].notna().any()
    short = Memory(made(replace(WIDE, identity={"evaluation.seq_len": 512})))
    theirs, _ = study_tables({"t": about}, list(short.all()), short)
    assert not theirs["t-published"].numbers["ours"].notna().any()


# Files


AWKWARD = "a|b_c & 5% #1 {x} $y$ ^~ <b> ≈ ± ≥ − \\ *"


def awkward(mark="best"):
    row = (Cell(f"[{AWKWARD}"), Cell("1.0", 1.0, mark))
    return Made(PageTable(AWKWARD, ("name|", "v_1"), (row,), 1, (AWKWARD,), anchor="t"))


def test_latex_escapes_all_that_it_reads_otherwise():
    assert tex(AWKWARD) == (
        r"a\textbar{}b\_c \& 5\% \#1 \{x\} \$y\$ \textasciicircum{}\textasciitilde{} \textless{}b\textgreater{} "
        r"$\approx$ $\pm$ $\geq$ $-$ \textbackslash{} *"
    )
    assert tex("[1] after a line's end would be a length") == "{[}1] after a line's end would be a length"
    assert tex("* too") == "{*} too"


def test_files_escape_cells_titles_and_notes(tmp_path):
    write(awkward(), tmp_path, "t")
    text = {path.suffix: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert text[".tex"].isascii()
    assert text[".tex"].count(tex(AWKWARD)) == 3  # the caption, a cell, a note
    assert r"\textbf{1.0}" in text[".tex"]
    assert "<b>" not in text[".html"].replace("<b>1.0</b>", "")
    rows = [line for line in text[".md"].splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {3}
    assert "1.0 best" in text[".csv"]


def test_labels_of_two_studies_differ_in_latex(tmp_path):
    texts = []
    for study_name in ("calibration", "llm_qbench/calibration"):
        write(awkward(), tmp_path, "t", study_name)
        texts.append((tmp_path / "t.tex").read_text())
    assert "\\label{tab:calibration-t}" in texts[0]
    assert "\\label{tab:llm_qbench-calibration-t}" in texts[1]


@pytest.mark.parametrize(
    ("mark", "shown"), [("best", "1.0 best"), ("tie", "1.0 ≈"), ("worse", "1.0"), ("", "1.0")]
)
def test_a_terminal_shows_marks_as_text(mark, shown):
    out = io.StringIO()
    show(awkward(mark).table, Console(file=out, width=200))
    assert any(line.rstrip().endswith(f"  {shown}") for line in out.getvalue().splitlines())


# How often tables are right


def tables_of(grid, effect, n):
    for seed in range(n):
        jobs = made(replace(grid, seed=seed), effect)
        yield cells(jobs)


def at_most(share, n):
    """What a share of `n` tables is below, three standard deviations of luck allowed."""
    return share + 3 * np.sqrt(share * (1 - share) / n)


@pytest.mark.slow
@pytest.mark.parametrize(
    "grid",
    [
        Grid(algos=("gptq", "awq", "quip", "spqr"), texts={"a": 24, "b": 32}, floating=False),
        Grid(algos=("rtn", "gptq", "awq"), seeds=(0, 1, 2), luck=0.02, floating=False),
        Grid(algos=("gptq", "awq", "quip"), tasks={"piqa": 200}, texts={}, noise=1.0, floating=False),
    ],
    ids=["windows", "draws", "documents"],
)
def test_where_nothing_differs_few_tables_claim_that_something_does(grid):
    n = 300
    claims = sum(
        any(
            cell.mark == "worse"
            for row in results_table(found, TableSpec("T"), "t").table.rows
            for cell in row
        )
        for found in tables_of(grid, none, n)
    )
    assert claims <= n * at_most(0.05, n)


@pytest.mark.slow
@pytest.mark.parametrize("algos", [("gptq", "awq"), ("gptq", "awq", "quip", "spqr")], ids=len)
def test_a_difference_of_the_least_size_is_found_as_often_as_the_note_says(algos):
    """The size that a table of the same design states, planted in one recipe of one of its two columns."""
    from qbench.report.power import detectable, table_detectable

    n, noise, windows = 300, 0.02, {"stdlib_docs": 24, "c4": 24}
    pairs = 2 * len(algos) * (len(algos) - 1) // 2
    size = detectable(noise * np.sqrt(2), 24, 0.05 / pairs)
    worst = algos[-1]

    def effect(labels, metric):
        return size if (labels["algo"], metric) == (worst, TEXT) else 0.0

    found, stated = 0, []
    for one in tables_of(Grid(algos=algos, texts=windows, noise=noise, floating=False), effect, n):
        standing = compared(one, ("model", "scheme"))
        stated += list(table_detectable(standing.standings).values())
        (place,) = [i for i, recipe in enumerate(one.recipes) if recipe.labels[-1] == worst]
        mark = standing.standing(place, TEXT)
        found += not mark.best and not mark.tie
    # A standard deviation of 24 differences is a few percent too small in the middle.
    assert np.median(stated) == pytest.approx(size, rel=0.05)
    luck = 3 * np.sqrt(0.8 * 0.2 / n)
    # The best of several equals is a little better than they are, and so the difference to it a little larger.
    assert 0.8 - luck <= found / n <= 0.8 + luck + (0.1 if len(algos) > 2 else 0)
