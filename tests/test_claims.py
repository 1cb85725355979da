"""A job is held by one worker at a time, whatever happens to workers."""

import json
import os
import subprocess
import sys
import time

import pytest

from qbench.track.claims import Claims

JOB = "0123456789abcdef"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "claims").mkdir()
    return tmp_path / "claims"


@pytest.fixture
def claims(folder):
    return Claims(folder, worker="one")


def of_another_machine(claim):
    claim.path.write_text(json.dumps({"worker": "far", "machine": "elsewhere", "pid": 1, "born": 0}))


def test_what_is_held_cannot_be_taken(claims, folder):
    assert claims.take(JOB)
    assert claims.take(JOB) is None
    assert Claims(folder, worker="two").take(JOB) is None
    assert claims.held(JOB)


def test_what_is_given_back_can_be_taken_at_once_and_counts_as_no_loss(claims):
    for _ in range(3):
        claim = claims.take(JOB)
        assert claim is not None
        assert claim.broken == 0
        claim.give_back()
        assert not claims.held(JOB)


def test_what_is_finished_is_not_taken_again_by_who_cannot_see_its_record_yet(claims):
    """On a network file system another machine may go on seeing no record for half a minute."""
    since = claims.now()
    claim = claims.take(JOB, since)
    claim.finish()
    claim.give_back()
    assert claims.take(JOB, since) is None
    assert not claims.held(JOB)
    time.sleep(0.05)
    assert claims.take(JOB, claims.now()) is not None, "a later launch may run it again"


def test_one_of_many_processes_gets_the_job(folder):
    code = (
        "import sys, pathlib, time; from qbench.track.claims import Claims; c = Claims(pathlib.Path(sys.argv[1]));"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()));"
        "print(sum(c.take(f'job{i}') is not None for i in range(200)), flush=True); sys.stdin.read()"
    )
    start = str(time.time() + 1.5)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), start],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    taken = [int(process.stdout.readline()) for process in processes]
    for process in processes:
        process.communicate()
    assert sum(taken) == 200


def test_a_holder_that_died_here_loses_its_claim_at_once(folder, claims):
    code = (
        "import sys, os, pathlib; from qbench.track.claims import Claims;"
        f"Claims(pathlib.Path(sys.argv[1])).take('{JOB}'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)])
    claim = claims.take(JOB)
    assert claim is not None
    assert claim.broken == 1


def test_a_holder_elsewhere_is_believed_for_as_long_as_its_lease(folder):
    near = Claims(folder, lease=30.0, worker="near")
    claim = Claims(folder, worker="far").take(JOB)
    of_another_machine(claim)
    assert near.take(JOB) is None
    os.utime(claim.path, (time.time() - 31,) * 2)
    mine = near.take(JOB)
    assert mine is not None
    assert mine.broken == 1


def test_a_holder_that_slept_too_long_learns_that_it_lost_its_claim(folder):
    claim = Claims(folder, worker="far").take(JOB)
    of_another_machine(claim)
    os.utime(claim.path, (time.time() - 3600,) * 2)
    mine = Claims(folder, worker="near").take(JOB)
    claim.beat()
    assert claim.lost
    mine.beat()
    assert not mine.lost
    assert Claims(folder, worker="third").take(JOB) is None


def test_beating_keeps_a_claim(folder):
    claim = Claims(folder, worker="far").take(JOB)
    of_another_machine(claim)
    os.utime(claim.path, (time.time() - 3600,) * 2)
    claim.beat()
    assert Claims(folder, worker="near").take(JOB) is None


def test_losses_before_a_launch_do_not_count(folder, claims):
    claim = claims.take(JOB)
    of_another_machine(claim)
    os.utime(claim.path, (time.time() - 3600,) * 2)
    claims.reset([JOB])
    assert claims.take(JOB).broken == 0


def test_the_next_holder_learns_how_the_last_one_ended(folder, claims):
    claim = claims.take(JOB)
    of_another_machine(claim)
    os.utime(claim.path, (time.time() - 3600,) * 2)
    assert claims.last_death(Claims(folder).take(JOB))["reason"] == "worker far was lost without a word"
    claims.note_death(claim.path, "ended by SIGKILL", "the log")
    claim = claims.take("other")
    claims.note_death(claim.path, "ended by SIGKILL", "the log")
    of_another_machine(claim)
    os.utime(claim.path, (time.time() - 3600,) * 2)
    assert claims.last_death(claims.take("other")) == {"reason": "ended by SIGKILL", "log": "the log"}


def test_the_clock_is_that_of_the_file_system(folder, claims, monkeypatch):
    """A machine whose own clock is wrong by hours must not take what others hold."""
    claim = Claims(folder, worker="far").take(JOB)
    of_another_machine(claim)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 7200)
    assert claims.take(JOB) is None


def test_old_claims_are_swept_up_and_live_ones_are_not(folder, claims, monkeypatch):
    claims.take("over").give_back()
    live = claims.take(JOB)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 200_000)
    os.utime(live.path, (now() + 200_000,) * 2)
    claims.sweep_up()
    assert [path.name for path in folder.iterdir()] == [f"{JOB}.0"]
