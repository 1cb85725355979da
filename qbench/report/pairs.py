"""What two recipes both measured: metric by metric, B against A, and how sure a difference is."""

from dataclasses import dataclass, replace
from math import isclose, log

import numpy as np
from scipy import stats

from qbench.report.cells import Cells, Result
from qbench.report.metrics import base, is_cost, is_measured_rate, kind, lower_is_better, shown_effect
from qbench.report.sides import LABELS, Side
from qbench.report.significance import SURE, Difference, differences, holm
from qbench.track.records import Record
from qbench.track.source import Source

UNSURE = "no sure difference"
SAME = "the same"
UNTESTED = "not tested"


@dataclass(frozen=True, eq=False)
class Pair:
    """A metric that both have, by one protocol.

    Attributes:
        difference: Of B's items less A's; `None` where they share none.
        p: Of that difference, corrected for all metrics of the comparison. Of costs, which have no items, that of Welch's
            test of several jobs on both sides, not corrected.
    """

    metric: str
    a: Result
    b: Result
    difference: Difference | None = None
    p: float = float("nan")

    @property
    def verdict(self) -> str:
        """What B is beside A."""
        if self.difference is not None:
            if not self.p < SURE:
                return UNSURE
            return "better" if (self.difference.effect < 0) == lower_is_better(self.metric) else "worse"
        if self.a.value == self.b.value:
            return SAME
        if not is_cost(self.metric):
            name, _, text = self.metric.partition("/")
            return f"as ppl/{text}" if name == "bpb" else UNTESTED
        if self.p >= SURE:
            return UNSURE
        return "larger" if self.b.value > self.a.value else "smaller"

    @property
    def effect(self) -> str:
        """How much B is above A, as text."""
        if self.difference is not None:
            return shown_effect(self.metric, self.difference.effect)
        a, b = self.a.value, self.b.value
        if a == b:
            return ""
        if kind(self.metric) == "binary":
            return shown_effect(self.metric, b - a)
        return relative(a, b)

    @property
    def interval(self) -> str:
        """The ends of the difference's interval as text, in the unit of the effect; empty where not known."""
        if self.difference is None or not np.isfinite(self.difference.low):
            return ""
        ends = [shown_effect(self.metric, end) for end in (self.difference.low, self.difference.high)]
        return " … ".join(end.removesuffix("%").removesuffix(" points") for end in ends)


@dataclass(frozen=True, eq=False)
class Measured:
    """Two recipes' metrics.

    Attributes:
        pairs: In order of appearance.
        unlike: Metrics whose protocol or items differ between the two, with what differs.
        alone: Of A and of B: the metrics that the other has not.
    """

    a: Side
    b: Side
    source: Source
    pairs: list[Pair]
    unlike: dict[str, str]
    alone: tuple[list[str], list[str]]


def measured(a: Side, b: Side, source: Source) -> Measured:
    """Compare the metrics of two recipes.

    Raises:
        ValueError: If a job is on both sides.
    """
    shared = {r["fingerprint"] for r in a.records} & {r["fingerprint"] for r in b.records}
    if shared:
        raise ValueError(
            f"job {min(shared)} is on both sides, in {a.word!r} and in {b.word!r}; compare two recipes, or two jobs"
        )
    cells = Cells(source, LABELS, (), [a.recipe, b.recipe], ("*",), [])
    pairs: list[Pair] = []
    unlike: dict[str, str] = {}
    alone: tuple[list[str], list[str]] = ([], [])
    ways: dict[str, list[str]] = {}
    for metric in cells.metrics:
        if "@" in base(metric) and not is_measured_rate(metric):  # of speed, rates say it all
            continue
        ways.setdefault(base(metric), []).append(metric)
    for name, metrics in ways.items():
        of = [{m: r for m in metrics if (r := cells.result(side.recipe, m)) is not None} for side in (a, b)]
        if all(of) and not of[0].keys() & of[1].keys():
            hows = [" and ".join(m.removeprefix(name).strip() for m in found) for found in of]
            unlike[name] = f"A {hows[0]}, B {hows[1]}"
            continue
        for metric in metrics:
            if metric in of[0] and metric in of[1]:
                pair = Pair(metric, of[0][metric], of[1][metric])
                if reason := _unlike(_first(a, pair.a), _first(b, pair.b), name):
                    unlike[metric] = reason
                else:
                    pairs.append(pair)
            else:
                alone[metric not in of[0]].append(metric)
    return Measured(a, b, source, _tested(pairs, (a, b)), unlike, alone)


