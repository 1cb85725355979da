"""Two recipes side by side: which are meant, what differs, and whether it is sure."""

import io
import re

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from qbench.cli.compare import compare as command
from qbench.errors import UsageError
from qbench.report.item_by_item import changed_documents, flips, windows
from qbench.report.pairs import SAME, UNSURE
from qbench.report.side_by_side import compare, save, show
from qbench.report.sides import find
from qbench.track.records import RecordStore

WINDOWS = 40
HARD = np.random.default_rng(0).normal(3, 1, WINDOWS)


def losses(shift: float, seed: int, noise: float = 0.01) -> np.ndarray:
    """Windows of very different difficulty; a recipe adds its shift and a little noise."""
    return HARD + shift + np.random.default_rng(seed).normal(0, noise, WINDOWS)


@pytest.fixture
def store(tmp_path):
    store = RecordStore(tmp_path / "results")
    store.prepare()
    return store


@pytest.fixture
def add(store):
    """Write the record of one job, `ppl/docs` and `acc/<task>` made from their items."""
    count = iter(range(1000))

    def write(
        algo: str, fingerprint: str, calib: str | None = None, seed: int | None = None, *, ppl=None, acc=None,
        metrics=None, n_samples=16, max_windows=None, reason=None, errors=(), text="docs",
        ppl_of="docs", device="CPU",
    ) -> None:  # fmt: skip
        samples = [{"metric": f"ppl/{ppl_of}", "item": i, "value": float(v)} for i, v in enumerate(ppl or ())]
        found = {"bits_per_weight": 4.5} | (metrics or {})
        if ppl is not None:
            found[f"ppl/{ppl_of}"] = float(np.exp(np.mean(ppl)))
        for task, answers in (acc or {}).items():
            found[f"acc/{task}"] = float(np.mean(answers))
            samples += [
                {
                    "metric": f"acc/{task}",
                    "item": i,
                    "value": float(v),
                    "part": "even" if i % 2 == 0 else "odd",
                }
                for i, v in enumerate(answers)
            ]
        drawn = None if calib is None else {"name": calib, "n_samples": n_samples, "seed": seed}
        status = {"status": "done", "metrics": found}
        if reason:
            status = {"status": "failed", "metrics": {}, "reason": reason}
        store.write(
            {
                "fingerprint": fingerprint.ljust(16, "0"),
                "labels": {
                    "model": "m", "algo": algo, "scheme": "w4a16", "wbits": 4, "abits": 16, "kvbits": 16,
                    "group_size": None, "calib": calib, "seed": seed,
                },
                "identity": {
                    "model": {"id": "m"}, "algorithm": {"name": algo.upper(), "damp": 0.01}, "scheme": "w4a16",
                    "calib": drawn,
                    "evaluation": {"ppl": [text], "tasks": ["quiz"], "seq_len": 512, "max_windows": max_windows,
                                   "limit": None},
                },
                "environment": {"versions": {"python": "3"}, "git_commit": "abc", "command": f"of {algo}"},
                "device": device, "config": {"algo_name": algo, "calib": drawn, "eval": {"batch_size": 4}},
                "block_errors": list(errors), "started": f"2026-01-01T00:00:{next(count):02}",
            } | status,
            samples,
        )  # fmt: skip

    return write


@pytest.fixture
def beside(store):
    def of(a: str, b: str):
        records = list(store.all())
        return compare(find(a, records, store), find(b, records, store), store)

    return of


def pair(comparison, metric="ppl/docs"):
    return next(p for p in comparison.found.pairs if p.metric == metric)


