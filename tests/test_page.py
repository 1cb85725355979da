"""The report page: what it says of its content, and how it behaves in a browser."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qbench.report.page.content import Cell, Page, PageFigure, PageTable, PageTakeaway, RecordEntry, Section
from qbench.report.page.render import numeric_columns, render, write

HOSTILE = """"><script>document.title = 'stolen'</script><img src=x onerror="document.title='stolen'">'&"""
WIDTHS = (1440, 390)
DRAWING = (
    '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'viewBox="0 0 900 300" width="900"><defs><path id="p" d="M0 0H9V9z"/><clipPath id="c"><use xlink:href="#p"/>'
    '</clipPath></defs><g clip-path="url(#c)"><text x="5" y="5">bits</text></g></svg>'
)
# Sorted by the number and not by the text: as texts, 10.1 would come before 9.2.
PPL = ["9.2 ± 0.3", "—", "10.1 ± 0.2", "120 ± 4", "failed", "9.2 ± 0.1"]
UP = ["9.2 ± 0.3", "9.2 ± 0.1", "10.1 ± 0.2", "120 ± 4", "—", "failed×"]
DOWN = ["120 ± 4", "10.1 ± 0.2", "9.2 ± 0.3", "9.2 ± 0.1", "—", "failed×"]
ALGOS = ["gptq", "awq", "rtn", "hqq", "omniquant", "quarot"]


def record(number: int, **changes) -> RecordEntry:
    facts = {"algo": ALGOS[number], "reason": "no memory left"} if number == 4 else {"algo": ALGOS[number]}
    entry = RecordEntry(
        fingerprint=f"{number:016x}",
        title=f"llama {ALGOS[number]}",
        href=f"records/{number:016x}/record.json",
        mlflow=f"http://localhost:5000/#/runs/{number}",
        status="failed" if number == 4 else "done",
        facts=facts,
    )
    return replace(entry, **changes)


def cell(number: int, text: str) -> Cell:
    marks = {"failed": "failed", "—": "", "9.2 ± 0.3": "tie", "9.2 ± 0.1": "best"}
    behind = (f"{number:016x}", f"{(number + 1) % 6:016x}")
    return Cell(text, float(text.split()[0]) if text[0].isdigit() else None, marks.get(text, "worse"), behind)


def table(**changes) -> PageTable:
    rows = tuple(
        (Cell("llama"), Cell(ALGOS[i]), cell(i, text), *[Cell(f"{i}.25 GB of weights")] * 6)
        for i, text in enumerate(PPL)
    )
    columns = ("model", "algo", "ppl/wikitext2", *(f"memory {k}" for k in range(6)))
    made = PageTable("Perplexity", columns, rows, 2, ("Windows of 512 tokens.",), anchor="perplexity")
    return replace(made, **changes)


def content(**changes) -> Page:
    takeaways = tuple(
        PageTakeaway(f"Is it {verdict}?", verdict, "It is.", (f"{i:016x}",), "3 %", "p < 0.01", "A claim.")
        for i, verdict in enumerate(("supported", "contradicted", "undecided", "answered"))
    )
    figures = tuple(PageFigure(f"Front {k}", DRAWING, "What it shows.", f"front-{k}") for k in (1, 2))
    sections = (
        Section("Takeaways", "What the data say.", takeaways=takeaways),
        Section("Tables", "", (table(), table(title="Again", anchor="again")), figures),
    )
    page = Page(
        "A report", "of a sweep", (("Jobs", "6"),), sections, tuple(map(record, range(6))), "qbench report"
    )
    return replace(page, **changes)


def section(**parts) -> tuple[Section, ...]:
    return (Section("Only", "", **parts),)


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    if not any(found):
        pytest.skip("no chromium, chromium-browser or google-chrome is on the path")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=next(filter(None, found)))
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, tmp_path):
    """Open a page's content in a window of its own, which must stay silent and ask the network for nothing."""
    path, contexts, noise = tmp_path / "report.html", [], []

    def visit(page=None, width=1440, script="", **options):
        write(page or content(), path)
        contexts.append(chromium.new_context(viewport={"width": width, "height": 800}, **options))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: noise.append(message.text))
        tab.on("pageerror", lambda error: noise.append(str(error)))
        tab.on("request", lambda request: request.url.startswith(path.as_uri()) or noise.append(request.url))
        if script:
            tab.add_init_script(script)
        tab.goto(path.as_uri())
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert not noise


