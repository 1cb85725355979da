"""Takeaways: planted answers are found, noise is not one, and an answer depends on nothing but its evidence."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from qbench.quant.scheme import Scheme
from qbench.report.pairs import p_text
from qbench.report.power import detectable
from qbench.report.protocols import usual
from qbench.report.takeaways import page_takeaway, shipped_claims, show, takeaways, untested, write
from qbench.report.takeaways.algorithms import parts_of
from qbench.report.takeaways.answer import shown_p, windows_needed
from qbench.report.takeaways.budget import front
from qbench.report.takeaways.claims import KINDS, read_claims
from qbench.report.takeaways.evidence import Evidence
from qbench.report.takeaways.naming import named
from qbench.report.takeaways.trial import of_schemes

ROOT = Path(__file__).parents[1]
WINDOWS = 24
# Of a mean difference, in percent: five standard deviations of five seeds' luck and of noise over windows, and rounding.
TOLERANCE = 500 * 1.15 * np.hypot(0.0005 * np.sqrt(2 / 5), 0.002 * np.sqrt(2 / WINDOWS)) + 0.05


class Records:
    """Synthetic records: a window's loss is 4, how hard it is, the recipe's effect on the text, luck of the draw, noise."""

    where = "memory"

    def __init__(self, noise=0.002, luck=0.0005, seed=0):
        self.rng, self.noise, self.luck = np.random.default_rng(seed), noise, luck
        self.hard, self.records, self.rows = {}, [], {}

    def add(
        self,
        algo,
        scheme="w3a16g128",
        calib=None,
        effects=0.0,
        seeds=5,
        texts=("a", "b"),
        mb=1.0,
        accuracy=None,
    ):
        """`effects`: of all texts, or by text; `accuracy`: share of 200 documents."""
        for seed in range(seeds) if calib else [None]:
            name = f"{algo}-{scheme}-{calib}-{seed}"
            luck = self.rng.normal(0, self.luck) if calib else 0.0
            rows, metrics = [], {"model_mb": mb}
            for text in texts:
                hard = self.hard.setdefault(text, self.rng.normal(0, 0.4, WINDOWS))
                effect = effects.get(text, 0.0) if isinstance(effects, dict) else effects
                loss = 4 + hard + effect + luck + self.rng.normal(0, self.noise, WINDOWS)
                metrics[f"ppl/{text}"] = float(np.exp(loss.mean()))
                rows += [(f"ppl/{text}", i, v) for i, v in enumerate(loss)]
            if accuracy is not None:
                right = np.arange(200) < round(200 * accuracy)
                metrics["acc/t"] = float(right.mean())
                rows += [("acc/t", i, float(v)) for i, v in enumerate(right)]
            bits = Scheme.parse(scheme.partition("-")[0])
            labels = {
                "model": "m",
                "algo": algo,
                "scheme": scheme,
                "wbits": 4,
                "abits": 16,
                "kvbits": 16,
                "calib": calib,
            }
            assert bits
            self.rows[name] = rows
            self.records.append({
                "fingerprint": name, "status": "done", "reason": None, "labels": labels | {"seed": seed},
                "metrics": metrics, "environment": {"versions": {"python": "3"}}, "config": {},
                "identity": {
                    "model": {"id": "m"}, "algorithm": {"name": algo}, "scheme": scheme,
                    "calib": {"name": calib, "n_samples": 16, "seq_len": 64, "seed": seed} if calib else None,
                    "evaluation": {"seq_len": 64, "max_windows": None, "limit": None},
                },
            })  # fmt: skip
        return self

    def sample_table(self, fingerprints):
        rows = [(f, *row) for f in fingerprints for row in self.rows[f]]
        columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
        kinds = (pa.string(), pa.string(), pa.int64(), pa.float64())
        names = ("fingerprint", "metric", "item", "value")
        return pa.table({n: pa.array(c, t) for n, c, t in zip(names, columns, kinds, strict=True)})

    def answers(self, claims=()):
        return takeaways(self.records, self, claims)

    def one(self, kind, claims=()):
        (found,) = [t for t in self.answers(claims) if t.id.startswith(f"{kind}/")]
        return found


def claim(test):
    about = {
        "id": "c", "paper": "P", "arxiv": "1", "place": "here", "question": "Is it?", "statement": "It is.",
        "study": "s", "published": (),
    }  # fmt: skip
    lines = [f"{k} = {json.dumps(v)}" for k, v in about.items()]
    inner = ", ".join(f"{k} = {json.dumps(v)}" for k, v in test.items())
    return read_claims("\n".join(["[[claim]]", *lines, f"test = {{ {inner} }}"]))


def percents(text):
    """The numbers before a percent sign that are no interval's level."""
    return [float(number) for number in re.findall(r"([-+]?[\d.]+)%(?! interval)", text)]


