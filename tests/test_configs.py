"""Every choice in conf/ composes and builds, and so does every study in sweeps/."""

import hashlib
import json
import re

import pytest
from hydra import compose, initialize_config_dir

from qbench.job import Job, _cached_canonical
from qbench.models.catalogue import entries
from qbench.quant.scheme import Scheme
from qbench.sweep.compose import plain
from qbench.sweep.schema import Settings
from qbench.sweep.settings import Jobs
from qbench.sweep.shipped import CONF

GROUPS = ("algo", "scheme", "model", "calib", "eval", "tracker", "launcher")
OF_HUB = {f"model={entry.name}" for entry in entries().values() if not entry.embedded}
# Models of the hub are built by tests/test_catalogue.py.
CHOICES = [
    choice for g in GROUPS for path in sorted((CONF / g).glob("*.yaml"))
    if (choice := f"{path.parent.name}={path.stem}") not in OF_HUB
]  # fmt: skip


NEEDS = {
    "model=hf": ["model.id=zoo/nano-llama"],
    "algo=dgq": ["abits=8"],
    "algo=llm_int8": ["abits=8"],
    "algo=osplus": ["abits=8"],
    "algo=smoothquant": ["abits=8"],
}


def config_of(*overrides: str) -> dict:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=list(overrides), return_hydra_config=True)
        return plain(config, config.hydra.runtime.choices["algo"])


def settings_of(*overrides: str) -> Settings:
    return Jobs().settings(config_of(*overrides))


def job_of(*overrides: str) -> Job:
    return Jobs().job(config_of(*overrides))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_builds(choice):
    extra = NEEDS.get(choice, [])
    job = job_of(choice, *extra)
    assert job.fingerprint == job_of(choice, *extra).fingerprint


@pytest.mark.parametrize(
    "path",
    [p for p in sorted((CONF / "scheme").glob("*.yaml")) if re.fullmatch(r"w\d+a\d+(kv\d+)?(g\d+)?", p.stem)],
    ids=lambda p: p.stem,
)
def test_a_scheme_is_what_its_name_says(path):
    ours, named = job_of(f"scheme={path.stem}").scheme, Scheme.parse(path.stem)
    assert str(ours).removesuffix("-wsym") == str(named)
    assert str(ours).endswith("-wsym") == (named.activation is not None), (
        "symmetric weights go with activation bits"
    )


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONF)))
def test_every_config_begins_with_what_it_is(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("#")
    if lines[0].startswith("# @package"):
        assert lines[1].startswith("#")


def test_single_keys_override_the_scheme():
    scheme = job_of("scheme=w4a16g128", "wbits=3", "group_size=64").scheme
    assert str(scheme) == "w3a16g64"
    assert str(job_of("wbits=4", "group_size=-1").scheme) == "w4a16"


def fingerprint(*overrides: str) -> str:
    return job_of(*overrides).fingerprint


@pytest.mark.parametrize(
    "change",
    ["algo.damp=0.02", "wbits=3", "calib.n_samples=8", "calib=stdlib_code", "model=nano-llama", "seed=1",
     "eval.max_windows=8", "eval.ppl=[stdlib_docs]", "eval.limit=8", "model.dtype=bfloat16", "algo=rtn"],
)  # fmt: skip
def test_what_can_change_a_number_changes_the_fingerprint(change):
    assert fingerprint("algo=gptq", change) != fingerprint("algo=gptq")


@pytest.mark.parametrize(
    "change",
    [
        "results=elsewhere",
        "tracker=none",
        "force=true",
        "eval.batch_size=2",
        "data.root=/tmp",
        "baseline=false",
        "calib.batch_size=2",
        "launcher=inline",
        "job.timeout=60",
    ],
)
def test_what_cannot_change_a_number_does_not(change):
    assert fingerprint("algo=gptq", change) == fingerprint("algo=gptq")


@pytest.mark.parametrize("change", ["calib=stdlib_code", "seed=1", "calib.n_samples=8"])
def test_calibration_is_no_part_of_a_data_free_job(change):
    assert fingerprint("algo=rtn", change) == fingerprint("algo=rtn")


@pytest.mark.parametrize("choice", [c for c in CHOICES if c.startswith("algo=")])
def test_the_fingerprint_is_the_hash_of_the_identity(choice):
    """It is put together from the parts' texts."""
    job = job_of(choice, *NEEDS.get(choice, []))
    text = json.dumps(job.identity(), sort_keys=True, separators=(",", ":"))
    assert job.fingerprint == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_two_ways_of_saying_the_same_are_the_same_job():
    assert fingerprint("scheme=w3a16g64") == fingerprint("wbits=3", "group_size=64")
    assert fingerprint("algo=fp", "wbits=4") == fingerprint("algo=fp", "wbits=2")


def test_a_new_revision_of_an_algorithm_is_another_job(monkeypatch):
    from qbench.algorithms.gptq import GPTQ

    before = fingerprint("algo=gptq")
    monkeypatch.setattr(GPTQ, "revision", GPTQ.revision + 1)
    _cached_canonical.cache_clear()
    assert fingerprint("algo=gptq") != before
    _cached_canonical.cache_clear()
