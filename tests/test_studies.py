"""Studies of papers: each reads, is a grid without a cell that cannot be, and its tables are of what it runs."""

import csv
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

from qbench.errors import UsageError
from qbench.job import Job
from qbench.report.cells import label
from qbench.report.spec import FigureSpec, TableSpec
from qbench.sweep.grid import Grid, unite
from qbench.sweep.plan import Plan, make_plan
from qbench.sweep.settings import Jobs
from qbench.sweep.shipped import SWEEPS
from qbench.sweep.study import Scale, Study, names, parts, studies
from tests.test_grid import COMPOSER, LOADER, MASTER

ALL = [study for name in names() if (SWEEPS / f"{name}.yaml").is_file() for study in studies(name)]
PAPERS = [study for study in ALL if study.source]  # the others are our own
PUBLISHED = Path(__file__).parents[1] / "qbench" / "published" / "numbers.csv"

of_papers = pytest.mark.parametrize("study", PAPERS, ids=lambda study: study.name)


def grid(study: Study, scale: Scale, *more: str) -> Grid:
    asked = parts(["-m", f"+sweep={study.name}", f"scale={scale}", *more])
    return Grid(unite(asked, LOADER, MASTER).products, COMPOSER)  # what is composed once serves all studies


@cache
def planned(name: str, results: Path) -> Plan:
    (study,) = studies(name)
    return make_plan(grid(study, "embedded", f"results={results}"), is_sweep=True)


@cache
def of_paper(name: str) -> list[Job]:
    """The jobs at the paper's scale, as far as they can be built without the models."""
    (study,) = studies(name)
    jobs, found = Jobs(), []
    for cell in grid(study, "paper"):
        assert cell.problem is None, f"{cell.name}: {cell.problem}"
        job = jobs.job(cell.config)
        job.algorithm.check(job.scheme)
        found.append(job)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("studies")


def jobs_of(study: Study, results: Path) -> list[Job]:
    """Those that an embedded run asks for, without floating point."""
    if not study.grids["embedded"]:
        return []
    return [job for job in planned(study.name, results).todo.values() if job.algo != "fp"]


def chosen(spec: TableSpec | FigureSpec, study: Study, jobs: Iterable[Job]) -> list[Job]:
    where = {"algo": tuple(study.algorithms)} | dict(spec.where)
    return [job for job in jobs if all(fits(job, key, patterns) for key, patterns in where.items())]


def fits(job: Job, key: str, patterns: Iterable[str]) -> bool:
    text = label({"labels": job.labels, "config": job.settings}, key)
    return any(fnmatchcase(text, pattern) for pattern in patterns)


def specs(study: Study) -> dict[str, TableSpec | FigureSpec]:
    return {**study.tables, **{f"figure {name}": spec for name, spec in study.figures.items()}}


def test_every_paper_of_the_protocols_has_its_studies():
    mine = {study.name.partition("/")[0] for study in PAPERS}
    assert {"llm_qbench", "qllm_eval", "mi_optimize"} < mine
    assert {"slim_llm", "easyquant", "comprehensive", "emergent"} < mine


@of_papers
def test_a_study_begins_with_its_source(study):
    first = (SWEEPS / f"{study.name}.yaml").read_text().splitlines()[0]
    assert first.startswith("#")
    assert "arXiv:" in first
    assert study.tables


@of_papers
def test_every_cell_of_a_study_can_run(study, results):
    if not study.grids["embedded"]:
        with pytest.raises(UsageError, match="there is paper"):
            grid(study, "embedded")
        return
    plan = planned(study.name, results)
    assert not plan.problems
    assert not plan.pruned, "an axis has values that do not go together with others; write grids of their own"
    assert len({job.fingerprint for job in jobs_of(study, results)}) >= 2


@of_papers
def test_a_study_composes_and_builds_at_the_papers_scale(study):
    jobs = of_paper(study.name)
    assert len({job.fingerprint for job in jobs}) >= 2
    assert not any(job.model.id.startswith("zoo/") for job in jobs)
    texts = {job.calib.name for job in jobs if job.calib} | {
        text for job in jobs for text in job.evaluation.ppl
    }
    assert not any(text.startswith("stdlib_") for text in texts)
    assert not any(job.evaluation.max_windows or job.evaluation.limit for job in jobs), "the whole test sets"


@of_papers
def test_the_scales_differ(study):
    assert study.grids["embedded"] != study.grids["paper"]


@of_papers
def test_a_table_is_of_what_its_study_runs(study, results):
    embedded, paper = jobs_of(study, results), of_paper(study.name)
    for name, spec in specs(study).items():
        for jobs in filter(None, (embedded, paper)):
            assert chosen(spec, study, jobs), f"{name} is of nothing that is run"
        for key, patterns in spec.where.items():
            unmet = [p for p in patterns if not any(fits(job, key, [p]) for job in (*embedded, *paper))]
            assert not unmet, f"{name}: no job has {key} {unmet}"


@of_papers
def test_only_recipes_of_one_model_are_compared(study):
    assert all("model" in spec.within for spec in study.tables.values())


@of_papers
def test_published_tables_exist(study):
    known = published()
    for name, spec in study.tables.items():
        assert set(spec.published) <= known, name


@cache
def published() -> set[str]:
    if not PUBLISHED.is_file():
        pytest.skip("published numbers are not here")
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        return {f"{row['source']} :: {row['table']}" for row in csv.DictReader(file)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: T\naxes: {algo: rtn}\ntables: [summary]\n", "tables is ['summary'], a mapping"),
        ("title: T\naxes: {algo: rtn}\ntables: {a: {title: A, where: [rtn]}}\n", "docs/studies.md"),
        ("title: T\naxes: {algo: rtn}\ntables: {}\nexclude: {algo: rtn}\n", "a list is needed"),
        ("title: T\naxes: {algo: rtn\n", "is not YAML"),
    ],
)  # fmt: skip
def test_a_study_that_says_something_else_is_refused(tmp_path, monkeypatch, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr("qbench.sweep.study.SWEEPS", tmp_path)
    with pytest.raises(UsageError, match=re.escape(message)):
        studies("mine")
