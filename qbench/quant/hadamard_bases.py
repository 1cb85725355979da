"""Hadamard matrices that are not doubled smaller ones: the bases of `qbench.quant.hadamard`.

Entries are ±1. The constructions:
    Paley, "On orthogonal matrices", 1933: orders q + 1 and 2(q + 1) for prime powers q;
    Goethals & Seidel, "A skew Hadamard matrix of order 36", 1970: four circulants.
"""

from collections.abc import Iterator
from functools import cache
from itertools import product
from math import isqrt

import torch
from torch import Tensor

# First rows of four v × v circulants A, B, C, D with AAᵀ + BBᵀ + CCᵀ + DDᵀ = 4v I; bit i is set where entry i
# is −1. They fill orders that Paley's constructions and doubling leave open. 23, 29, 39, 43, 65 and 73 come from
# a search over sequences that are constant on the orbits of a group of multipliers; 47 and 59 from Turyn-type
# sequences of lengths 16 and 20, found by search; 107 from those of length 36 of Kharaghani & Tayfeh-Rezaie,
# "A Hadamard matrix of order 428", 2005. Feed-forward networks of 13696 and 27392 channels need 107.
CIRCULANTS = {
    23: (0x5766EB, 0x07A5E0, 0x2C6634, 0x7CA53E),
    29: (0x0A5B3695, 0x03BF3F71, 0x08792785, 0x019D2E60),
    39: (0x482AC7C65B, 0x659A9A0FBD, 0x6402968DD0, 0x419A8A063D),
    43: (0x22E743D18BA, 0x5C5FDC405C4, 0x68D7C650996, 0x4A30858112D),
    47: (0x40976D38AB3F, 0x48EC6D3854C0, 0x409712C754C0, 0x3713ED3854C0),
    59: (0x3D9EF4752F68B3F, 0x1DB114752F974C0, 0x3D9EF38AD0974C0, 0x624EEC752F974C0),
    65: (0x18682C32BF6244FD5, 0x1D606E623B876DBF5, 0x140A34F48EAE25E59, 0x03B4CB0350119A0A7),
    73: (0x1A356989E31E465AB16, 0x1B69B20B7965076CEA1, 0x0015499DC61E5E9B95F, 0x0001101D5C051F8DCE9),
    107: (
        0x5E121F53C21158B3E8768C88682, 0x4E10CDAC121158B3E889737797D,
        0x5E121F53C5EEA74C1789737797D, 0x31EF3253EA1158B3E889737797D,
    ),
}  # fmt: skip


@cache
def base_orders(odd: int, doublings: int) -> tuple[int, ...] | None:
    """Orders of bases whose product is `odd` times at most 2^doublings; None where there are none.

    Of all choices, the one with the smallest sum: that is the cost of the transform.
    """
    if odd == 1:
        return ()
    choices: list[tuple[int, ...]] = []
    for divisor in (d for d in range(3, odd + 1, 2) if odd % d == 0):
        j = next((j for j in range(2, doublings + 1) if _has_base(divisor << j)), None)
        rest = None if j is None else base_orders(odd // divisor, doublings - j)
        if j is not None and rest is not None:
            choices.append((divisor << j, *rest))
    return min(choices, key=sum, default=None)


def _has_base(order: int) -> bool:
    """Whether `base` can make a multiple of 4."""
    half = order // 2 - 1
    return bool(_prime_power(order - 1) or order // 4 in CIRCULANTS or (half % 4 == 1 and _prime_power(half)))


def base(order: int) -> Tensor:
    """A ±1 Hadamard matrix of an order that `base_orders` named: float64 `(order, order)` on the CPU."""
    if _prime_power(order - 1):
        return _paley_1(order - 1)
    return _goethals_seidel(order // 4) if order // 4 in CIRCULANTS else _paley_2(order // 2 - 1)


def _tensor(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _paley_1(q: int) -> Tensor:
    """Order q + 1, for a prime power q = 3 mod 4."""
    h = torch.ones(q + 1, q + 1, dtype=torch.float64, device="cpu")
    h[1:, 0] = -1
    h[1:, 1:] = _jacobsthal(q).fill_diagonal_(1)
    return h


def _paley_2(q: int) -> Tensor:
    """Order 2(q + 1), for a prime power q = 1 mod 4."""
    conference = torch.ones(q + 1, q + 1, dtype=torch.float64, device="cpu")
    conference[1:, 1:] = _jacobsthal(q)
    conference[0, 0] = 0
    identity = torch.eye(q + 1, dtype=torch.float64, device="cpu")
    return torch.kron(conference, _tensor([[1, 1], [1, -1]])) + torch.kron(
        identity, _tensor([[1, -1], [-1, -1]])
    )


def _goethals_seidel(v: int) -> Tensor:
    """Order 4v, from four circulants; R reverses the columns."""
    index = torch.arange(v, device="cpu")
    shift = (index[None, :] - index[:, None]) % v
    a, b, c, d = (_tensor([[1 - 2 * (row >> i & 1) for i in range(v)]])[0][shift] for row in CIRCULANTS[v])
    br, cr, dr = (m.flip(1) for m in (b, c, d))
    btr, ctr, dtr = (m.T.flip(1) for m in (b, c, d))
    blocks = [[a, br, cr, dr], [-br, a, dtr, -ctr], [-cr, -dtr, a, btr], [-dr, ctr, -btr, a]]
    return torch.cat([torch.cat(row, 1) for row in blocks])


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) such that q = p^k with p prime and k ≥ 1."""
    if q < 2:
        return None
    p = next((d for d in range(2, isqrt(q) + 1) if q % d == 0), q)
    k = 1
    while p**k < q:
        k += 1
    return (p, k) if p**k == q else None


def _jacobsthal(q: int) -> Tensor:
    """χ(a − b) for all a, b in GF(q), where χ is 1 at squares, −1 at non-squares and 0 at zero."""
    p, k = _prime_power(q) or (q, 1)
    place = p ** torch.arange(k, device="cpu")
    powers = torch.tensor(_powers_of_primitive_element(p, k), device="cpu") @ place
    character = torch.zeros(q, dtype=torch.float64, device="cpu")
    character[powers[0::2]] = 1
    character[powers[1::2]] = -1
    digits = torch.arange(q, device="cpu")[:, None] // place % p
    return character[(digits[:, None] - digits) % p @ place]


def _powers_of_primitive_element(p: int, k: int) -> list[tuple[int, ...]]:
    """x⁰, x¹, … modulo a polynomial of degree k over GF(p) for which they are all p^k − 1 non-zero residues.

    Then every non-zero residue has an inverse: the residues are GF(p^k), and x is primitive.
    """
    for tail in product(range(p), repeat=k):
        # With a constant term of zero, x has no inverse, and its powers never return to 1.
        powers = list(_powers_of_x(tail, p)) if tail[0] else []
        if len(powers) == p**k - 1:
            return powers
    raise AssertionError(f"GF({p}^{k}) has a primitive element")


def _powers_of_x(tail: tuple[int, ...], p: int) -> Iterator[tuple[int, ...]]:
    """Powers of x, where x^k = `tail`, until they return to 1; coefficients from the constant term up."""
    one = (1,) + (0,) * (len(tail) - 1)
    power = one
    while True:
        yield power
        shifted = (0, *power[:-1])
        power = tuple((s + power[-1] * t) % p for s, t in zip(shifted, tail, strict=True))
        if power == one:
            return
