"""What the records say: answers in sentences, each with its effect, how sure it is, and the records behind it."""

from qbench.report.takeaways.answer import Takeaway, page_takeaway
from qbench.report.takeaways.claims import Claim, shipped_claims, untested
from qbench.report.takeaways.questions import takeaways
from qbench.report.takeaways.writing import show, write

__all__ = ["Claim", "Takeaway", "page_takeaway", "shipped_claims", "show", "takeaways", "untested", "write"]