def shown(tab, column: int = 3) -> list[str]:
    return tab.locator(f"#perplexity tbody tr:visible > :nth-child({column})").all_inner_texts()


def test_equal_content_gives_equal_bytes(tmp_path):
    paths = [write(content(), tmp_path / "new" / name) for name in ("a.html", "b.html")]
    assert paths[0].read_bytes() == paths[1].read_bytes() == render(content()).encode()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a.html", "b.html"]


def test_hostile_text_stands_on_the_page_as_text(visit):
    h = HOSTILE
    cells = tuple((Cell(h), Cell(h, h, "best", ("f",)), Cell(h, mark="tie")) for _ in range(2))
    parts = section(
        tables=(PageTable(h, (h, h, h), cells, 1, (h,), anchor="t"),),
        figures=(PageFigure(h, DRAWING, h, "f"),),
        takeaways=(PageTakeaway(h, "answered", h, ("f",), h, h, h),),
    )
    entry = RecordEntry("f", h, f"{h}/record.json", f"http://h/{h}", h, {h: h, "reason": h})
    page = Page(h, h, ((h, h),), (*parts, Section(h, h)), (entry,), h)
    assert not re.search(r"<script>document|<img", render(page))
    tab = visit(page)
    tab.locator("#t td a").first.click()
    tab.fill("#page-filter", h)
    assert tab.title().strip() == h
    assert tab.locator("img").count() == 0
    assert HOSTILE in tab.locator("#panel").inner_text()


def test_a_path_cannot_pass_for_a_script():
    assert 'href="javascript%3Aalert%281%29"' in render(
        content(records=(*map(record, range(5)), record(5, href="javascript:alert(1)")))
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: content(records=()), "6 records stand behind numbers .* add their entries"),
        (lambda: content(records=(*map(record, range(6)), record(0))), "'record-0+' would stand on the page twice"),
        (lambda: content(sections=section(tables=(table(), table()))), "'perplexity' would stand .* twice"),
        (lambda: content(sections=section(tables=(table(anchor="records"),))), "'records' would stand .* twice"),
        (lambda: content(sections=section(tables=(table(anchor="a b"),))), "anchor 'a b' of 'Perplexity'"),
        (lambda: content(sections=section(figures=(PageFigure("F", "", "", "f"),))), "'F' has no <svg>"),
        (lambda: content(records=(*map(record, range(5)), record(5, mlflow="javascript:1"))), "not of the web"),
        (lambda: table(columns=("model",)), "row 1 of table 'Perplexity' has 9 cells, 1 are needed"),
    ],
)  # fmt: skip
def test_content_that_would_make_a_broken_page_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        render(make())


@pytest.mark.parametrize(
    ("texts", "numeric"),
    [
        (["1", "12 of 15", "—"], True),
        (["−0.9 %", "+1,234", ".5 GB"], True),
        (["w4a16", "w3a16"], False),
        (["1", "many"], False),
        (["—", ""], False),
    ],
)
def test_a_column_is_of_numbers_when_all_that_it_holds_begin_with_one(texts, numeric):
    rows = tuple((Cell(text),) for text in texts)
    assert numeric_columns(PageTable("T", ("c",), rows, 0, anchor="t")) == [numeric]


def test_each_figure_has_ids_of_its_own():
    ids = re.findall(r'\sid="([^"]+)"', render(content()))
    assert len(ids) == len(set(ids))
    assert 'clip-path="url(#front-2-c)"' in render(content())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_is_silent_fits_the_window_and_can_be_read(visit, width, theme):
    long = "an_unbroken_name_" * 9
    parts = (
        *content().sections,
        replace(*section(tables=(table(title=long, notes=(long,), anchor="l"),)), title=long),
    )
    tab = visit(content(title=long, summary=((long, long),), sections=parts), width, color_scheme=theme)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    tab.locator(".record summary").first.click()
    tab.locator("#perplexity tbody td a").last.click()
    assert tab.get_by_role("dialog").is_visible()
    low = tab.evaluate(CONTRAST)
    assert low["looked_at"] > 100
    assert not low["found"]