def _first(side: Side, found: Result) -> Record:
    """Draws of one result were evaluated alike, so that one speaks for all."""
    return next(r for r in side.records if r["fingerprint"] == found.records[0])


def _unlike(a: Record, b: Record, name: str) -> str:
    """In what the items of two records differ though the protocol is the same; empty where in nothing known."""
    if is_cost(name):
        return ""
    text = name.partition("/")[2]
    asked = [
        {t for key in ("ppl", "decode_ppl", "tasks") for t in how.get(key, ()) if t.partition("@")[0] == text}
        for how in (a["identity"]["evaluation"], b["identity"]["evaluation"])
    ]
    if all(asked) and asked[0] != asked[1]:
        return f"A {', '.join(sorted(asked[0]))}, B {', '.join(sorted(asked[1]))}"
    sums = [r.get("data", {}).get(f"eval/{text}", {}).get("sha256") for r in (a, b)]
    if all(sums) and sums[0] != sums[1]:
        return f"other text: SHA-256 A {sums[0][:8]}, B {sums[1][:8]}"
    lengths = [_bytes_per_token(r, text) for r in (a, b)]
    if all(lengths) and not isclose(*lengths, rel_tol=1e-6):
        return f"other tokens: A {lengths[0]:.2f} bytes each, B {lengths[1]:.2f}"
    return ""


def _bytes_per_token(record: Record, text: str) -> float:
    """Of the windows; it is what perplexity and bits per byte differ by. 0 where it is not known."""
    ppl, bpb = (record["metrics"].get(f"{kind}/{text}") for kind in ("ppl", "bpb"))
    return log(ppl) / bpb / log(2) if ppl and bpb else 0.0


def _tested(pairs: list[Pair], sides: tuple[Side, Side]) -> list[Pair]:
    """With differences where both kept items that they share, and with what draws say of costs."""
    met = [(p.metric, p.a.draws, p.b.draws) for p in pairs if p.a.draws and p.b.draws]
    met = [(m, a, b) for m, a, b in met if a and b and not set(a.items).isdisjoint(b.items)]
    found = differences([(b, a) for _, a, b in met if a and b])
    corrected = holm([d.p for d in found])
    known = {m: (d, float(p)) for (m, _, _), d, p in zip(met, found, corrected, strict=True)}
    tested = []
    for pair in pairs:
        if pair.metric in known:
            difference, p = known[pair.metric]
            tested.append(replace(pair, difference=difference, p=p))
        else:
            tested.append(replace(pair, p=_welch(pair, sides)) if is_cost(pair.metric) else pair)
    return tested


def _welch(pair: Pair, sides: tuple[Side, Side]) -> float:
    """NaN where a side has one job alone, or all jobs of both agree with their mean."""
    a, b = (
        np.array([r["metrics"][pair.metric] for r in side.records if r["fingerprint"] in of.records])
        for side, of in zip(sides, (pair.a, pair.b), strict=True)
    )
    if min(len(a), len(b)) < 2 or (np.ptp(a) == 0 and np.ptp(b) == 0):
        return float("nan")
    sd = [float(side.std(ddof=1)) for side in (a, b)]
    return float(
        stats.ttest_ind_from_stats(a.mean(), sd[0], len(a), b.mean(), sd[1], len(b), equal_var=False).pvalue
    )


def relative(a: float, b: float) -> str:
    """How much `b` is above `a` as text: a share of `a`, or how many times it where that is much."""
    if a <= 0 or b <= 0:
        return f"{b - a:+.3g}"
    return f"{b / a - 1:+.1%}" if b / a < 10 else f"×{b / a:.3g}"


def p_text(p: float) -> str:
    return "" if np.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def figures(value: float) -> str:
    """Four significant figures, zeros among them."""
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:#.4g}".removesuffix(".")
