"""One protocol of each metric, where recipes were measured by several.

The first 12 windows of a text may be the same text under `[512 x 12]` and `[512 x 24]`: counted as different items they
would be evidence twice.
"""

from collections.abc import Iterable, Mapping

from qbench.report.metrics import base


def usual(measured: Iterable[Mapping[str, int]]) -> tuple[str, ...]:
    """Of each metric the protocol that most recipes have; of equally common ones that with the most items.

    Args:
        measured: Of each recipe: how many items it has of each metric, which is named with its protocol.

    Returns:
        Metrics with their protocols, sorted.
    """
    have: dict[str, int] = {}
    items: dict[str, int] = {}
    for recipe in measured:
        for metric, n in recipe.items():
            have[metric] = have.get(metric, 0) + 1
            items[metric] = max(n, items.get(metric, 0))
    chosen: dict[str, str] = {}
    for metric in sorted(have, key=lambda m: (-have[m], -items[m], m)):
        chosen.setdefault(base(metric), metric)
    return tuple(sorted(chosen.values()))