def three_sets(noise=0.002, luck=0.0005, seeds=5):
    """`c` is never the best, and its worst case is the least: 2 % against 10 %."""
    made = Records(noise, luck)
    made.add("gptq", calib="a", effects={"a": 0.0, "b": 0.1}, seeds=seeds)
    made.add("gptq", calib="b", effects={"a": 0.1, "b": 0.0}, seeds=seeds)
    return made.add("gptq", calib="c", effects={"a": 0.02, "b": 0.02}, seeds=seeds)


def test_the_set_with_the_least_worst_case_is_found():
    found = three_sets().one("calibration")
    assert found.verdict == "answered"
    assert found.sentence.startswith("c has the least worst case, ")
    assert percents(found.sentence) == pytest.approx(
        [100 * np.expm1(0.02), 100 * np.expm1(0.1)], abs=TOLERANCE
    )
    assert "c 100%" in found.confidence
    assert len(found.evidence) == 15


def test_noise_leaves_the_set_undecided_and_says_what_would_decide():
    found = three_sets(noise=1.0).one("calibration")
    assert found.verdict == "undecided"
    assert found.sentence.startswith("Not decided by these data")
    assert "cannot be excluded" in found.sentence
    assert "times as many windows" in found.sentence


def test_the_luck_of_the_draw_leaves_the_set_undecided():
    assert three_sets(luck=0.3).one("calibration").verdict == "undecided"


def test_the_best_algorithm_is_found_and_data_free_ones_take_part():
    made = (
        Records()
        .add("rtn", effects=0.1)
        .add("awq", calib="a", effects=0.0)
        .add("gptq", calib="a", effects=0.05)
    )
    made.add("fp", scheme="w16a16", effects=-0.1)
    found = made.one("algorithm")
    assert found.verdict == "answered"
    assert "awq has the lowest perplexity" in found.sentence
    assert percents(found.sentence) == pytest.approx([-100 * np.expm1(-0.05)], abs=TOLERANCE)
    assert percents(found.effect.partition("rtn ")[2])[0] == pytest.approx(100 * np.expm1(0.1), abs=TOLERANCE)
    assert not any(name.startswith("fp") for name in found.evidence)


def test_equal_algorithms_tie_and_the_windows_wanted_are_told():
    made = Records(noise=0.3).add("rtn", effects=2.0).add("hqq", effects=0.0).add("mse", effects=0.01)
    found = made.one("algorithm")
    assert found.verdict == "undecided"
    assert "rtn surely worse" in found.sentence
    assert "windows (48 now)" in found.sentence


def test_the_windows_wanted_are_the_fewest_that_suffice():
    for effect in (0.05, 0.2, 0.9):
        n = windows_needed(effect, 1.0)
        assert detectable(1.0, n) <= effect < detectable(1.0, n - 1)


def test_what_more_bytes_buy_is_told():
    made = Records().add("rtn", "w2a16", effects=0.5, mb=2).add("rtn", "w4a16", effects=0.1, mb=4)
    made.add("hqq", "w4a16", effects=0.1, mb=4).add("rtn", "w6a16", effects=0.3, mb=6).add(
        "fp", "w16a16", mb=16
    )
    found = made.one("budget")
    assert found.verdict == "answered"
    assert [word in found.sentence for word in ("From 2 MB", "From 4 MB", "From 6 MB", "From 16 MB")] == [
        True, True, False, True,
    ]  # fmt: skip
    assert percents(found.effect)[0] == pytest.approx(100 * np.expm1(-0.4), abs=TOLERANCE)
    assert "not surely worse at that size: " in found.sentence


