"""Takeaways in the terminal, and as Markdown and JSON files."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from qbench.report.takeaways.answer import Takeaway
from qbench.report.takeaways.claims import Claim, shipped_claims, untested

TITLES = {
    "calibration": "On which text to calibrate",
    "algorithm": "Which algorithm",
    "budget": "Which scheme for how many bytes",
    "combination": "Do combinations pay?",
    "claim": "What papers claim",
}
_STYLES = {"answered": "green", "supported": "green", "contradicted": "red", "undecided": "yellow"}
_HOW = (
    "Intervals are over windows or documents, with seeds as they are; p-values are for both, corrected inside each answer. "
    "Perplexities are compared as ratios."
)
_ANSWERS = 8  # of one question in the terminal
_SHOWN = 3  # fingerprints in Markdown; JSON has all


def show(takeaways: Sequence[Takeaway], console: Console) -> None:
    """All of them, a paragraph each, at most 100 columns wide."""
    width = min(console.width, 100)
    if takeaways:
        console.print(Text(_HOW, style="dim"), width=width, highlight=False)
    for kind, mine in by_kind(takeaways):
        console.print(Text(f"\n{TITLES[kind]}", style="bold"))
        for t in mine[:_ANSWERS]:
            console.print(
                Text(f"\n{t.question} ", style="bold") + Text(t.verdict, style=_STYLES[t.verdict]),
                width=width,
            )
            claim = [f"Claim: {t.claim} ({t.claim_source})"] if t.claim else []
            dim = [f"Effect: {t.effect}.", f"Sure: {t.confidence}; {len(t.evidence)} records."]
            for text, style in [
                *((c, "italic") for c in claim),
                (t.sentence, ""),
                *((d, "dim") for d in dim),
            ]:
                console.print(Padding(Text(text, style=style), (0, 0, 0, 2)), width=width, highlight=False)
        if len(mine) > _ANSWERS:
            console.print(f"\n  and {len(mine) - _ANSWERS} more in the file", highlight=False)
    for line in _not_tested(untested(takeaways, shipped_claims())):
        console.print(Text(line), width=width, highlight=False)


def write(takeaways: Sequence[Takeaway], folder: Path) -> list[Path]:
    """`takeaways.md` to read, `takeaways.json` with everything; equal takeaways give equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = untested(takeaways, shipped_claims())
    tree = {
        "takeaways": [asdict(t) for t in takeaways],
        "not_tested": [
            {"id": c.id, "claim": c.statement, "source": c.source, "study": c.study} for c in missing
        ],
    }
    texts = {
        "takeaways.md": _markdown(takeaways, missing),
        "takeaways.json": json.dumps(tree, indent=1, sort_keys=True, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def by_kind(takeaways: Sequence[Takeaway]) -> list[tuple[str, list[Takeaway]]]:
    """The questions in turn, and of each what was decided first."""
    found: dict[str, list[Takeaway]] = {kind: [] for kind in TITLES}
    for t in takeaways:
        found[t.id.partition("/")[0]].append(t)
    return [
        (kind, sorted(mine, key=lambda t: t.verdict == "undecided")) for kind, mine in found.items() if mine
    ]


def _markdown(takeaways: Sequence[Takeaway], missing: Sequence[Claim]) -> str:
    lines = ["# Takeaways", "", _HOW, ""]
    if not takeaways:
        lines += ["The records suffice for no answer yet.", ""]
    for kind, mine in by_kind(takeaways):
        lines += [f"## {TITLES[kind]}", ""]
        for t in mine:
            lines += [f"### {t.question}", ""]
            lines += [f"> {t.claim} ({t.claim_source})", ""] if t.claim else []
            lines += [
                f"**{t.verdict}**: {t.sentence}",
                "",
                f"- Effect: {t.effect}.",
                f"- How sure: {t.confidence}.",
            ]
            shown = ", ".join(f"`{one}`" for one in t.evidence[:_SHOWN])
            more = f" and {len(t.evidence) - _SHOWN} more" if len(t.evidence) > _SHOWN else ""
            lines += [f"- Evidence: {shown}{more} (`{t.id}`).", ""]
    return "\n".join([*lines, *_not_tested(missing, "## ")]).rstrip("\n") + "\n"


def _not_tested(missing: Sequence[Claim], heading: str = "") -> list[str]:
    if not missing:
        return []
    lines = (
        ["", f"{heading}Claims not tested here", ""]
        if not heading
        else [f"{heading}Claims not tested here", ""]
    )
    return lines + [f"- {c.statement} ({c.source}): run `qbench -m +sweep={c.study}`" for c in missing]
