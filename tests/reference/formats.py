"""Small formats one number at a time, in Python's float64: every code decoded from its bits, every scale from its group."""

import math
from functools import cache

LAYOUT = {"e4m3": (4, 3), "e5m2": (5, 2), "e3m2": (3, 2), "e2m3": (2, 3), "e2m1": (2, 1)}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "e3m2": 28.0, "e2m3": 7.5, "e2m1": 6.0}
# What the authors of QLoRA print, arXiv:2305.14314, appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


@cache
def decode(code: int, name: str) -> float:
    """The number of a code; infinity where IEEE 754 would have no finite number or the format leaves it out."""
    exponent_bits, mantissa_bits = LAYOUT[name]
    bits = format(code, f"0{1 + exponent_bits + mantissa_bits}b")
    exponent, mantissa = int(bits[1 : 1 + exponent_bits], 2), int(bits[1 + exponent_bits :], 2)
    bias = 2 ** (exponent_bits - 1) - 1
    if exponent == 0:
        size = mantissa / 2**mantissa_bits * 2.0 ** (1 - bias)
    else:
        size = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
    return (-1 if bits[0] == "1" else 1) * (size if size <= LARGEST[name] else math.inf)


def nearest(x: float, name: str) -> float:
    """The nearest number of a format; of two, that with an even code."""
    if name == "nf4":
        return min(NF4, key=lambda v: abs(v - x))
    code = min(magnitudes(name), key=lambda c: (abs(decode(c, name) - abs(x)), c % 2))
    return math.copysign(decode(code, name), x)


@cache
def magnitudes(name: str) -> list[int]:
    """The codes of finite numbers that are not negative."""
    return [c for c in range(2 ** sum(LAYOUT[name])) if math.isfinite(decode(c, name))]


def mx(group: list[float], name: str) -> list[float]:
    """OCP MX 1.0: the shared exponent is that of the largest magnitude less that of the format's largest number."""
    largest = max(abs(x) for x in group)
    if largest == 0:
        return [0.0] * len(group)
    scale = 2.0 ** (math.floor(math.log2(largest)) - math.floor(math.log2(LARGEST[name])))
    return [scale * nearest(x / scale, name) for x in group]


def nvfp4(rows: list[list[float]], size: int, outer_row: bool) -> list[list[float]]:
    """Groups of `size` in e2m1, with e4m3 scales that count in units of one scale per row, or of all rows."""
    out = []
    for row in rows:
        within = [row] if outer_row else rows
        outer = max(abs(x) for r in within for x in r) / (448 * 6)
        done: list[float] = []
        for start in range(0, len(row), size):
            group = row[start : start + size]
            code = nearest(max(abs(x) for x in group) / 6 / outer, "e4m3") or 2.0**-9
            done += [code * outer * nearest(x / (code * outer), "e2m1") for x in group]
        out.append(done)
    return out


def block_extremes(rows: list[list[float]], size: int, i: int, j: int) -> tuple[float, float]:
    """The lowest and highest element of the block of `size` rows and columns that holds element (i, j)."""
    top, left = i // size * size, j // size * size
    block = [x for row in rows[top : top + size] for x in row[left : left + size]]
    return min(block), max(block)
