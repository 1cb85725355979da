"""All questions that records may answer, in one order."""

from collections.abc import Sequence

from qbench.report.takeaways.algorithms import algorithms, combinations
from qbench.report.takeaways.answer import Takeaway
from qbench.report.takeaways.budget import budget
from qbench.report.takeaways.calibration import calibration
from qbench.report.takeaways.claims import Claim, judged_claims, shipped_claims
from qbench.report.takeaways.evidence import Evidence
from qbench.track.records import Record
from qbench.track.source import Source


def takeaways(
    records: Sequence[Record], source: Source, claims: Sequence[Claim] | None = None
) -> list[Takeaway]:
    """Every answer that the records suffice for: the questions in turn, then the claims.

    Each is its own family of tests, and depends on nothing but the records that it names.

    Args:
        claims: Those that come with the package where they are not given.
    """
    evidence = Evidence(records, source)
    return [
        *calibration(evidence),
        *algorithms(evidence),
        *budget(evidence),
        *combinations(evidence),
        *judged_claims(evidence, shipped_claims() if claims is None else claims),
    ]