def test_bytes_that_buy_nothing_sure_are_undecided():
    made = Records(noise=0.5).add("rtn", "w4a16", effects=0.01, mb=4).add("rtn", "w6a16", effects=0.0, mb=6)
    found = made.one("budget")
    assert found.verdict == "undecided" or "From 6 MB" not in found.sentence


def test_a_front_has_only_what_nothing_smaller_beats():
    assert front([1, 2, 3, 3, 4], [5.0, 4.0, 4.5, 3.0, 3.0]) == [0, 1, 3]


@pytest.mark.parametrize(
    ("whole", "verdict", "word"),
    [(-0.1, "answered", "Yes"), (0.1, "answered", "No"), (0.0, "undecided", "Not")],
)
def test_a_combination_is_held_against_the_better_of_its_parts(whole, verdict, word):
    made = Records(noise=0.01).add("awq", calib="a", effects=0.0).add("gptq", calib="a", effects=0.05)
    made.add("awq_gptq", calib="a", effects=whole).add("omniquant", calib="a", effects=-1.0)
    found = made.one("combination")
    assert (found.verdict, found.sentence.split()[0].strip(":")) == (verdict, word)
    assert not any(name.startswith("omniquant") for name in found.evidence)


def test_a_combination_is_known_by_its_name():
    known = ["awq", "gptq", "slimllm", "llm_int8", "omniquant"]
    assert parts_of("awq_gptq", known) == ("awq", "gptq")
    assert parts_of("llm_int8_gptq", known) == ("llm_int8", "gptq")
    assert parts_of("llmc_best_practice_w2", known) == ("awq", "omniquant")
    assert parts_of("slimllm_plus", known) == ()


BETTER = {"kind": "better", "algo": ["awq"], "than": ["rtn"], "schemes": ["w3*"], "metrics": ["ppl/"]}


@pytest.mark.parametrize(
    ("effects", "verdict"),
    [
        ((-0.1, -0.1), "supported"),
        ((0.1, 0.1), "contradicted"),
        ((0.0, 0.0), "undecided"),
        ((-0.1, 0.1), "undecided"),
    ],
)
def test_a_claim_is_supported_contradicted_or_neither(effects, verdict):
    made = Records(noise=0.02).add("rtn")
    for calib, effect in zip("ab", effects, strict=True):
        made.add("awq", calib=calib, effects=effect)
    found = made.one("claim", claim(BETTER))
    assert found.verdict == verdict
    assert (found.claim, found.claim_source) == ("It is.", "P, arXiv:1, here")


@pytest.mark.parametrize(
    ("effect", "noise", "verdict"),
    [(0.01, 0.002, "supported"), (0.1, 0.002, "contradicted"), (0.05, 0.5, "undecided")],
)
def test_lossless_is_an_interval_within_the_margin(effect, noise, verdict):
    made = Records(noise).add("fp", "w16a16").add("rtn", "w8a8", effects=effect)
    test = {"kind": "lossless", "algo": ["rtn"], "schemes": ["w8a8"], "margin": 0.05}
    assert made.one("claim", claim(test)).verdict == verdict


@pytest.mark.parametrize(("activations", "verdict"), [(0.5, "supported"), (0.0, "contradicted")])
def test_an_order_of_harms_is_told_from_what_each_adds(activations, verdict):
    made = Records().add("fp", "w16a16").add("rtn", "w4a16", effects=0.2)
    made.add("rtn", "w4a4", effects=0.2 + activations)
    test = {
        "kind": "order", "less": ["w4a16"], "less_beside": ["w16a16"], "more": ["w4a4"], "more_beside": ["w4a16"],
        "algos": ["rtn"], "metrics": ["ppl/"],
    }  # fmt: skip
    assert made.one("claim", claim(test)).verdict == verdict