def test_a_planted_difference_is_found_and_said_of_b(add, beside):
    a, b = losses(0.0, 1), losses(-0.05, 2)
    add("rtn", "aaaa1", ppl=list(a))
    add("gptq", "bbbb1", "c4", 0, ppl=list(b))
    found = pair(beside("rtn", "gptq"))
    assert found.verdict == "better"
    assert found.difference.effect == pytest.approx(np.mean(b - a))
    assert found.p == pytest.approx(stats.ttest_rel(b, a).pvalue)  # one metric: nothing to correct for
    assert pair(beside("gptq", "rtn")).verdict == "worse"
    row = beside("rtn", "gptq").tables[""].table.rows[0]
    assert (row[1].mark, row[2].mark) == ("worse", "best")
    assert row[3].text == f"{np.expm1(np.mean(b - a)):+.1%}"


def test_no_difference_is_not_sure_and_the_least_that_would_show_is_told(add, beside):
    add("rtn", "aaaa1", ppl=list(losses(0.0, 1)))
    add("gptq", "bbbb1", "c4", 0, ppl=list(losses(0.0, 3)))
    comparison = beside("rtn", "gptq")
    assert pair(comparison).verdict == UNSURE
    assert any(
        "the least that the items would show 80%" in note for note in comparison.tables[""].table.notes
    )
    add("same", "cccc1", ppl=list(losses(0.0, 1)))
    assert pair(beside("rtn", "same")).p == 1.0
    assert pair(beside("rtn", "same"), "bits_per_weight").verdict == SAME


def test_jobs_that_differ_in_the_seed_are_draws_and_their_spread_counts(add, beside):
    """Each seed alone is far from the other recipe; seeds of one recipe differ by more."""
    for seed, shift in enumerate((-0.3, 0.3, -0.2, 0.25)):
        add("gptq", f"bbbb{seed}", "c4", seed, ppl=list(losses(shift, seed)))
        add("awq", f"cccc{seed}", "c4", seed, ppl=list(losses(shift + 0.05, 10 + seed)))
    one = pair(beside("bbbb0", "cccc0"))
    several = pair(beside("gptq", "awq"))
    assert one.verdict == "worse"
    assert several.verdict == UNSURE
    assert "Welch over draws" in several.difference.test
    assert len(several.a.records) == 4
    means = [[losses(s + d, i + k).mean() for i, s in enumerate((-0.3, 0.3, -0.2, 0.25))]
             for d, k in ((0.05, 10), (0.0, 0))]  # fmt: skip
    assert several.p == pytest.approx(stats.ttest_ind(*means, equal_var=False).pvalue)


def test_p_values_are_corrected_for_the_metrics_that_have_items(add, beside):
    answers = np.arange(32) % 2
    other = answers.copy()
    other[:6] = 1  # three wrong ones become right
    add("rtn", "aaaa1", ppl=list(losses(0.0, 1)), acc={"quiz": answers})
    add("gptq", "bbbb1", "c4", 0, ppl=list(losses(0.05, 2)), acc={"quiz": other})
    comparison = beside("rtn", "gptq")
    quiz, ppl = pair(comparison, "acc/quiz"), pair(comparison)
    assert ppl.p == pytest.approx(2 * ppl.difference.p)
    assert quiz.p == quiz.difference.p == pytest.approx(2 * 0.5**3)
    assert quiz.effect == "+9.4 points"


