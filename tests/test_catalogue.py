"""The catalogue: it agrees with its YAML files, with transformers and with itself; `qbench models` shows it."""

import json
import re
import subprocess
import sys

import pytest
import torch

from qbench.cli.models import models
from qbench.errors import UsageError
from qbench.models.catalogue import Entry, entries, text, write, written
from qbench.models.families import DESCRIBED
from qbench.sweep.settings import Jobs
from qbench.sweep.shipped import CONF
from qbench.zoo import WEIGHTS
from tests.test_grid import COMPOSER

ALL = list(entries().values())
OF_HUB = [entry for entry in ALL if not entry.embedded]
FAMILIES = sorted({entry.family for entry in OF_HUB if not entry.remote_code})
COUNTED = sorted({entry.family for entry in OF_HUB if entry.config})


def listed(capsys, *arguments: str) -> str:
    assert models(list(arguments)) == 0
    return capsys.readouterr().out


def names_in(out: str) -> set[str]:
    return {line.split()[0] for line in out.splitlines() if line.split()} & entries().keys()


# The files


def test_the_yaml_files_are_made_from_the_catalogue(tmp_path):
    for path in write(tmp_path):
        assert (CONF / "model" / path.name).read_text() == path.read_text(), (
            "the YAML file is not what the catalogue says; run `python -m qbench.models.catalogue conf/model`"
        )


def test_a_name_has_its_file_and_a_file_its_name():
    assert {path.stem for path in (CONF / "model").glob("*.yaml")} - {"hf"} == set(entries())


@pytest.mark.parametrize("entry", ALL, ids=lambda entry: entry.name)
def test_a_name_builds_its_model_and_trusts_no_code(entry):
    model = Jobs().job(COMPOSER.config([f"model={entry.name}"])).model
    assert (model.id, model.revision, model.attn) == (entry.id, entry.revision, entry.attn)
    assert not model.trust_remote_code


def test_a_yaml_file_says_what_holds_its_model_back():
    for entry in OF_HUB:
        first = text(entry).splitlines()[0]
        assert ("gated" in first) == entry.gated
        assert ("trust_remote_code=true" in first) == entry.remote_code


# What is said of a model


def test_models_are_told_apart_by_id_and_revisions_are_commits():
    ids = [entry.id for entry in OF_HUB]
    assert len(ids) == len(set(ids))
    pins = [entry.revision for entry in ALL if entry.revision]
    assert all(re.fullmatch(r"[0-9a-f]{40}", pin) for pin in pins)
    assert len(pins) == len(set(pins)), "a commit belongs to one repository"


