"""The sub-commands that read records: what they write, what they link to, and what they say when they cannot."""

import json
import re
import shutil
from pathlib import Path

import pytest

from qbench.cli import main, reports
from qbench.errors import UsageError
from qbench.report.assembly import OVERVIEW, page
from qbench.report.cells import Cells
from qbench.report.drawing import figures
from qbench.report.page.content import Page
from qbench.report.points import points_of
from qbench.report.spec import FigureSpec
from qbench.sweep.study import names
from qbench.track.records import RecordStore
from tests.synthetic import Grid, Memory, failed, made, stored

GRID = Grid(
    models=("micro-llama", "nano-llama"),
    algos=("rtn", "gptq", "awq"),
    schemes=("w4a16g128", "w3a16g128", "w2a16g128"),
    calibs=("stdlib_docs", "stdlib_code"),
    seeds=(0, 1),
    texts={"stdlib_docs": 24, "stdlib_code": 24},
    tasks={"stdlib_cloze": 64, "stdlib_copy": 64, "lambada_openai": 64},
)


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    jobs = made(GRID)
    jobs[-1] = failed(jobs[-1][0])
    return stored(tmp_path_factory.mktemp("results"), jobs).root


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    grid = Grid(
        algos=("rtn", "gptq"), schemes=("w4a16g128", "w3a16g128"), calibs=("stdlib_docs", "stdlib_code"),
        tasks={"stdlib_cloze": 64},
    )  # fmt: skip
    jobs = made(grid)
    jobs[-1] = failed(jobs[-1][0])
    return stored(tmp_path_factory.mktemp("few"), jobs).root


@pytest.fixture
def results(few, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(few, tmp_path / "results"))


@pytest.fixture(scope="module")
def content(few) -> Page:
    store = RecordStore(few)
    return page(
        [OVERVIEW], list(store.all()), store, folder=few, command="qbench report", link=lambda f: f"https://x/{f}"
    )  # fmt: skip


