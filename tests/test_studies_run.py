"""Every study runs from its grid to its tables, at embedded scale with tiny limits."""

import subprocess
import sys
from pathlib import Path

import pytest

from qbench.report.study import tables
from qbench.sweep.study import names, studies
from qbench.track.records import RecordStore

pytestmark = pytest.mark.slow

PAPERS = [study for name in names() for study in studies(name) if study.name == name and study.source]
TINY = [
    "model=nano-llama", "eval.max_windows=4", "eval.limit=4", "calib.n_samples=4", "calib.seq_len=64", "seed=0",
    "launcher.workers=2", "launcher.threads=1", "tracker=none", "job.timeout=300",
]  # fmt: skip
OK, SOME_FAILED = 0, 3


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The records of all studies, which have many jobs in common."""
    folder = tmp_path_factory.mktemp("studies")
    asked = [f"+sweep={study.name}" for study in PAPERS]
    command = [sys.executable, "-m", "qbench", "-m", *asked, *TINY, f"results={folder}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (OK, SOME_FAILED), done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("study", PAPERS, ids=lambda study: study.name)
def test_a_study_runs_from_its_grid_to_its_tables(study, results):
    store = RecordStore(results)
    made, lacking = tables(study.tables, list(store.all()), store, study.algorithms)
    assert not lacking
    assert all(one.table.rows for one in made.values())


def test_no_job_of_any_study_fails_but_those_that_learn_from_too_little(results):
    """On 256 tokens, what learns ranges or weights may end worse than it began, which is a failure by its own rule."""
    records = list(RecordStore(results).all())
    failed = [record for record in records if record["status"] == "failed"]
    other = [record for record in failed if "diverged, its loss grew" not in record["reason"]]
    assert not other, [(record["labels"], record["reason"]) for record in other]
    assert len(failed) < len(records) / 50