def test_flips_are_counted_as_by_hand(add, beside):
    """Three right to wrong, one wrong to right, two right in both, four wrong in both."""
    a = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    b = [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    add("rtn", "aaaa1", acc={"quiz": a})
    add("gptq", "bbbb1", "c4", 0, acc={"quiz": b})
    comparison = beside("rtn", "gptq")
    row = flips(comparison.found).iloc[0]
    assert row[["documents", "right_to_wrong", "wrong_to_right", "both_right", "both_wrong", "net"]].tolist() == [
        10, 3, 1, 2, 4, -2,
    ]  # fmt: skip
    assert row["p"] == pytest.approx(2 * (1 + 4) / 2**4)  # of four changes, one or fewer to one side
    documents = changed_documents(comparison.found)
    assert documents["item"].tolist() == [0, 1, 2, 3]
    assert documents["part"].tolist() == ["even", "odd", "even", "odd"]
    assert documents[["A", "B"]].to_numpy().tolist() == [[1, 0], [1, 0], [1, 0], [0, 1]]
    shown = comparison.tables["tasks"].table.rows[0]
    assert [cell.text for cell in shown] == ["acc/quiz", "10", "3", "1", "2", "4", "-2", "0.625"]


def test_flips_of_several_draws_are_those_expected_of_one_of_each(add, beside):
    draws = {"gptq": [[1, 1, 0, 0], [1, 0, 0, 0]], "awq": [[1, 1, 1, 0], [0, 1, 1, 0]]}
    for algo, seeds in draws.items():
        for seed, answers in enumerate(seeds):
            add(algo, f"{ord(algo[0]):02x}{seed:02}", "c4", seed, acc={"quiz": answers})
    row = flips(beside("gptq", "awq").found).iloc[0]
    pairs = [(np.array(a), np.array(b)) for a in draws["gptq"] for b in draws["awq"]]
    assert row["right_to_wrong"] == np.mean([((a == 1) & (b == 0)).sum() for a, b in pairs])
    assert row["wrong_to_right"] == np.mean([((a == 0) & (b == 1)).sum() for a, b in pairs])
    assert row["both_right"] + row["both_wrong"] + row["right_to_wrong"] + row["wrong_to_right"] == 4


def test_the_windows_that_differ_most_come_first(add, beside):
    a = losses(0.0, 1)
    b = a.copy()
    b[[7, 11, 3]] += [0.5, -0.9, 0.2]
    add("rtn", "aaaa1", ppl=list(a))
    add("gptq", "bbbb1", "c4", 0, ppl=list(b))
    found = windows(beside("rtn", "gptq").found, 3)
    assert found["item"].tolist() == [11, 7, 3]
    assert found["a"].tolist() == pytest.approx(np.exp(a[[11, 7, 3]]))
    assert found["change"].tolist() == pytest.approx(np.expm1([-0.9, 0.5, 0.2]))


def test_protocols_that_differ_are_said_and_not_compared(add, beside):
    add("rtn", "aaaa1", ppl=list(losses(0.0, 1)), metrics={"kl/docs": 0.1})
    add("gptq", "bbbb1", "c4", 0, ppl=list(losses(0.5, 2)), max_windows=40, metrics={"rouge1/x": 0.2})
    comparison = beside("rtn", "gptq")
    assert [p.metric for p in comparison.found.pairs] == ["bits_per_weight"]
    notes = " ".join(comparison.tables[""].table.notes)
    assert "not measured alike: ppl/docs (A [512], B [512 x 40])" in notes
    assert "Only of A: kl/docs." in notes
    assert "Only of B: rouge1/x." in notes


def test_embedded_text_of_another_python_is_not_compared(add, beside):
    """The protocol does not name the version of a text that is not a file of the user's."""
    add("rtn", "aaaa1", ppl=list(losses(0.0, 1)), text="stdlib_docs@3.11.7", ppl_of="stdlib_docs")
    add("hqq", "bbbb1", ppl=list(losses(0.5, 2)), text="stdlib_docs@3.12.1", ppl_of="stdlib_docs")
    assert beside("rtn", "hqq").found.unlike == {
        "ppl/stdlib_docs": "A stdlib_docs@3.11.7, B stdlib_docs@3.12.1"
    }


def test_other_tokens_of_one_text_are_not_compared(add, beside):
    nll = float(np.mean(losses(0.0, 1)))
    for fingerprint, algo, bytes_per_token in (("aaaa1", "rtn", 4.0), ("bbbb1", "hqq", 3.0)):
        bpb = nll / np.log(2) / bytes_per_token
        add(algo, fingerprint, ppl=list(losses(0.0, 1)), metrics={"bpb/docs": bpb})
    unlike = beside("rtn", "hqq").found.unlike
    assert unlike["ppl/docs"] == unlike["bpb/docs"] == "other tokens: A 4.00 bytes each, B 3.00"


def test_a_word_may_be_a_fingerprint_labels_or_settings(add, store):
    add("rtn", "aaaa1")
    for seed in (0, 1):
        add("gptq", f"bbbb{seed}", "c4", seed)
        add("gptq", f"bbcc{seed}", "c4", seed, n_samples=128)
    records = list(store.all())

    def jobs(word: str) -> list[str]:
        return [r["fingerprint"].rstrip("0") for r in find(word, records, store).records]

    assert jobs("aaaa") == jobs("rtn") == jobs("m/rtn/w4a16") == jobs("algo=rtn,calib=none") == ["aaaa1"]
    assert jobs("gptq,n_samples=128") == ["bbcc", "bbcc1"]
    assert jobs("seed1/gptq,calib.n_samples=16") == jobs("algo=gptq,seed=1,n_samples=16") == ["bbbb1"]
    assert find("aaaa", records, store).word == "aaaa100000000000"


def test_words_that_mean_nothing_or_several_name_what_could_be_meant(add, store):
    add("rtn", "aaaa1")
    for i, calib in enumerate("abcdefghij"):
        add("gptq", f"bbbb{i}", calib, 0)
    add("awq", "cccc1", "a", 0, reason="ran out of memory")
    records = list(store.all())

    def said(word: str) -> str:
        with pytest.raises(ValueError, match=re.escape(repr(word))) as caught:
            find(word, records, store)
        return str(caught.value)

    several = said("gptq").splitlines()
    assert "10 recipes" in several[0]
    assert [line.split()[:2] for line in several[1:9]] == [
        [f"gptq/{c}", f"bbbb{i}".ljust(16, "0")] for i, c in enumerate("abcdefgh")
    ]
    assert several[9].strip() == "and 2 more"
    assert find("gptq/a", records, store).title.startswith("m gptq w4a16 a seed 0")
    assert "10 fingerprints begin so" in said("bbbb")
    assert "nearest: gptq" in said("gpqt")
    assert "nearest: calib" in said("clib=a")
    assert "nearest: m/rtn/w4a16" in said("rtn/a")
    assert "there are" in said("algo=zzz")
    assert "ran out of memory" in said("awq")
    assert "ran out of memory" in said("cccc")


def test_draws_that_failed_are_told(add, beside):
    add("rtn", "aaaa1", ppl=list(losses(0.0, 1)))
    add("gptq", "bbbb0", "c4", 0, ppl=list(losses(0.0, 2)))
    add("gptq", "bbbb1", "c4", 1, reason="not finite: ppl/docs")
    notes = " ".join(beside("rtn", "gptq").tables[""].table.notes)
    assert "Draws of B that failed and are not counted: bbbb100000000000 (not finite: ppl/docs)." in notes


def test_a_job_on_both_sides_is_refused(add, beside):
    for seed in (0, 1):
        add("gptq", f"bbbb{seed}", "c4", seed, ppl=list(losses(0.0, seed)))
    with pytest.raises(ValueError, match=r"bbbb1.* is on both sides"):
        beside("gptq", "gptq/seed1")
    assert pair(beside("gptq/seed0", "gptq/seed1")).difference.n == WINDOWS


def test_settings_that_differ_are_listed_once_identity_first(add, beside):
    add("gptq", "aaaa1", "c4", 0, n_samples=16)
    add("awq", "bbbb1", "c4", 0, n_samples=128, device="GPU")
    made = beside("gptq", "awq").tables["settings"]
    assert [[cell.text for cell in row] for row in made.table.rows] == [
        ["identity", "algorithm.name", "GPTQ", "AWQ"],
        ["identity", "calib.n_samples", "16", "128"],
        ["environment", "device", "CPU", "GPU"],
    ]
    assert made.table.notes == ("Equal in both: 10 of the identity, 3 of the config, 2 of the environment.",)


def test_block_errors_are_compared_by_depth_where_both_have_them(add, beside):
    add("rtn", "aaaa1")
    add("gptq", "bbbb0", "c4", 0, errors=[0.1, 0.2, 0.4])
    add("gptq", "bbbb1", "c4", 1, errors=[0.3, 0.2, 0.4])
    add("awq", "cccc0", "c4", 0, errors=[0.2, 0.5, 0.1 + 0.2])
    made = beside("gptq", "awq").tables["blocks"]
    assert made.numbers["block"].tolist() == ["mean", "0", "1", "2"]
    assert made.numbers["a"].tolist() == pytest.approx([0.8 / 3, 0.2, 0.2, 0.4])
    assert "block 1." in made.table.notes[-1]
    assert "blocks" not in beside("rtn", "gptq").tables


def test_files_are_written_and_are_the_same_again(add, beside, tmp_path):
    for seed in (0, 1):
        add("gptq", f"bbbb{seed}", "c4", seed, ppl=list(losses(0.0, seed)), acc={"quiz": [1, 0, 1, seed]},
            errors=[0.1, 0.2])  # fmt: skip
        add("awq", f"cccc{seed}", "c4", seed, ppl=list(losses(0.1, 5 + seed)), acc={"quiz": [0, 0, 1, 1]},
            errors=[0.2, 0.2])  # fmt: skip
    first, second = (
        {p.name: p.read_bytes() for p in save(beside("gptq/c4", "awq"), tmp_path / name, documents=True)}
        for name in ("one", "two")
    )
    assert first == second
    stem = "compare-gptq-c4-awq"
    for part in ("", "-costs", "-settings", "-tasks", "-windows", "-blocks"):
        assert {f"{stem}{part}.{suffix}" for suffix in ("csv", "md", "tex", "html")} <= first.keys()
    documents = pd.read_csv(io.BytesIO(first[f"{stem}-flips.csv"]))
    assert documents.to_numpy().tolist() == [["acc/quiz", 0, "even", 1, 0], ["acc/quiz", 3, "odd", 0.5, 1]]


@pytest.mark.parametrize("width", [80, 200])
def test_no_line_of_a_table_is_cut_or_wider_than_the_terminal(add, beside, width):
    add("rtn", "aaaa1", ppl=list(losses(0.0, 1)), acc={"a_task_of_some_length": np.arange(64) % 2})
    add("gptq", "bbbb1", "c4", 0, ppl=list(losses(0.1, 2)),
        acc={"a_task_of_some_length": np.arange(64) % 3 == 0})  # fmt: skip
    out = io.StringIO()
    show(beside("rtn", "gptq"), Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "acc/a_task_of_some_length" in out.getvalue()
    assert "…" not in "".join(line for line in lines if " … " not in line)


def test_the_command_shows_writes_and_says_what_to_type_next(add, store, capsys):
    add("rtn", "aaaa1", acc={"quiz": [1, 0, 1, 1]})
    add("gptq", "bbbb1", "c4", 0, acc={"quiz": [0, 0, 1, 1]})
    where = f"results={store.root}"
    assert command(["rtn", "algo=gptq,calib=c4", where]) == 0
    out = capsys.readouterr().out
    assert f"qbench compare rtn algo=gptq,calib=c4 {where} flips=true" in out.splitlines()[-1]
    assert (store.root / "tables" / "compare-rtn-algo-gptq-calib-c4.csv").is_file()
    assert command(["rtn", "gptq", where, "flips=true"]) == 0
    assert (store.root / "tables" / "compare-rtn-gptq-flips.csv").is_file()
    assert "qbench tables" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rtn"], "two recipes are compared, found rtn"),
        (["rtn", "gptq", "awq"], "two recipes are compared, found rtn, gptq, awq"),
        (["rtn", "gptq", "flips=perhaps"], "flips=perhaps is neither"),
        (["rtn", "gpqt"], "nearest: gptq"),
        (["rtn", "aaaa"], "on both sides"),
    ],
)
def test_bad_input_is_a_usage_error(add, store, words, message):
    add("rtn", "aaaa1")
    add("gptq", "bbbb1", "c4", 0)
    with pytest.raises(UsageError, match=message):
        command([*words, f"results={store.root}"])
