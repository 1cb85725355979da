"""Which unit gets how many bits: the least loss that fits into a budget, exactly.

A multiple-choice knapsack: each unit takes one of its options, the sum of their sizes may not exceed the capacity, and
the sum of their losses is to be least. It is solved by dynamic programming over the states that no other dominates
(Nemhauser & Ullmann, "Discrete Dynamic Programming and Capital Allocation", Management Science 1969), in integers, so
that no tolerance of a solver stands between the budget and what is chosen. States from which even the relaxed
problem's bound (Lagrange's, with the multiplier of the budget) cannot beat the best known choice are dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

import numpy as np
from numpy.typing import NDArray

from qbench.errors import Unsuitable


@dataclass(frozen=True)
class Option:
    """One width for one unit.

    Attributes:
        size: What it takes, in bits.
        loss: What it costs in quality; smaller is better, and losses of units add up.
    """

    size: float
    loss: float


def allocate(units: Sequence[Sequence[Option]], capacity: Fraction | float) -> list[int]:
    """The index of the option that each unit takes.

    Sizes are taken as the exact binary fractions that floats are: the capacity is never exceeded, by however little.
    Of choices with equal loss a smaller one is taken.

    Raises:
        Unsuitable: If not even the smallest options fit.
        ValueError: If a unit has no option, or a loss is not finite.
    """
    if not all(units) or not np.isfinite([option.loss for unit in units for option in unit]).all():
        raise ValueError("every unit needs an option, and every option a finite loss")
    least = sum(min(Fraction(option.size) for option in unit) for unit in units)
    room = Fraction(capacity) - least
    if room < 0:
        raise Unsuitable(
            "the budget is below the smallest choice",
            f"{float(capacity):,.0f} bits were given, {float(least):,.0f} are needed; raise it, or offer fewer bits",
        )
    sizes, room_units = _integers(units, room)
    losses = [np.array([option.loss for option in unit]) for unit in units]
    return _search(sizes, losses, room_units)


def _integers(units: Sequence[Sequence[Option]], room: Fraction) -> tuple[list[NDArray[np.int64]], int]:
    """Sizes above each unit's smallest, and the room for them, in the largest unit of measure that keeps all exact."""
    exact = [[Fraction(option.size) for option in unit] for unit in units]
    above = [[size - min(unit) for size in unit] for unit in exact]
    flat = [size for unit in above for size in unit]
    scale = lcm(*(size.denominator for size in flat))
    step = gcd(*(int(size * scale) for size in flat)) or 1
    whole = [np.array([int(size * scale) // step for size in unit], dtype=np.int64) for unit in above]
    return whole, min(int(room * scale // step), sum(int(unit.max()) for unit in whole))


def _search(sizes: list[NDArray[np.int64]], losses: list[NDArray[np.float64]], room: int) -> list[int]:
    multiplier = _multiplier(sizes, losses, room)
    relaxed = [loss + multiplier * size for size, loss in zip(sizes, losses, strict=True)]
    rest = np.append(np.cumsum([unit.min() for unit in relaxed][::-1])[::-1], 0.0)
    best = _greedy(sizes, losses, relaxed, room)
    slack = 1e-9 * (
        abs(best) + sum(np.abs(unit).max() for unit in losses)
    )  # rounding must not drop the optimum
    size, loss = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for k, (own_size, own_loss) in enumerate(zip(sizes, losses, strict=True)):
        new_size = (size[:, None] + own_size).ravel()
        new_loss = (loss[:, None] + own_loss).ravel()
        bound = new_loss + multiplier * (new_size - room) + rest[k + 1]
        fits = np.flatnonzero((new_size <= room) & (bound <= best + slack))
        order = fits[np.lexsort((new_loss[fits], new_size[fits]))]
        lowest = np.minimum.accumulate(new_loss[order])
        kept = order[np.append(True, new_loss[order][1:] < lowest[:-1])]
        trail.append((kept // len(own_size), kept % len(own_size)))
        size, loss = new_size[kept], new_loss[kept]
    state, choice = len(loss) - 1, []  # losses fall along the list
    for parents, options in reversed(trail):
        choice.append(int(options[state]))
        state = int(parents[state])
    return choice[::-1]


def _multiplier(sizes: list[NDArray[np.int64]], losses: list[NDArray[np.float64]], room: int) -> float:
    """The least price of a unit of size, found by bisection, at which the cheapest options fit."""

    def fits(price: float) -> bool:
        return _taken(sizes, losses, price) <= room

    if fits(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while not fits(high):
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _taken(sizes: list[NDArray[np.int64]], losses: list[NDArray[np.float64]], price: float) -> int:
    return sum(
        int(size[_cheapest(size, loss + price * size)]) for size, loss in zip(sizes, losses, strict=True)
    )


def _cheapest(size: NDArray[np.int64], relaxed: NDArray[np.float64]) -> int:
    return int(np.lexsort((size, relaxed))[0])


def _greedy(
    sizes: list[NDArray[np.int64]],
    losses: list[NDArray[np.float64]],
    relaxed: list[NDArray[np.float64]],
    room: int,
) -> float:
    """The loss of a choice that fits: the relaxed problem's, and what room it leaves spent on the largest gains."""
    choice = [_cheapest(size, unit) for size, unit in zip(sizes, relaxed, strict=True)]
    room -= sum(int(size[c]) for size, c in zip(sizes, choice, strict=True))
    gains = sorted(
        (float(loss[c] - loss[o]), k, o)
        for k, (loss, c) in enumerate(zip(losses, choice, strict=True))
        for o in range(len(loss))
        if loss[o] < loss[c]
    )
    for _, k, o in reversed(gains):
        extra = int(sizes[k][o] - sizes[k][choice[k]])
        if extra <= room and losses[k][o] < losses[k][choice[k]]:
            choice[k], room = o, room - extra
    return float(sum(loss[c] for loss, c in zip(losses, choice, strict=True)))