@pytest.mark.parametrize(
    ("spread", "verdict"), [(0.01, "supported"), (0.4, "contradicted"), (0.1, "undecided")]
)
def test_how_much_algorithms_depend_on_the_set_is_compared(spread, verdict):
    made = Records(noise=0.01)
    for algo, size in (("awq", spread), ("gptq", 0.1)):
        for calib, effect in (("a", 0.0), ("b", size)):
            made.add(algo, calib=calib, effects=effect)
    test = {"kind": "calibration_spread", "algo": ["awq"], "than": ["gptq"], "schemes": ["w3*"]}
    assert made.one("claim", claim(test)).verdict == verdict


@pytest.mark.parametrize(("expect", "own", "verdict"), [
    ("best", -0.1, "supported"), ("best", 0.1, "contradicted"), ("beaten", 0.1, "supported"), ("best", 0.0, "undecided"),
])  # fmt: skip
def test_whether_the_own_set_is_best_is_told(expect, own, verdict):
    made = Records(noise=0.01)
    for calib in "abc":
        made.add("gptq", calib=calib, effects={calib: own})
    test = {"kind": "closest_calibration", "algos": ["*"], "schemes": ["*"], "expect": expect}
    assert made.one("claim", claim(test)).verdict == verdict


def of_models(signs):
    """Six recipes of each model, whose accuracy falls (-1) or rises (1) with perplexity, or neither."""
    made = Records()
    for model, sign in enumerate(signs):
        one = Records(seed=model)
        for i, scheme in enumerate(["w2a16", "w3a16", "w4a16", "w5a16", "w6a16", "w8a16"]):
            bent = 0.02 * (i % 2) if sign == 0 else 0.0
            one.add("rtn", scheme, effects=0.1 * i, accuracy=0.5 + sign * 0.05 * i + bent)
        for record in one.records:
            name = f"{model}-{record['fingerprint']}"
            made.rows[name] = one.rows[record["fingerprint"]]
            record["fingerprint"], record["identity"]["model"]["id"] = name, f"m{model}"
            record["labels"]["model"] = f"m{model}"
        made.records += one.records
    return made


@pytest.mark.parametrize(
    ("signs", "verdict"),
    [
        ((-1, -1), "supported"),
        ((1, 1), "contradicted"),
        ((0, 0), "undecided"),
        ((-1,), "undecided"),
        ((-1, 0), "undecided"),
        ((-1, 1), "undecided"),
    ],
)
def test_perplexity_tells_tasks_only_where_two_models_agree(signs, verdict):
    found = of_models(signs).one("claim", claim({"kind": "correlation"}))
    assert found.verdict == verdict
    assert "not independent" in found.confidence


def several():
    """Few records, of which every question can be asked."""
    made = Records(noise=0.05)
    for calib in "ab":
        made.add("gptq", calib=calib, seeds=2, effects={calib: -0.05})
    made.add("awq", calib="a", seeds=2, effects=-0.05).add("awq_gptq", calib="a", seeds=1, effects=-0.06)
    return made.add("rtn", effects=0.2).add("fp", "w16a16", mb=4)


def test_equal_records_give_identical_files(tmp_path):
    one, other = several(), several()
    other.records.reverse()
    paths = write(one.answers(shipped_claims()), tmp_path / "1")
    again = write(other.answers(shipped_claims()), tmp_path / "2")
    assert [p.name for p in paths] == ["takeaways.md", "takeaways.json"]
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in again]


def test_deleting_a_record_changes_exactly_what_depends_on_it():
    made, claims = several(), shipped_claims()
    before = {t.id: t for t in made.answers(claims)}
    kinds = {name.partition("/")[0] for name in before}
    assert kinds == {"calibration", "algorithm", "budget", "combination", "claim"}
    whole = made.records
    for gone in whole:
        made.records = [r for r in whole if r is not gone]
        after = {t.id: t for t in made.answers(claims)}
        changed = {name for name, t in before.items() if after.get(name) != t}
        assert changed == {name for name, t in before.items() if gone["fingerprint"] in t.evidence}
        assert set(after) <= set(before)


