"""Calibration sets by texts, and metrics by parts: what the records say, and how sure it is."""

import numpy as np
import pytest

from qbench.report import matrix, parts

GROUP = {"model": "m", "algo": "gptq", "scheme": "w3"}


def record_of(name, labels, texts, **identity):
    evaluation = {"seq_len": 64, "max_windows": None, "limit": None} | identity.pop("evaluation", {})
    return {
        "fingerprint": name, "status": "done", "labels": labels, "metrics": {f"ppl/{t}": 50.0 for t in texts},
        "identity": {"evaluation": evaluation, "calib": {"name": labels["calib"], "seed": labels["seed"]} | identity},
        "environment": {"versions": {"python": "3"}},
    }  # fmt: skip


def made_up(effects, draws=5, windows=40, noise=0.02, seed=0):
    """Records and samples: mean NLL 4 + how hard a window is + the set's effect on the text + a draw's luck + noise."""
    rng = np.random.default_rng(seed)
    hardness = {text: rng.normal(0, 0.5, windows) for text in {t for e in effects.values() for t in e}}
    records, samples = [], {}
    for calib, on in effects.items():
        for draw in range(draws):
            name = f"{calib}{draw}"
            labels = GROUP | {"calib": calib, "seed": draw}
            records.append(record_of(name, labels, on))
            samples[name] = [
                {"metric": f"ppl/{text}", "item": i, "value": 4 + hardness[text][i] + effect + luck + e}
                for text, effect in on.items()
                for luck in [rng.normal(0, noise / 4)]
                for i, e in enumerate(rng.normal(0, noise, windows))
            ]
    return records, samples.__getitem__


def found(effects, **more):
    return matrix.compare(matrix.losses(*made_up(effects, **more)))


def test_the_best_set_of_each_text_is_found_and_the_others_are_surely_worse():
    frame = found({"a": {"a": 0.0, "b": 0.1}, "b": {"a": 0.1, "b": 0.0}, "c": {"a": 0.2, "b": 0.2}})
    best = frame[frame["change"] == 0].set_index("text")["calib"].to_dict()
    assert best == {"a": "a", "b": "b"}
    others = frame[frame["change"] > 0]
    assert (others["p"] < 1e-4).all()
    by = others.set_index(["text", "calib"])["change"]
    assert by["a", "b"] == pytest.approx(np.expm1(0.1), abs=0.02)
    assert list(matrix.closest(frame)["closest is best"]) == ["yes", "yes"]
    assert set(matrix.closest(frame)["better than"]) == {"2 of 2"}


def test_a_set_that_beats_a_texts_own_is_said():
    frame = found({"a": {"a": 0.1}, "b": {"a": 0.0}})
    assert list(matrix.closest(frame)["closest is best"]) == ["no"]
    assert "best" in matrix.table(frame).set_index("calib")["a"]["b"]
    assert matrix.table(frame).set_index("calib")["a"]["a"].endswith("*)")


def test_p_is_corrected_for_all_pairs_of_sets_since_the_best_is_chosen_by_the_same_numbers():
    two = found({"a": {"t": 0.0}, "b": {"t": 0.01}})["p"].dropna().item()
    three = found({"a": {"t": 0.0}, "b": {"t": 0.01}, "c": {"t": 0.5}})  # with the same a and b
    assert 0 < two < 0.5
    # Holm: of three pairs c against the best comes first, b second, and b against c is taken not to reject.
    assert three.set_index("calib").loc["b", "p"] == pytest.approx(2 * two)


def test_the_luck_of_the_draw_is_no_difference():
    """Five draws with much luck: windows agree on the difference, draws do not."""
    rng = np.random.default_rng(0)
    records, samples = made_up({"a": {"t": 0.0}, "b": {"t": 0.0}}, noise=0.001)
    luck = {r["fingerprint"]: rng.normal(0, 0.1) for r in records}
    frame = matrix.compare(
        matrix.losses(records, lambda f: [s | {"value": s["value"] + luck[f]} for s in samples(f)])
    )
    assert frame["p"].dropna().item() > 0.05