KINDS = {
    "pareto": ("ppl/*",), "storage": ("ppl/*",), "curves": ("ppl/*",), "radar": ("acc/*",), "matrix": ("ppl/*",),
    "wins": ("ppl/*",), "spearman": ("ppl/*", "acc/*"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_figure_is_drawn_from_records(kept, kind):
    store = RecordStore(kept)
    drawn, lacking = figures({"one": FigureSpec("One", kind, metrics=KINDS[kind])}, list(store.all()), store)
    assert drawn
    assert not lacking
    assert all(name.startswith("one") and one.caption for name, one in drawn.items())


def test_models_do_not_share_a_front(kept):
    store = RecordStore(kept)
    drawn, _ = figures(
        {"f": FigureSpec("F", "pareto", metrics=("ppl/stdlib_docs",))}, list(store.all()), store
    )
    assert list(drawn) == ["f-micro-llama-ppl-stdlib_docs", "f-nano-llama-ppl-stdlib_docs"]


def test_a_front_against_the_roofline_needs_the_shape_of_the_model(kept):
    store = RecordStore(kept)
    spec = {"f": FigureSpec("F", "pareto", x="decode_ms@h100", metrics=("ppl/*",))}
    records = list(store.all())
    assert figures(spec, records, store)[1].keys() == {"f"}, "records of an older qbench do not have it"
    shape = {
        "hidden": 64, "ffn": 128, "head_dim": 16, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "vocab": 100,
        "embedding": 64, "tied": True, "gated_mlp": True, "n_other": 320,
    }  # fmt: skip
    drawn, lacking = figures(spec, [record | {"shape": shape} for record in records], store)
    assert drawn
    assert not lacking


def test_a_figure_that_cannot_be_drawn_says_why(kept):
    store = RecordStore(kept)
    specs = {
        "radar": FigureSpec("R", "radar", metrics=("acc/stdlib_cloze",)),
        "none": FigureSpec("N", "pareto", metrics=("pass@1/*",)),
        "other": FigureSpec("O", "curves", where={"algo": ("quarot",)}),
    }
    drawn, lacking = figures(specs, list(store.all()), store)
    assert not drawn
    assert "three tasks" in lacking["radar"]
    assert "pass@1/*" in lacking["none"]
    assert lacking["other"] == "no record is of it"


def drawn_of(jobs, kind, **more):
    return figures({"f": FigureSpec("F", kind, **more)}, [record for record, _ in jobs], Memory(jobs))


def test_the_reason_is_the_one_that_holds():
    jobs = made(Grid(calibs=("c4",), algos=("rtn", "gptq")))
    _, lacking = drawn_of(jobs, "pareto", x="decode_ms@h100")
    assert lacking["f"].startswith("micro-llama: no record has the shape of its model")
    _, lacking = drawn_of(jobs, "pareto", x="modle_mb")
    assert lacking["f"].startswith("micro-llama: no record has a cost modle_mb; there are load_time_s, ")
    _, lacking = drawn_of(jobs, "pareto", x="algo")
    assert "'rtn', which is no cost" in lacking["f"]
    _, lacking = drawn_of(jobs, "matrix")
    assert lacking["f"] == "one calibration set (c4) was used for each recipe, a matrix needs two"
    _, lacking = drawn_of(jobs, "matrix", metrics=("ppl/no_such",))
    assert lacking["f"] == "no record has a metric like ppl/no_such"
    _, lacking = drawn_of(jobs, "radar", metrics=("acc/*",))
    assert lacking["f"] == "no record has a metric like acc/*"
    _, lacking = drawn_of(jobs, "wins", factor="modle")
    assert lacking["f"].startswith("no record has a label or a key modle")


def test_a_model_that_lacks_something_takes_no_figure_from_others():
    tasks = {"stdlib_cloze": 64, "stdlib_copy": 64, "lambada_openai": 64}
    jobs = made(Grid(models=("a",), tasks=dict(list(tasks.items())[:2]))) + made(
        Grid(models=("b",), tasks=tasks)
    )
    drawn, lacking = drawn_of(jobs, "radar", metrics=("acc/*",))
    assert list(drawn) == ["f-b"]
    assert lacking["f"] == "a: a radar needs three tasks above guessing, there are 2"


def test_names_of_figures_have_no_folders():
    drawn, _ = drawn_of(made(Grid(models=("org/model",))), "pareto", metrics=("ppl/*",))
    assert list(drawn) == ["f-org-model-ppl-stdlib_docs"]


def test_points_are_of_one_text_and_the_line_is_of_a_model_that_read_it():
    other = made(Grid(algos=(), texts={"c4": 24}))  # floating point that was evaluated on something else
    jobs = other + made(Grid(algos=("rtn", "gptq", "awq")))
    jobs[-1][0]["data"]["eval/stdlib_docs"]["sha256"] = "0" * 64
    cells = Cells.of([record for record, _ in jobs], Memory(jobs), ("model", "scheme", "algo", "calib"))
    found = points_of(cells, "ppl/stdlib_docs", "model_mb")
    assert found.frame["label"].tolist() == ["rtn", "gptq"]
    assert found.note == " Left out: 1 recipe that read another text of that name."
    assert found.floating == pytest.approx(jobs[1][0]["metrics"]["ppl/stdlib_docs"])


def test_the_report_lists_every_record_and_links_to_it(few, content):
    assert len(content.records) == len(list(RecordStore(few).all()))
    for entry in content.records:
        assert (few / entry.href).is_file()
        assert entry.mlflow == f"https://x/{entry.fingerprint}"
    (failure,) = (entry for entry in content.records if entry.status == "failed")
    assert failure.facts["reason"].startswith("LinAlgError")


def test_every_number_of_the_report_has_its_records(content):
    known = {entry.fingerprint for entry in content.records}
    tables = {table.title: table for section in content.sections for table in section.tables}
    for title in ("Quality", "Size and cost"):
        table = tables[title]
        numbers = [cell for row in table.rows for cell in row[table.n_labels :] if cell.text]
        assert numbers
        assert all(cell.records and set(cell.records) <= known for cell in numbers)


def test_the_report_is_the_same_bytes_again(results, tmp_path):
    for name in ("one.html", "two.html"):
        assert reports.report([f"results={results}", f"to={results / name}"]) == 0
    one, two = ((results / name).read_text() for name in ("one.html", "two.html"))
    assert one.replace("one.html", "two.html") == two
    assert not re.search(r"(src|href)=.(https?:)?//", one), "it loads nothing"


def test_a_report_with_a_study_has_its_tables(results):
    assert reports.report(["quickstart", f"results={results}"]) == 0
    assert "Perplexity and accuracy by algorithm and bits" in (results / "report.html").read_text()


def test_tables_of_a_study_are_written_in_every_format(results, capsys):
    assert reports.tables(["quickstart", f"results={results}"]) == 0
    found = {path.name for path in (results / "tables" / "quickstart").iterdir()}
    assert found == {"results.csv", "results.md", "results.tex", "results.html", "results-numbers.csv"}
    assert "best" in capsys.readouterr().out


def test_a_study_without_records_says_how_to_get_them(results, capsys):
    assert reports.tables(["easyquant", f"results={results}"]) in (0, 3)
    assert "qbench -m +sweep=easyquant" in capsys.readouterr().out


def test_figures_are_written_as_svg_pdf_and_png(results):
    assert reports.figures([f"results={results}"]) == 0
    found = list((results / "figures" / "overview").iterdir())
    assert {path.suffix for path in found} == {".svg", ".pdf", ".png"}


def test_takeaways_and_ledger_are_written(results):
    assert reports.takeaways([f"results={results}"]) == 0
    assert json.loads((results / "tables" / "takeaways.json").read_text())["takeaways"]
    assert reports.ledger([f"results={results}"]) == 0
    assert (results / "tables" / "ledger.csv").is_file()


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (reports.tables, ["quikstart"], "did you mean quickstart"),
        (reports.tables, ["quickstart", "against=rtn"], "at a time"),
        (reports.tables, ["--all"], "no option --all"),
        (reports.tables, ["matrix=scheme"], "is no table"),
        (reports.report, ["nothing_like_that"], "unknown study"),
        (reports.takeaways, ["quickstart"], "takes key=value"),
        (reports.takeaways, ["model=nano-llama"], "records are read, not run"),
        (reports.tables, ["resluts=x"], "did you mean results"),
        (reports.ledger, ["quickstart"], "takes key=value"),
        (reports.figures, ["from=sqlite:///nowhere.db"], "nowhere.db"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(results, command, arguments, message):
    with pytest.raises(UsageError, match=re.escape(message)) as raised:
        command([*arguments, f"results={results}"])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("command", [reports.tables, reports.figures, reports.takeaways, reports.report])
def test_without_records_every_command_says_what_to_run(tmp_path, command):
    with pytest.raises(UsageError, match=r"no records under .*run e\.g\."):
        command([f"results={tmp_path / 'none'}"])


def test_a_study_without_figures_says_so(results, capsys):
    assert reports.figures(["quickstart", f"results={results}"]) == 3
    assert "states no figures" in capsys.readouterr().out


def test_a_misspelt_command_is_said_to_be_one(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["qbench", "recomend", "max_ppl_increase=2%"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "did you mean recommend" in capsys.readouterr().err


def test_all_studies_are_listed(capsys):
    assert reports.studies([]) == 0
    text = capsys.readouterr().out
    listed = [name for name in names() if "/" in name or (Path("sweeps") / f"{name}.yaml").is_file()]
    assert all(name in text for name in listed)