def test_evidence_is_sorted_and_exists():
    made = several()
    names = {r["fingerprint"] for r in made.records}
    for t in made.answers(shipped_claims()):
        assert list(t.evidence) == sorted(set(t.evidence))
        assert set(t.evidence) <= names
        assert t.effect
        assert t.confidence
        assert t.sentence.endswith(".")


def test_jobs_that_differ_in_a_seed_inside_the_algorithm_are_draws():
    made = Records().add("quarot").add("quarot", scheme="w3a16g128")
    for i, record in enumerate(made.records):
        record["fingerprint"], record["identity"]["algorithm"] = f"q{i}", {"steps": [{"seed": i}]}
        made.rows[f"q{i}"] = made.rows["quarot-w3a16g128-None-None"]
    (recipe,) = Evidence(made.records, made).recipes
    draws = Evidence(made.records, made).joint([recipe]).draws[0]
    assert draws.values.shape == (2, 2 * WINDOWS)
    assert draws.drawn


def test_recipes_of_one_name_are_told_apart_by_the_fewest_settings():
    made = Records().add("x").add("y").add("z")
    scale, other, clip = {"name": "Scale", "n": 20}, {"name": "Scale", "n": 40}, {"name": "Clip", "m": 1}
    for record, steps in zip(made.records, ([scale], [other], [scale, clip]), strict=True):
        record["labels"]["algo"], record["identity"]["algorithm"] = "awq", {"steps": steps}
    recipes = Evidence(made.records, made).recipes
    assert sorted(named(recipes, ("algo",))) == ["awq (Clip, n=20)", "awq (n=20)", "awq (n=40)"]
    assert named(recipes[:1], ("algo",)) == ["awq"]


def test_failed_jobs_and_other_models_do_not_take_part():
    made = three_sets()
    before = made.answers()
    made.records.append(made.records[0] | {"fingerprint": "failed", "status": "failed"})
    assert made.answers() == before


def test_nothing_is_said_without_records(tmp_path):
    assert takeaways([], Records(), shipped_claims()) == []
    paths = write([], tmp_path)
    assert "suffice for no answer" in paths[0].read_text()
    assert len(json.loads(paths[1].read_text())["not_tested"]) == len(shipped_claims())


def test_what_is_not_tested_names_the_study():
    made = several()
    found = made.answers(shipped_claims())
    missing = untested(found, shipped_claims())
    assert {f"claim/{c.id}" for c in missing} | {t.id for t in found if t.claim} == {
        f"claim/{c.id}" for c in shipped_claims()
    }
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(found, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert f"+sweep={missing[0].study}" in text.replace("\n", "")


def test_a_page_shows_the_claim_with_its_source():
    found = three_sets().one("calibration")
    assert page_takeaway(found).claim == ""
    told = page_takeaway(replace(found, claim="It is.", claim_source="P"))
    assert told.claim == "It is. (P)"
    assert told.evidence == found.evidence


def test_the_shipped_claims_name_algorithms_schemes_studies_and_numbers_that_exist():
    claims = shipped_claims()
    assert 15 <= len(claims) <= 30
    algos = {p.stem for p in (ROOT / "conf" / "algo").glob("*.yaml")}
    with (ROOT / "qbench" / "published" / "numbers.csv").open(newline="") as file:
        tables = {f"{row['source']} :: {row['table']}" for row in csv.DictReader(file)}
    for one in claims:
        wanted = one.settings
        named = [a for key in ("algo", "than", "algos") for a in wanted.get(key, ()) if a != "*"]
        assert set(named) <= algos, one.id
        schemes = [
            s
            for key in ("schemes", "less", "more", "less_beside", "more_beside")
            for s in wanted.get(key, ())
        ]
        for scheme in filter(None, schemes):
            plain = scheme.replace("a*", "a16").replace("g*", "g128").rstrip("*").partition("-")[0]
            assert scheme == "*" or Scheme.parse(plain), one.id
        assert set(one.published) <= tables, one.id
        assert one.kind in KINDS
        assert len(one.arxiv) == 10
        assert all(family in ("ppl/", "acc/") for family in wanted.get("metrics", ()))


@pytest.mark.parametrize("one", shipped_claims(), ids=lambda c: c.id)
def test_the_study_that_is_named_runs_the_algorithms_of_the_claim(one):
    path = ROOT / "sweeps" / f"{one.study}.yaml"
    text = path.read_text()
    named = [a for key in ("algo", "than", "algos") for a in one.settings.get(key, ()) if a != "*"]
    assert all(algo in text for algo in named)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "guess"}, "test kind 'guess'; there are better"),
        ({"kind": "better"}, "sets nothing for better; algo, metrics, schemes, than are needed"),
    ],
)
def test_a_wrong_claim_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        claim(change)