def test_draws_are_by_all_seeds_of_a_job():
    records, samples = made_up({"a": {"t": 0.0}, "b": {"t": 0.1}}, draws=3)
    for record in records:
        record["identity"]["algorithm"] = {"name": "quarot", "seed": record["labels"]["seed"]}
    frame = matrix.compare(matrix.losses(records, samples))
    assert set(frame["setting"]) == {""}
    assert list(frame["draws"]) == [3, 3]


def test_texts_of_one_name_are_not_put_together():
    records, samples = made_up({"a": {"t": 0.0}, "b": {"t": 0.1}}, draws=1)
    for record, digest in zip(records, ("0" * 64, "1" * 64), strict=True):
        record["data"] = {"eval/t": {"sha256": digest}}
    assert len(set(matrix.losses(records, samples)["text"])) == 2
    records[1]["data"] = records[0]["data"]
    assert set(matrix.losses(records, samples)["text"]) == {"t"}


def test_a_set_of_other_files_is_not_a_draw_of_the_same_one():
    records, samples = made_up({"a": {"t": 0.0}, "b": {"t": 0.1}}, draws=2)
    records[1]["identity"]["calib"]["files"] = {"a/train": "ab"}
    frame = matrix.losses(records, samples)
    assert frame.groupby("calib")["setting"].nunique().to_dict() == {"a": 2, "b": 1}


@pytest.mark.slow
def test_where_nothing_differs_few_tables_claim_that_something_does():
    effects = {name: {"t": 0.0, "u": 0.0} for name in "abcd"}
    claims = [(found(effects, seed=seed, windows=20)["p"] < 0.05).any() for seed in range(200)]
    assert sum(claims) <= 200 * 0.05 + 3 * np.sqrt(200 * 0.05 * 0.95)


def test_without_calibrated_jobs_there_is_nothing_to_compare():
    with pytest.raises(ValueError, match="no job with a calibration set"):
        matrix.losses([], {}.__getitem__)


def part_records(rows):
    labels = GROUP | {"calib": None, "seed": None}
    record = {
        "fingerprint": "f", "status": "done", "labels": labels | {"wbits": 3, "abits": 16, "kvbits": 16},
        "metrics": {}, "identity": {"evaluation": {}}, "environment": {"versions": {"python": "3"}},
    }  # fmt: skip
    return [record], {"f": rows}.__getitem__


def test_marks_of_a_part_are_averaged_by_themselves_and_together():
    values = {
        "600 chars, 0.5": [1, 0],
        "600 chars, 1": [1, 1],
        "1000 chars, 0.5": [0, 0],
        "1000 chars, 1": [1, 0],
    }
    rows = [{"metric": "acc/t", "item": 0, "value": v, "part": p} for p, vs in values.items() for v in vs]
    frame = parts.by_part(*part_records([*rows, {"metric": "ppl/x", "item": 0, "value": 1.0, "part": None}]))
    by = {view: group.set_index("part")["value"].to_dict() for view, group in frame.groupby("marks")}
    assert by["all"] == {p: sum(vs) / 2 for p, vs in values.items()}
    assert by["mark 1"] == {"600 chars": 0.75, "1000 chars": 0.25}
    assert by["mark 2"] == {"0.5": 0.25, "1": 0.75}
    assert list(by["mark 1"]) == ["600 chars", "1000 chars"]  # by size, not by the alphabet
    assert set(frame["metric"]) == {"acc/t"}


def test_metrics_without_parts_are_said_to_have_none():
    with pytest.raises(ValueError, match="no metric has parts"):
        parts.by_part(*part_records([{"metric": "ppl/x", "item": 0, "value": 1.0}]))


def test_other_protocols_and_settings_are_not_averaged():
    rows = [{"metric": "ppl/t", "item": i, "value": 3.0 + i / 10} for i in range(5)]
    records, samples = [], {}
    for name, more in {"a": {}, "b": {"n_samples": 8}, "c": {"evaluation": {"seq_len": 32}}}.items():
        records.append(record_of(name, GROUP | {"calib": "s", "seed": 0}, ["t"], **more))
        samples[name] = rows
    frame = matrix.compare(matrix.losses(records, samples.__getitem__))
    assert len(frame) == 3
    assert set(frame["text"]) == {"t [64]", "t [32]"}
    assert set(frame["setting"]) == {"n_samples=8", "n_samples=-"}
