"""Records to recipes and numbers: what is a draw of what, what shares a column, and what is left out."""

import numpy as np
import pytest

from qbench.report.cells import Cells, chosen, label
from qbench.track.records import in_order
from tests.synthetic import Grid, Memory, failed, made, none

ROWS = ("model", "scheme", "algo")
TEXT = "ppl/stdlib_docs"


def cells(jobs, rows=ROWS, columns=(), metrics=("ppl/*", "acc/*")):
    return Cells.of(in_order(record for record, _ in jobs), Memory(jobs), rows, columns, metrics)


def only(found):
    """The one quantized recipe."""
    (recipe,) = [r for r in found.recipes if not r.is_float]
    return recipe


def gptq(**more):
    return made(Grid(**{"algos": ("gptq",), "floating": False} | more))


def test_seeds_are_draws_of_one_recipe():
    jobs = gptq(seeds=(0, 1, 2), luck=0.05)
    found = cells(jobs)
    result = found.result(only(found), TEXT)
    values = np.array([record["metrics"][TEXT] for record, _ in jobs])
    assert result.value == pytest.approx(np.exp(np.log(values).mean()))
    assert result.records == tuple(record["fingerprint"] for record, _ in jobs)
    assert result.draws.values.shape == (3, 24)
    # Draws share their windows, so these errors do not shrink with more of them; that of the draws does.
    of_windows = np.mean([record["metrics"][f"{TEXT}_stderr"] for record, _ in jobs])
    assert result.stderr == pytest.approx(np.hypot(of_windows, values.std(ddof=1) / np.sqrt(3)))


def rotated(seeds, algo="hqq", **more):
    """An algorithm that draws something itself."""
    return [
        job
        for seed in seeds
        for job in made(
            Grid(algos=(algo,), floating=False, luck=0.05, identity={"algorithm.seed": seed} | more)
        )
    ]


@pytest.mark.parametrize("algo", ["hqq", "gptq"])
def test_seeds_of_an_algorithm_are_draws_of_one_recipe(algo):
    """A random rotation is luck as calibration samples are: a row for each seed would hide how much."""
    found = cells(rotated((0, 1, 2), algo))
    result = found.result(only(found), TEXT)
    assert result.draws.values.shape == (3, 24)
    assert result.draws.drawn
    assert found.names == ROWS


def test_what_is_drawn_by_no_seed_has_no_luck():
    found = cells(made(Grid(algos=("rtn",), floating=False)))
    assert not found.result(only(found), TEXT).draws.drawn


def test_draws_are_in_the_order_of_their_seeds():
    found = cells(rotated((10, 9, 0)))
    by_seed = [[row["value"] for row in samples] for _, samples in rotated((0, 9, 10))]
    items = np.argsort([str(i) for i in range(24)])
    assert found.result(only(found), TEXT).draws.values == pytest.approx(np.array(by_seed)[:, items])


def test_a_seed_of_an_algorithm_among_the_labels_is_no_draw():
    found = cells(rotated((0, 1)), rows=(*ROWS, "seed"))
    assert [recipe.labels[-1] for recipe in found.recipes] == ["0", "1"]


def test_draws_of_other_texts_are_not_put_together():
    jobs = gptq(seeds=(0, 1))
    jobs[1][0]["data"]["eval/stdlib_docs"]["sha256"] = "0" * 64
    found = cells(jobs)
    assert found.result(only(found), TEXT).draws is None


def test_floating_point_is_of_the_same_model_and_text():
    jobs = made(Grid(algos=("rtn",), texts={"c4": 24})) + made(Grid(algos=("rtn", "gptq")))
    found = cells(jobs)
    floats, quantized = (
        [r for r in found.recipes if r.is_float],
        [r for r in found.recipes if not r.is_float],
    )
    assert all(found.floating(recipe, TEXT) is found.result(floats[0], TEXT) for recipe in quantized[-1:])
    for record, _ in jobs:
        if record["labels"]["algo"] == "fp":
            record["data"].pop("eval/stdlib_docs", None)
    assert cells(jobs).floating(cells(jobs).recipes[-1], TEXT) is None


def test_a_seed_among_the_labels_is_no_draw():
    found = cells(gptq(seeds=(0, 1)), rows=(*ROWS, "seed"))
    assert [recipe.labels[-1] for recipe in found.recipes] == ["0", "1"]
    assert found.names == (*ROWS, "seed")


@pytest.mark.parametrize(
    "key",
    ["model.revision", "model.dtype", "model.id", "model.content", "algorithm.damp",
     "calib.n_samples", "calib.name", "calib.files", "calib.propagate_error"],
)  # fmt: skip
@pytest.mark.parametrize(
    "rows", [ROWS, (*ROWS, "calib"), (*ROWS, "calib", "calib.n_samples"), ("model",)], ids=len
)
def test_jobs_that_differ_in_more_than_the_seed_are_not_one_recipe(key, rows):
    value = {"c4/train": "ab"} if key.endswith("files") else "other"
    jobs = gptq(seeds=(0, 1)) + gptq(seeds=(0, 1), identity={key: value})
    found = cells(jobs, rows)
    assert [len(recipe.records) for recipe in found.recipes] == [2, 2]
    assert len({recipe.labels for recipe in found.recipes}) == 2