@pytest.mark.parametrize("family", COUNTED)
def test_parameters_are_those_of_the_dimensions(family):
    """Counted on a skeleton, which has no weights: even the largest is made in a fraction of a second."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for entry in OF_HUB:
        if entry.family == family and entry.config:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **entry.dimensions))
            assert sum(p.numel() for p in model.parameters()) == entry.parameters, entry.name


@pytest.mark.parametrize("entry", [e for e in ALL if e.embedded], ids=lambda entry: entry.name)
def test_embedded_parameters_and_bytes_are_those_of_the_file(entry):
    from safetensors.torch import load_file

    weights = load_file(WEIGHTS / entry.id.removeprefix("zoo/") / "model.safetensors").values()
    assert sum(weight.numel() for weight in weights) == entry.parameters
    assert sum(weight.nbytes for weight in weights) == entry.bytes


@pytest.mark.parametrize("name", ["405b", "235b", "176b", "70b", "13b", "7b", "1.7b", "560m", "125m"])
def test_a_count_is_about_what_the_name_says(name):
    """Names round, and leave out embeddings at will: within a fifth; a wrong digit or dimension is further off."""
    size = float(name[:-1]) * {"b": 1e9, "m": 1e6}[name[-1]]
    found = [entry for entry in OF_HUB if name in entry.name.split("-") and entry.config]
    assert found
    assert all(0.8 < entry.parameters / size < 1.25 for entry in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_without_remote_code_is_described_and_has_a_class(family):
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    assert family in DESCRIBED
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.for_model(family))]
    attentions = {entry.attn for entry in OF_HUB if entry.family == family}
    assert attentions == {"sdpa" if kind._supports_sdpa else "eager"}


def test_only_what_transformers_lacks_needs_remote_code():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    for entry in OF_HUB:
        assert (entry.family not in CONFIG_MAPPING_NAMES) == entry.remote_code, entry.name


def test_every_model_of_a_published_number_has_a_name():
    from qbench.report.published import load

    assert set(load()["model_id"].dropna()) <= {entry.id for entry in ALL}


@pytest.mark.parametrize(
    ("parameters", "config", "said"),
    [
        (6_738_415_616, {"x": 1}, "6.74B"), (999_885_952, {"x": 1}, "1.00B"), (405_853_388_800, {"x": 1}, "406B"),
        (984_192, {"x": 1}, "984K"), (6_000_000_000, {}, "6B"), (1_600_000_000, {}, "1.6B"),
    ],
)  # fmt: skip
def test_sizes_have_three_digits_where_they_were_counted(parameters, config, said):
    assert written(Entry("a", "a/b", "A", "llama", parameters, "", "", config=config)) == said


# The command


def test_everything_is_listed_and_the_next_step_said(capsys):
    out = listed(capsys)
    assert names_in(out) == set(entries())
    assert "embedded" in out
    assert "qbench model=nano-llama algo=gptq" in out
    assert "model=hf model.id=" in out
    assert "\x1b" not in out, "no colours where nobody looks"


def test_words_and_keys_narrow_the_list(capsys):
    assert names_in(listed(capsys, "family=opt")) == {e.name for e in ALL if e.family == "opt"}
    assert names_in(listed(capsys, "LLAMA-2", "chat")) == {f"llama-2-{size}b-chat" for size in (7, 13, 70)}
    assert names_in(listed(capsys, "pinned=yes")) == {e.name for e in ALL if e.revision}
    assert names_in(listed(capsys, "remote=yes")) == {e.name for e in ALL if e.remote_code}


def test_what_a_model_needs_first_is_said(capsys):
    gated, remote = listed(capsys, "llama-3.1-405b"), listed(capsys, "chatglm3-6b-32k")
    assert "https://huggingface.co/meta-llama/Llama-3.1-405B" in gated
    assert "hf auth login" in gated
    assert "not pinned" in gated
    assert "qbench model=chatglm3-6b-32k algo=gptq model.trust_remote_code=true" in remote
    quiet = listed(capsys, "pinned=yes", "family=mamba")
    assert not any(word in quiet for word in ("gated:", "remote code:", "not pinned:"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama-2-7n"], "did you mean llama-2-7b"),
        (["xyzzy"], "no model fits 'xyzzy'; there are Embedded, OPT"),
        (["family=op"], "family is one of baichuan, bloom"),
        (["famly=opt"], "filters by words and family="),
        (["opt", "gated=yes"], "no model is all of opt, gated=yes"),
    ],
)
def test_what_nothing_fits_is_said_with_what_there_is(arguments, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        models(arguments)


def test_a_model_is_here_once_all_of_its_shards_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    entry = entries()["llama-2-7b"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    folder = tmp_path / f"models--{entry.id.replace('/', '--')}" / "snapshots" / entry.revision
    folder.mkdir(parents=True)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", shards, strict=True))})
    )
    (folder / shards[0]).touch()
    assert not entry.is_here
    assert "to fetch, 13 GB" in listed(capsys, "llama-2-7b-hf")
    (folder / shards[1]).touch()
    assert entry.is_here
    assert names_in(listed(capsys, "here=yes")) == {e.name for e in ALL if e.embedded} | {entry.name}


def test_a_model_that_is_here_at_another_commit_is_not_here(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    entry = entries()["gpt2"]
    folder = tmp_path / f"models--{entry.id.replace('/', '--')}" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    assert not entry.is_here


def test_the_list_loads_neither_torch_nor_transformers():
    code = (
        "import sys; from qbench.cli.models import models; models([]);"
        "sys.exit(bool({'torch', 'transformers', 'hydra', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