def test_claims_need_their_keys_and_an_id_of_their_own():
    with pytest.raises(ValueError, match="claim x has keys id; arxiv"):
        read_claims('[[claim]]\nid = "x"')
    text = "\n".join(
        f'[[claim]]\n{k}' for k in ['id="x"\npaper=""\narxiv=""\nplace=""\nquestion=""\nstatement=""\nstudy=""\n'
        'published=[]\ntest={kind="correlation"}'] * 2
    )  # fmt: skip
    with pytest.raises(ValueError, match="claims x are stated more than once"):
        read_claims(text)


def as_evaluated(record, windows):
    """The record's protocol says that at most these windows were read."""
    record["identity"]["evaluation"]["max_windows"] = windows


def test_the_same_windows_under_two_protocols_count_once():
    made = Records().add("rtn", effects=0.1, texts=("a",)).add("hqq", texts=("a",))
    for record in list(made.records):
        as_evaluated(record, WINDOWS)
        half = {**record, "fingerprint": f"{record['fingerprint']}-half", "identity": {**record["identity"]}}
        half["identity"]["evaluation"] = {"seq_len": 64, "max_windows": WINDOWS // 2, "limit": None}
        made.records.append(half)
        made.rows[half["fingerprint"]] = made.rows[record["fingerprint"]][: WINDOWS // 2]
    found = made.one("algorithm")
    assert f"on 1 text (a); {WINDOWS} windows" in found.confidence


def test_the_protocol_that_most_recipes_have_is_used_though_another_is_longer():
    assert usual([{"ppl/a [64 x 8]": 8}, {"ppl/a [64 x 8]": 8, "ppl/a [64 x 16]": 16}]) == ("ppl/a [64 x 8]",)
    assert usual([{"ppl/a [64 x 8]": 8, "ppl/a [64 x 16]": 16, "ppl/b [64]": 4}]) == (
        "ppl/a [64 x 16]",
        "ppl/b [64]",
    )


def test_texts_that_no_recipe_shares_with_those_of_others_do_not_silence_the_answer():
    made = Records().add("rtn", effects=0.1, texts=("a",)).add("hqq", texts=("a",))
    made.add("mse", effects=0.1, texts=("b", "c")).add("x", texts=("b", "c"))
    found = made.one("algorithm")
    assert "on 2 texts (b, c)" in found.confidence
    assert "left out for other texts" in found.confidence
    assert "hqq and rtn" in found.confidence


def test_every_answer_says_which_recipes_lack_its_texts():
    made = three_sets()
    made.add("gptq", calib="d", texts=("c",))
    assert made.one("calibration").confidence.endswith(": d")
    made = Records().add("rtn", "w2a16", effects=0.5, mb=2).add("rtn", "w4a16", mb=4)
    made.add("hqq", "w8a16", texts=("c",), mb=8)
    assert made.one("budget").confidence.endswith(": hqq w8a16")


def test_a_step_with_two_doubts_is_one_step():
    made = Records(noise=0.1)  # a difference of two means has a standard error of 0.02
    for i, bits in enumerate([2, 4, 6]):
        for scheme in (f"w{bits}a16", f"w{bits}a16g128"):
            made.add("rtn", scheme, effects=-0.03 * i, mb=bits)
    found = made.one("budget").sentence
    assert "in 3 of 3 steps" in found
    assert "what the bytes of" in found
    assert " at the size of " in found


def at_margin(names, t=0.0, margin=0.05):
    """Recipes whose mean is beyond the margin by `t` standard errors of windows."""
    made = Records(noise=0.0).add("fp", "w16a16", texts=("a",))
    step = np.resize([-1.0, 1.0], WINDOWS)
    step += t * step.std(ddof=1) / np.sqrt(WINDOWS)
    floating = [v for _, _, v in made.rows["fp-w16a16-None-None"]]
    for name in names:
        made.add(name, "w8a8", texts=("a",))
        row = made.rows[f"{name}-w8a8-None-None"]
        losses = np.array(floating) + np.log1p(margin) + 0.01 * step
        made.rows[f"{name}-w8a8-None-None"] = [(m, i, v) for (m, i, _), v in zip(row, losses, strict=True)]
    return made


LOSSLESS = {"kind": "lossless", "algo": ["x*"], "schemes": ["w8a8"], "margin": 0.05}


def test_many_recipes_at_the_margin_do_not_make_one_surely_fail():
    assert at_margin(["x"], t=2.5).one("claim", claim(LOSSLESS)).verdict == "contradicted"
    # One of 20 is as far beyond the margin as chance alone makes the farthest of 20 be.
    many = at_margin(["x"], t=2.5)
    others = at_margin([f"x{i}" for i in range(19)])
    many.records += [r for r in others.records if r["labels"]["algo"] != "fp"]
    many.rows |= {name: rows for name, rows in others.rows.items() if not name.startswith("fp")}
    floating = np.array([v for _, _, v in many.rows["fp-w16a16-None-None"]])
    for name, rows in others.rows.items():
        if not name.startswith("fp"):
            losses = floating + np.log1p(0.05) + 0.01 * np.resize([-1.0, 1.0], WINDOWS)
            many.rows[name] = [(m, i, v) for (m, i, _), v in zip(rows, losses, strict=True)]
    found = many.one("claim", claim(LOSSLESS))
    assert found.verdict == "undecided"
    assert "corrected for the claim's 20 tests" in found.confidence


@pytest.mark.parametrize(
    "scheme",
    ["w3a16g128-[mlp.*:w16a16]", "w3a16kv4g128", "w3a16kv4", "w4a16-wnf4", "w4a16g128-[o_proj:w8a16]"],
)
def test_a_claim_is_not_about_other_layers_formats_or_caches(scheme):
    assert not of_schemes(scheme, ["w3a16*", "w4a16*", "w4a16g*"])
    assert of_schemes(scheme, ["*"])


@pytest.mark.parametrize("scheme", ["w3a16", "w3a16g128", "w3a16-wsym", "w4a16g16-wrealzero-wscale3"])
def test_a_claim_is_about_all_integer_variants_that_its_pattern_fits(scheme):
    assert of_schemes(scheme, ["w3a16*", "w4a16g*"])
    assert of_schemes("w16a16kv4-kvsym", ["w16a16kv4*"])


def test_an_order_pairs_schemes_that_are_equal_but_for_the_bits():
    made = Records()
    for tail in ("g128", "g128-wsym"):
        made.add("rtn", f"w4a16{tail}").add("rtn", f"w2a16{tail}", effects=0.5)
    test = {
        "kind": "order", "less": ["w4a16g128*"], "less_beside": [""], "more": ["w2a16g128*"], "more_beside": [""],
        "algos": ["rtn"], "metrics": ["ppl/"],
    }  # fmt: skip
    found = made.one("claim", claim(test))
    assert "holds in 2 of 2 comparisons" in found.sentence


@pytest.mark.parametrize(
    ("p", "words"), [(0.5, "p = 0.500"), (0.0004, "p < 0.001"), (float("nan"), "p unknown")]
)
def test_a_p_value_is_written_in_sentences_as_in_tables(p, words):
    assert shown_p(p) == words
    assert p_text(p) in words.replace(" ", "")
