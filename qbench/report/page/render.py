"""A page's content as one HTML file that needs nothing beside it: no network, no script from elsewhere, no font.

The file can be read without JavaScript; the script adds sorting, filters and the panel that lists the records behind a
number. The same content gives the same bytes.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from qbench.report.page.content import Cell, Page, PageFigure, PageTable

_HERE = Path(__file__).parent
# Signs and not colours alone, for print and for those who see no difference between red and green.
_SIGNS = {"best": "", "tie": "≈", "worse": "*", "failed": "×"}
_LEGEND = {
    "best": "the best",
    "tie": "not surely worse than the best",
    "worse": "surely worse than the best",
    "failed": "failed; its record says why",
}
_CARDS = 9  # takeaways of a section that are not folded away
_NUMBER = re.compile(r"[+\-−]?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d*)?(?:e[+-]?\d+)?", re.IGNORECASE)
_MISSING = {"", "-", "–", "—", "n/a", "nan"}
_ANCHOR = re.compile(r"[A-Za-z0-9_.-]+")
_OWN_IDS = ("main", "records", "record-list", "record-count", "page-filter", "page-count", "theme", "panel")


def render(page: Page) -> str:
    """The page as HTML.

    Raises:
        ValueError: If two things would share an anchor, records behind a number have no entry, an MLflow address is not
            one of the web, or a figure is not a drawing.
    """
    _check_anchors(page)
    _check_records(page)
    place = {record.fingerprint: str(number) for number, record in enumerate(page.records)}
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "places": lambda records: " ".join(place[fingerprint] for fingerprint in records),
        "section_id": section_id,
        "counted": _counted,
        "breakable": _breakable,
        "numeric": numeric_columns,
        "sort_by": _sort_by,
        "marks": lambda table: [m for m in _SIGNS if any(c.mark == m for row in table.rows for c in row)],
        "drawing": _drawing,
        "relative": quote,  # a colon too, so that no path can pass for another scheme
        "web": _web,
    }
    return environment.get_template("template.html").render(
        page=page,
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup((_HERE / "script.js").read_text(encoding="utf-8")),
        cards=_CARDS,
        signs=_SIGNS,
        legend=_LEGEND,
    )


def write(page: Page, path: Path) -> Path:
    """Write the page at once, so that whoever reads meanwhile finds all or nothing."""
    text = render(page)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
    return path


def section_id(title: str) -> str:
    """`Which calibration set?` -> `section-which-calibration-set`."""
    return "-".join(["section", *re.findall(r"\w+", title.lower())])


def numeric_columns(table: PageTable) -> list[bool]:
    """For each column, whether it is sorted by number: some cell is, or every text that is there begins with one."""
    found = []
    for cells in zip(*table.rows, strict=True):
        given = [c for c in cells if c.sort is not None]
        rest = [c for c in cells if c.sort is None and c.mark != "failed" and c.text.lower() not in _MISSING]
        by_number = any(not isinstance(c.sort, str) for c in given)
        found.append(by_number or (bool(rest) and not given and all(_leading(c.text) for c in rest)))
    return found or [False] * len(table.columns)


def _leading(text: str) -> str:
    """The number with which a text begins, as JavaScript reads it; empty where there is none."""
    match = _NUMBER.match(text.strip())
    return match[0].replace(",", "").replace("−", "-") if match else ""


def _sort_by(cell: Cell, numeric: bool) -> Markup:
    """The attribute from which the script sorts: `n`umber, `t`ext, or none where that is the cell's own text."""
    if isinstance(cell.sort, str):
        return Markup(' data-t="{}"').format(cell.sort)
    if cell.sort is None:
        return Markup(' data-n="{}"').format(_leading(cell.text)) if numeric else Markup()
    number = float(cell.sort)
    if math.isinf(number):
        return Markup(' data-n="{}Infinity"').format("-" if number < 0 else "")
    return Markup(' data-n="{}"').format("" if math.isnan(number) else f"{number:.12g}")


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _breakable(text: str) -> Markup:
    """A name that may be broken after a slash."""
    return escape(text).replace("/", Markup("/<wbr>"))


def _drawing(figure: PageFigure) -> Markup:
    """The figure's SVG without what belongs to a file alone, and with ids that no other figure has.

    Figures of one library share the names of their clip paths and glyphs, and the first on a page would win.
    """
    start = figure.svg.find("<svg")
    if start < 0:
        raise ValueError(f"figure {figure.title!r} has no <svg> element; give it as SVG markup")
    return Markup(
        re.sub(r'((?<=\s)id="|href="#|url\(#)', rf"\g<1>{figure.anchor}-", figure.svg[start:]).strip()
    )


def _web(address: str) -> str:
    if urlsplit(address).scheme not in ("http", "https"):
        raise ValueError(
            f"MLflow address {address!r} is not of the web; give one with http or https, or None"
        )
    return address


def _check_anchors(page: Page) -> None:
    items: list[PageTable | PageFigure] = []
    for section in page.sections:
        items += [*section.tables, *section.figures]
    for item in items:
        if not _ANCHOR.fullmatch(item.anchor):
            raise ValueError(
                f"anchor {item.anchor!r} of {item.title!r} must be of letters, digits, '-', '_' and '.'"
            )
    ids: Iterable[str] = (
        *_OWN_IDS,
        *(section_id(section.title) for section in page.sections),
        *(item.anchor for item in items),
        *(f"record-{record.fingerprint}" for record in page.records),
    )
    twice = [anchor for anchor, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"{', '.join(map(repr, twice))} would stand on the page twice; give other names")


def _check_records(page: Page) -> None:
    known = {record.fingerprint for record in page.records}
    named = dict.fromkeys(
        fingerprint
        for section in page.sections
        for records in (
            *(takeaway.evidence for takeaway in section.takeaways),
            *(cell.records for table in section.tables for row in table.rows for cell in row),
        )
        for fingerprint in records
    )
    if missing := [fingerprint for fingerprint in named if fingerprint not in known]:
        raise ValueError(
            f"{len(missing)} records stand behind numbers and are not among the page's {len(known)}, "
            f"first {missing[0]!r}; add their entries"
        )
