"""Algorithms put together by the names of their steps."""

import pytest

from qbench.algorithms.autoround import AutoRound
from qbench.algorithms.base import Pipeline
from qbench.algorithms.dgq import DGQ
from qbench.algorithms.gptq import GPTQ
from qbench.algorithms.mse import MSEClip
from qbench.algorithms.rtn import RTN
from qbench.algorithms.smoothquant import SmoothQuant
from qbench.errors import Unsuitable
from qbench.sweep.shipped import CONF
from qbench.sweep.steps import choose_custom, in_full

from .test_configs import job_of

STEPS = sorted(path.stem for path in (CONF / "step").glob("*.yaml"))


def test_three_keys_make_a_pipeline():
    job = job_of("algo=custom", "algo.transform=smoothquant", "algo.round=gptq", "scheme=w8a8")
    assert tuple(job.algorithm) == (SmoothQuant(), GPTQ())
    assert job.algo == "smoothquant+gptq"


def test_a_list_of_steps_is_the_same_job_as_their_keys():
    by_keys = job_of("algo=custom", "algo.transform=smoothquant", "algo.round=gptq", "scheme=w8a8")
    by_list = job_of("algo=custom", "algo.steps=[smoothquant,gptq]", "scheme=w8a8")
    assert by_keys.fingerprint == by_list.fingerprint


def test_a_shipped_pipeline_put_together_by_hand_is_the_same_job():
    by_hand = job_of("algo=custom", "algo.transform=smoothquant", "algo.round=rtn", "scheme=w8a8")
    assert by_hand.fingerprint == job_of("algo=smoothquant", "scheme=w8a8").fingerprint


def test_one_step_alone_is_the_algorithm_itself():
    assert job_of("algo=custom", "algo.round=gptq").fingerprint == job_of("algo=gptq").fingerprint


def test_options_reach_their_step():
    job = job_of("algo=custom", "algo.round=gptq", "algo.options={gptq: {damp: 0.05}}")
    assert job.algorithm == GPTQ(damp=0.05)


def test_a_class_of_the_users_own_is_a_step():
    assert job_of("algo=custom", "algo.round=qbench.algorithms.rtn.RTN").algorithm == RTN()


def test_a_step_key_alone_chooses_the_custom_algorithm():
    assert choose_custom(["-m", "algo.round=gptq,rtn"]) == ["-m", "algo.round=gptq,rtn", "algo=custom"]
    assert choose_custom(["algo=gptq", "algo.damp=0.1"]) == ["algo=gptq", "algo.damp=0.1"]


@pytest.mark.parametrize(
    ("algo", "problem"),
    [
        ({"round": "gptk"}, "did you mean gptq"),
        ({"round": None}, "no step"),
        ({"round": "gptq", "options": {"awq": {}}}, "the steps are gptq"),
    ],
)
def test_what_is_no_algorithm_is_refused_with_the_reason(algo, problem):
    with pytest.raises(ValueError, match=problem):
        in_full(algo)


def test_steps_that_round_nothing_are_refused_before_loading():
    with pytest.raises(Unsuitable, match="algo=mse rounds nothing"):
        job_of("algo=custom", "algo.steps=[mse]")


def test_an_order_that_makes_no_sense_is_refused_before_loading():
    with pytest.raises(ValueError, match=r"got GPTQ .* -> SmoothQuant"):
        job_of("algo=custom", "algo.steps=[gptq,smoothquant]", "scheme=w8a8")


def test_a_choice_that_a_rounder_would_ignore_is_refused():
    class Stubborn(RTN):
        uses = frozenset()

    class Clip(RTN):
        kind = "clip"

    with pytest.raises(Unsuitable, match="chooses its own grids"):
        Pipeline((Clip(), Stubborn()))


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ("[hqq,mse,rtn]", "MSEClip chooses its own grids"),
        ("[hqq,lwc,rtn]", "OmniQuant chooses its own grids"),
        ("[dgq,lwc,rtn]", "OmniQuant chooses its own grids"),
        ("[dgq,autoround]", "AutoRound chooses its own grids"),
        ("[dgq,tesseraq]", "TesseraQ chooses its own grids"),
        ("[mse,spqr]", "SpQR chooses its own grids"),
        ("[awq_clip,awq_clip,rtn]", "AWQClip chooses its own grids"),
        ("[gptq,lora,lora]", "do one thing twice"),
        ("[quarot,spinquant,rtn]", "do one thing twice"),
        ("[smoothquant,quarot,rtn]", "QuaRot rewrites the whole model before SmoothQuant meets a block"),
    ],
)
def test_a_step_that_another_would_undo_is_refused_with_the_reason(steps, problem):
    with pytest.raises(Unsuitable, match=problem):
        job_of("algo=custom", f"algo.steps={steps}", "real_zero=true", "abits=8")


@pytest.mark.parametrize(
    "steps",
    [
        "[mse,hqq,rtn]",
        "[awq_clip,lwc,gptq]",
        "[dgq,gptq]",
        "[hqq,autoround]",
        "[quarot,smoothquant,mse,gptq]",
    ],
)
def test_steps_that_go_on_from_one_another_are_not(steps):
    job_of("algo=custom", f"algo.steps={steps}", "real_zero=true", "abits=8")


def test_groups_that_gptq_chooses_itself_are_chosen_by_no_clip():
    with pytest.raises(Unsuitable, match="GPTQ chooses its own grids"):
        Pipeline((MSEClip(), GPTQ(act_order=False, static_groups=False)))
    Pipeline((MSEClip(), GPTQ()))
    Pipeline((DGQ(), AutoRound(clip=False)))


@pytest.mark.parametrize("step", STEPS)
def test_every_step_has_its_place(step):
    """Each step's file builds a step whose hyperparameters are all written in the file."""
    from qbench.sweep.settings import build_algorithm

    config = in_full({"steps": [step], "seed": 3})
    algorithm = build_algorithm(step, config)
    written = set(config) - {"_target_"}
    assert written == set(algorithm.identity()) - {"name", "revision"}
    assert getattr(algorithm, "seed", 3) == 3, "a seed is written ${seed}"