# By WCAG's formula, of all elements with text of their own, before the first opaque background behind each.
CONTRAST = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  function behind(element) {
    for (let e = element; e; e = e.parentElement) {
      const color = channels(getComputedStyle(e).backgroundColor);
      if (color.length === 3) return color;
    }
    return [255, 255, 255];
  }
  const own = (e) => e.placeholder || [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  const texts = [...document.body.querySelectorAll("*")].filter((e) => e.checkVisibility() && own(e) && !e.closest("svg"));
  const found = [];
  for (const e of texts) {
    const front = luminance(channels(getComputedStyle(e, e.placeholder ? "::placeholder" : null).color));
    const back = luminance(behind(e));
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    if (ratio < 4.5) found.push([e.outerHTML.slice(0, 90), ratio]);
  }
  return { looked_at: texts.length, found };
}"""


def test_numbers_sort_as_numbers_with_missing_ones_last(visit):
    tab = visit()
    head = tab.locator("#perplexity thead th").nth(2)
    for order, rows in (("ascending", UP), ("descending", DOWN), ("none", None), ("ascending", UP)):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == order
        plain = [text.rstrip("≈*") for text in shown(tab)]
        assert plain == (rows or [text.replace("failed", "failed×") for text in PPL])
    assert tab.locator("#perplexity [aria-sort=ascending]").count() == 1
    assert tab.locator("#again [aria-sort=ascending]").count() == 0


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_a_table_sorts_from_the_keyboard(visit, key):
    tab = visit()
    tab.locator("#perplexity input").focus()
    for _ in range(3):  # the scrolled part, which the keys must reach too, and two headers
        tab.keyboard.press("Tab")
    tab.keyboard.press(key)
    assert shown(tab, 2) == sorted(ALGOS)


def test_filters_show_the_rows_that_hold_all_words_and_their_number(visit):
    tab = visit()
    tab.fill("#perplexity input", "Q 9.2")
    assert shown(tab, 2) == ["gptq", "quarot"]
    assert tab.locator("#perplexity output").inner_text() == "2 of 6 rows"
    tab.fill("#perplexity input", "q")
    tab.fill("#page-filter", "hqq")
    assert shown(tab, 2) == ["hqq"]
    assert tab.locator("#page-count").inner_text() == "2 of 12 rows, 1 of 6 records"
    tab.fill("#perplexity input", "nothing")
    assert tab.locator("#page-count").inner_text() == "1 of 12 rows, 1 of 6 records"
    assert tab.locator(".record:visible").count() == 1
    assert tab.locator("#perplexity .empty").is_visible()
    tab.fill("#perplexity input", "")
    tab.fill("#page-filter", "")
    assert shown(tab, 2) == ALGOS
    assert tab.locator("#perplexity output").inner_text() == "6 rows"


def test_a_number_opens_its_records_and_escape_closes_them(visit):
    tab = visit()
    number = tab.locator("#perplexity tbody td a").nth(4)
    panel = tab.get_by_role("dialog")
    assert number.inner_text() == "failed"
    number.press("Enter")
    assert panel.get_attribute("aria-labelledby") == "panel-title"
    assert tab.locator("#panel-title").inner_text() == "llama · omniquant · ppl/wikitext2: failed"
    links = [link.get_attribute("href") for link in panel.get_by_role("link").all()]
    ids = [f"{i:016x}" for i in (4, 5)]
    expected = [(f"records/{id_}/record.json", f"http://localhost:5000/#/runs/{int(id_, 16)}") for id_ in ids]
    assert links == [
        link for pair, id_ in zip(expected, ids, strict=True) for link in (*pair, f"#record-{id_}")
    ]
    assert "failed: no memory left" in panel.inner_text()
    box = tab.locator("#panel").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 1440
    tab.keyboard.press("Escape")
    assert not panel.is_visible()
    assert number.evaluate("link => link === document.activeElement")


def test_facts_of_a_record_unfold_where_a_link_leads_to_it(visit):
    tab = visit()
    tab.get_by_role("link", name="1 record").nth(1).click()
    tab.get_by_role("dialog").get_by_role("link", name="Facts").click()
    assert not tab.get_by_role("dialog").is_visible()
    assert tab.locator(".record[open]").get_attribute("id") == f"record-{1:016x}"
    tab.goto(tab.url.partition("#")[0] + f"#record-{3:016x}")
    assert tab.locator(f"#record-{3:016x} dl").is_visible()


def test_arrow_keys_move_between_numbers_and_tab_leaves_the_table(visit):
    tab = visit()
    numbers = tab.locator("#perplexity tbody td a")
    numbers.first.focus()
    tab.fill("#perplexity input", "9.2")
    numbers.first.focus()
    tab.keyboard.press("ArrowDown")
    assert numbers.last.evaluate("link => link === document.activeElement")
    tab.keyboard.press("ArrowDown")
    assert numbers.last.evaluate("link => link === document.activeElement")
    assert tab.locator("#perplexity tbody a[tabindex='0']").count() == 1
    tab.keyboard.press("Tab")
    assert tab.locator("#again input").evaluate("input => input === document.activeElement")


def test_labels_and_header_stay_in_view_when_a_table_is_scrolled(visit):
    rows = table().rows * 20
    tab = visit(content(sections=section(tables=(table(rows=rows),))), width=390)
    for column in (1, 3):
        before = tab.locator(f"#perplexity tbody tr:nth-child(9) > :nth-child({column})").bounding_box()
        tab.locator("#perplexity .scroll").evaluate("box => box.scrollLeft += 60")
        after = tab.locator(f"#perplexity tbody tr:nth-child(9) > :nth-child({column})").bounding_box()
        assert (before["x"] == after["x"]) == (column == 1)
    top = tab.locator("#perplexity thead th").first.bounding_box()["y"]
    tab.locator("#perplexity .scroll").evaluate("box => box.scrollTop = 300")
    assert tab.locator("#perplexity thead th").first.bounding_box()["y"] == top


FORBIDDEN = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } });"


@pytest.mark.parametrize("script", ["", FORBIDDEN], ids=["kept", "forbidden"])
def test_the_theme_follows_the_system_until_it_is_chosen(visit, script):
    tab = visit(color_scheme="dark", script=script)
    background = "getComputedStyle(document.body).backgroundColor"
    dark = tab.evaluate(background)
    tab.get_by_role("button", name="Light theme").click()
    light = tab.evaluate(background)
    assert light == "rgb(255, 255, 255)" != dark
    tab.reload()
    assert tab.evaluate(background) == (dark if script else light)


def test_on_paper_there_are_no_controls_and_whole_tables_in_black_on_white(visit):
    tab = visit(color_scheme="dark")
    tab.locator(".record summary").first.click()
    tab.emulate_media(media="print")
    for control in ("nav", "input", "#theme", "output", ".download"):
        assert not any(found.is_visible() for found in tab.locator(control).all())
    style = "e => { const s = getComputedStyle(e); return [s.color, s.overflowX, s.position] }"
    assert tab.locator("#perplexity .scroll").evaluate(style) == ["rgb(0, 0, 0)", "visible", "static"]
    assert tab.locator("#perplexity thead th").first.evaluate(style)[2] == "static"
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.locator(".record dl").first.is_visible()
    assert "record.json" not in tab.locator("main").inner_text()
    assert tab.locator("#perplexity tbody tr:visible").count() == len(PPL)


def test_without_javascript_all_is_there_and_numbers_lead_to_their_records(visit):
    tab = visit(java_script_enabled=False)
    assert tab.get_by_role("button").count() == tab.get_by_role("searchbox").count() == 0
    number = tab.locator("#perplexity tbody td a").nth(2)
    assert tab.locator(number.get_attribute("href")).is_visible()
    assert tab.locator("#perplexity tbody tr:visible").count() == len(PPL)


def test_a_figure_can_be_kept_as_a_file_of_its_own(visit):
    tab = visit()
    with tab.expect_download() as download:
        tab.get_by_role("link", name="Download SVG").last.click()
    assert download.value.suggested_filename == "front-2.svg"
    drawing = ElementTree.fromstring(Path(download.value.path()).read_text())
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    assert drawing.find(".//{*}text").text == "bits"
