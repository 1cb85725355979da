"""A report of 10,000 jobs fits a laptop's memory."""

import json
import subprocess
import sys

import pytest

from qbench.track.records import RecordStore

from .conftest import ROOT

BENCHMARK = ROOT / "benchmarks" / "report.py"
JOBS, FAILED = 10_000, 100
SAMPLES = 2 * 24 + 64  # of a job: windows of two texts, and documents
LIMIT = 2048  # MiB


@pytest.mark.slow
def test_ten_thousand_jobs_are_tabulated_in_two_gibibytes(tmp_path):
    def command(name, *arguments):
        shell = [sys.executable, str(BENCHMARK), name, str(tmp_path), *arguments]
        return subprocess.run(shell, check=True, capture_output=True, text=True, timeout=1200).stdout

    command("make", str(JOBS))
    found = json.loads(command("read"))
    print(found)  # times are kept in benchmarks/README.md, and not promised here
    assert found["jobs"] == JOBS
    assert found["rows"] == (JOBS - FAILED) * SAMPLES
    assert found["MiB"] <= LIMIT

    lines = (tmp_path / "tables" / "summary.csv").read_text().splitlines()
    assert len(lines) == 1 + JOBS
    assert sum("failed: " in line for line in lines) == FAILED
    models = {record["labels"]["model"] for record in RecordStore(tmp_path).all()}
    assert {line.partition(",")[0] for line in lines[1:]} == models
