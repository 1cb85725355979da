"""The command that a record is given parses back to the job of the record."""

import json
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qbench.models.load import ModelRef
from qbench.sweep.retype import _written, command_of
from qbench.sweep.settings import Jobs
from qbench.sweep.shipped import CONF
from qbench.sweep.steps import choose_custom
from tests.test_grid import COMPOSER

ALGORITHMS = sorted(path.stem for path in (CONF / "algo").glob("*.yaml") if path.stem != "custom")
SCHEMES = sorted(path.stem for path in (CONF / "scheme").glob("*.yaml"))


def record_of(*arguments: str) -> dict:
    config = COMPOSER.config(choose_custom([*arguments]))
    job = Jobs().job(config)
    # Through JSON, as a record keeps it: tuples become lists.
    return json.loads(
        json.dumps({"config": config, "identity": job.identity(), "fingerprint": job.fingerprint})
    )


def retyped(*arguments: str) -> list[str]:
    """The arguments of the command, which give the same job."""
    record = record_of(*arguments)
    command = command_of(record)
    assert command is not None
    words = shlex.split(command)
    assert words[0] == "qbench"
    assert Jobs().job(COMPOSER.config(words[1:])).fingerprint == record["fingerprint"]
    return words[1:]


@pytest.mark.parametrize(
    ("typed", "shortest"),
    [
        ("algo=rtn", "algo=rtn"),
        ("algo=rtn wbits=3 calib=stdlib_code calib.n_samples=3", "algo=rtn scheme=w3a16g128"),
        ("algo=gptq algo.damp=0.05 seed=5 eval=quick", "algo=gptq eval=quick seed=5 algo.damp=0.05"),
        (
            "algo=awq algo.steps.clip=null scheme=fp8 model=nano-llama eval.max_windows=3",
            "algo=awq model=nano-llama scheme=fp8 eval.max_windows=3 algo.steps.clip=null",
        ),
        (
            "algo.transform=quarot algo.round=gptq kvbits=4 seed=2 model.dtype=bfloat16",
            "algo=custom seed=2 kvbits=4 model.dtype=bfloat16 algo.transform=quarot algo.round=gptq",
        ),
        (
            "algo=spinquant seed=2 scheme=w4a4 eval=perplexities",
            "algo=spinquant eval=perplexities scheme=w4a4 seed=2",
        ),
        ("algo=fp eval=basic", "algo=fp eval=basic"),
    ],
)
def test_a_command_says_what_departs_from_the_defaults_and_no_more(typed, shortest):
    assert sorted(retyped(*typed.split())) == sorted(shortest.split())


def test_what_needs_quotes_comes_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my text, it's.txt").write_text("some words here and there\n" * 400)
    words = retyped(
        "algo=gptq", "calib=text", "calib.path='my text, it\\'s.txt'", "calib.seq_len=64",
        "scheme.overrides={0.*: w16a16, *down_proj: w8a16g64}", "eval.ppl=['my text, it\\'s.txt']", "eval.tasks=[]",
    )  # fmt: skip
    assert {word.partition("=")[0] for word in words} == {
        "algo", "calib", "calib.path", "calib.seq_len", "scheme.overrides", "eval.ppl", "eval.tasks",
    }  # fmt: skip


def test_mixtures_steps_with_options_and_a_folder_come_back(tmp_path):
    ModelRef("zoo/nano-llama").load().save_pretrained(tmp_path / "a model")
    ModelRef("zoo/nano-llama").tokenizer().save_pretrained(tmp_path / "a model")
    words = retyped(
        "algo=custom", "algo.steps=[smoothquant,gptq]", "algo.options={gptq: {damp: 0.02}}", "scheme=w8a8", "model=hf",
        f"model.id='{tmp_path}/a model'", "calib=mix", "calib.mix={stdlib_docs: 1, stdlib_code: 2.5}",
        "eval.shots={stdlib_cloze: 2}",
    )  # fmt: skip
    assert f"model.id='{tmp_path}/a model'" in words
    assert "calib.mix={stdlib_docs:1,stdlib_code:2.5}" in [word.replace("1.0", "1") for word in words]


def test_no_command_is_given_that_makes_another_job():
    record = record_of("algo=gptq")
    assert command_of(record | {"identity": record["identity"] | {"engine": 0}}) is None
    mine = record["config"] | {"algo_name": "mine", "algo": {"_target_": "elsewhere.Mine"}}
    assert command_of(record | {"config": mine}) is None


@pytest.mark.slow
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_comes_back_by_its_name(algo):
    assert retyped(f"algo={algo}")[0] == f"algo={algo}"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_comes_back_by_its_name(scheme):
    assert retyped("algo=rtn", f"scheme={scheme}") == (
        ["algo=rtn"] if scheme == "w4a16g128" else ["algo=rtn", f"scheme={scheme}"]
    )


TEXTS = st.text(
    st.characters(codec="utf-8", exclude_characters="\r\n", exclude_categories=["C"]), max_size=12
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.from_regex(r"[a-z_*.0-9/]{0,4}[a-z*][ :,=]?[a-z]", fullmatch=True), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(VALUES)
@example("Aª")  # a letter, and no letter of Hydra's
def test_every_value_is_written_as_hydra_reads_it(value):
    read = OverridesParser.create().parse_override(f"key={_written(value)}").value()
    assert read == value
    assert not isinstance(value, str) or isinstance(read, str)