@pytest.mark.parametrize(
    "rows", [("model",), ("model", "wbits"), ("model", "scheme"), ("model", "algo")], ids=" ".join
)
def test_what_rows_do_not_say_is_a_setting(rows):
    found = cells(made(Grid(algos=("gptq", "awq"), schemes=("w3a16g128", "w3a16"), floating=False)), rows)
    assert [len(recipe.records) for recipe in found.recipes] == [1] * 4
    assert len({recipe.labels for recipe in found.recipes}) == 4


def test_labels_that_say_enough_need_no_setting():
    found = cells(made(Grid(calibs=("stdlib_docs", "random"), seeds=(0, 1))), (*ROWS, "calib"))
    assert found.names == (*ROWS, "calib")
    across = cells(made(Grid(schemes=("w4a16", "w3a16"))), ("model", "algo"), ("wbits",))
    assert across.names == ("model", "algo")
    assert {r.across for r in across.recipes} == {("16",), ("4",), ("3",)}


def test_a_job_that_was_evaluated_twice_is_one_draw():
    first = gptq(seeds=(0, 1))
    again = gptq(seeds=(0, 1), tasks={"piqa": 30})
    found = cells(first + again)
    recipe = only(found)
    assert len(recipe.records) == 4
    assert found.result(recipe, TEXT).draws.values.shape == (2, 24)
    assert found.result(recipe, "acc/piqa").records == tuple(record["fingerprint"] for record, _ in again)


def test_protocols_never_share_a_column():
    jobs = gptq() + gptq(identity={"evaluation.max_windows": 8}, texts={"stdlib_docs": 8})
    found = cells(jobs, metrics=("ppl/*", "model_mb"))
    assert found.metrics == [f"{TEXT} [256 x 24]", f"{TEXT} [256 x 8]", "model_mb"]
    recipe = only(found)
    for (record, samples), metric in zip(jobs, found.metrics, strict=False):
        result = found.result(recipe, metric)
        assert result.value == pytest.approx(record["metrics"][TEXT])
        assert result.n_items == len(samples)


def test_draws_without_a_metric_are_left_out_of_it():
    jobs = gptq(seeds=(0, 1, 2))
    del jobs[1][0]["metrics"][TEXT]
    found = cells(jobs)
    assert found.result(only(found), TEXT).records == (jobs[0][0]["fingerprint"], jobs[2][0]["fingerprint"])


def test_draws_of_other_items_are_averaged_but_not_compared():
    jobs = gptq(seeds=(0, 1))
    jobs[1] = (jobs[1][0], jobs[1][1][:-1])
    found = cells(jobs)
    result = found.result(only(found), TEXT)
    assert len(result.records) == 2
    assert result.draws is None
    assert result.n_items == 0


def test_costs_have_no_items():
    found = cells(gptq(seeds=(0, 1)), metrics=("calib_time_s",))
    result = found.result(only(found), "calib_time_s")
    assert result.draws is None
    assert (result.value, result.stderr) == (4.0, 0.0)


def test_what_floating_point_alone_was_evaluated_on_is_no_column():
    jobs = made(Grid()) + made(Grid(algos=(), texts={"c4": 24}))
    assert [metric for _, metric in cells(jobs).columns()] == [TEXT]
    assert [metric for _, metric in cells(made(Grid(algos=()))).columns()] == [TEXT]


def test_failed_jobs_are_no_recipes():
    jobs = gptq(seeds=(0, 1))
    found = cells([failed(jobs[0][0]), jobs[1]])
    assert [len(recipe.records) for recipe in found.recipes] == [1]
    assert [record["status"] for record in found.failed] == ["failed"]


def test_the_chosen_come_with_the_floating_point_of_their_models_alone():
    grid = Grid(models=("a", "b"), schemes=("w4a16", "w3a16"), algos=("rtn", "gptq"))
    records = [record for record, _ in made(grid)]
    found = chosen(records, {"scheme": ("w3*",), "model": ("a",)}, ["gptq"])
    assert [(r["labels"]["model"], r["labels"]["algo"]) for r in found] == [("a", "fp"), ("a", "gptq")]
    assert not chosen(records, {"scheme": ("w2*",)})
    both = chosen(records, {"algo": ("rtn",), "wbits": ("3",)}, ["gptq"])  # what the table says wins
    assert [r["labels"]["algo"] for r in both] == ["fp", "fp", "rtn", "rtn"]


def test_a_job_without_calibration_data_has_no_number_of_samples():
    free, calibrated = (record for record, _ in made(Grid(algos=("rtn", "gptq"), floating=False)))
    assert free["config"]["calib"]["n_samples"]  # what the sweep said for others
    assert label(free, "calib.n_samples") == label(free, "calib") == label(free, "seed") == ""
    assert label(calibrated, "calib.n_samples") == "16"
    assert label(calibrated, "no.such.key") == ""


def test_the_order_is_that_of_the_records_and_not_of_the_files():
    grid = Grid(models=("b", "a"), schemes=("w3a16", "w4a16"), algos=("gptq", "rtn"), tasks={"piqa": 8})
    jobs = made(grid, none)
    found, shuffled = cells(jobs), cells(jobs[::-1])
    assert [r.labels for r in found.recipes] == [r.labels for r in shuffled.recipes]
    assert found.columns() == shuffled.columns()
    labels = [(r.labels[0], r.labels[1], r.labels[2]) for r in found.recipes]
    assert labels[:3] == [("b", "w16a16", "fp"), ("b", "w4a16", "gptq"), ("b", "w4a16", "rtn")]
