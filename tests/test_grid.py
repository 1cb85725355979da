"""Cells are composed from sections; the result must be what Hydra composes."""

import itertools

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_automatic_config_search_path
from hydra.errors import HydraException
from hydra.types import RunMode
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from qbench.sweep.compose import Composer, plain
from qbench.sweep.grid import expand
from qbench.sweep.shipped import CONF


def loader_and_master(folder=CONF):
    loader = ConfigLoaderImpl(create_automatic_config_search_path(None, None, str(folder)))
    return loader, loader.load_configuration("config", [], run_mode=RunMode.MULTIRUN)


LOADER, MASTER = loader_and_master()
COMPOSER = Composer(LOADER, MASTER)

# One of each axis, or nothing; every kind of override is among them.
AXES = [
    ["algo=gptq", "algo=awq", "algo=smoothquant"],
    ["scheme=w8a8", "scheme=w3a16g64", "scheme=w16a16kv4"],
    ["model=nano-llama", "model=hf"],
    ["calib=stdlib_code", "calib=random", "calib=nowhere"],
    ["wbits=3", "wbits=null"],
    ["algo.damp=0.05", "+algo.damp=0.05", "algo.steps.clip=null", "algo.steps.scale.n_grid=5", "~algo.block_size"],
    ["model.id=a/b", "model.revision='1,2'"],
    ["eval.ppl=[stdlib_docs]", "eval.tasks=[a,b]", "eval.limit=null"],
    ["results=elsewhere", "results='with space'"],
    ["tracker=none", "tracker.uri=x", "tracker.uri=sqlite:///${results}/${seed}.db"],
    ["seed=7", "+extra=1", "nonsense=1"],
    ["launcher=slurm", "launcher.workers=2"],
    ["group_size=${wbits}", "job.timeout=5"],
]  # fmt: skip
POINTS = st.tuples(*(st.sampled_from([None, *axis]) for axis in AXES)).map(
    lambda point: [override for override in point if override is not None]
)


def outcome(compose):
    """The config, or that there is none: which of two mistakes is met first is not promised."""
    try:
        return compose()
    except (HydraException, OmegaConfBaseException):
        return "an error"


def by_hydra(overrides):
    config = LOADER.load_sweep_config(MASTER, overrides)
    return plain(config, config.hydra.runtime.choices.algo)


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
@given(POINTS)
def test_a_config_put_together_is_the_one_that_hydra_composes(overrides):
    assert outcome(lambda: COMPOSER.config(overrides)) == outcome(lambda: by_hydra(overrides))


@pytest.mark.parametrize("override", [o for axis in AXES for o in axis])
def test_each_override_alone_agrees_with_hydra(override):
    assert outcome(lambda: COMPOSER.config([override])) == outcome(lambda: by_hydra([override]))


def test_a_choice_that_reaches_beyond_its_section_is_left_to_hydra(tmp_path):
    """A user's own choice may set keys of other sections; no cell may miss them."""
    (tmp_path / "algo").mkdir()
    (tmp_path / "config.yaml").write_text(
        "defaults: [_self_, algo: plain]\nwbits: 4\ncalib: {n: 1}\nuri: 'x-${wbits}'\n"
    )
    (tmp_path / "algo" / "plain.yaml").write_text("name: plain\n")
    (tmp_path / "algo" / "far.yaml").write_text("# @package _global_\nalgo: {name: far}\ncalib: {n: 2}\n")
    loader, master = loader_and_master(tmp_path)
    composer = Composer(loader, master)
    for overrides in (["algo=far"], ["algo=far", "wbits=3"], ["wbits=2"], ["algo=plain"]):
        config = loader.load_sweep_config(master, overrides)
        assert composer.config(overrides) == plain(config, config.hydra.runtime.choices.algo)


def test_equal_choices_are_the_same_object():
    """The planner builds what is shared once, and knows it by being the same."""
    one, other = (COMPOSER.config(["algo=awq", f"seed={seed}", "calib.n_samples=8"]) for seed in (1, 2))
    assert all(one[key] is other[key] for key in ("algo", "calib", "model", "eval", "tracker"))


def test_the_grid_is_the_product_of_its_axes():
    grid = expand(["algo=rtn,gptq", "wbits=4,3,2", "seed=range(2)", "model=nano-llama"], LOADER, MASTER)
    cells = list(grid)
    assert len(cells) == len(grid) == 12
    asked = [(c.config["algo_name"], c.config["wbits"], c.config["seed"]) for c in cells]
    assert asked == list(itertools.product(["rtn", "gptq"], [4, 3, 2], [0, 1]))
    assert cells[0].name == "algo=rtn wbits=4 seed=0"


def test_a_cell_that_cannot_be_composed_is_kept_with_its_problem():
    cells = list(expand(["algo=rtn,gtpq", "wbits=4"], LOADER, MASTER))
    assert cells[0].problem is None
    assert "did you mean gptq" in cells[1].problem


def test_the_default_config_composes_as_hydra_says():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", return_hydra_config=True)
        assert COMPOSER.config([]) == plain(config, config.hydra.runtime.choices.algo)
