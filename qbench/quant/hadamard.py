"""Hadamard and random orthogonal matrices, and the fast product with a Hadamard matrix.

Rotations by them spread outliers over all channels: QuaRot (Ashkboos et al., NeurIPS 2024, arXiv 2404.00456),
SpinQuant (Liu et al., ICLR 2025, arXiv 2405.16406) and QuIP (Chee et al., NeurIPS 2023, arXiv 2307.13304).

Convention: `hadamard(n)` = (S ⊗ B) / √n, with S Sylvester's matrix of a power of two and B a base, or a
Kronecker product of bases, where n is no power of two. `hadamard_transform(x)` is `x @ hadamard(n)`: vectors are
rows. B need not be symmetric, so the inverse is the product with the transpose, `inverse_hadamard_transform`.
Where y = x Wᵀ, transforming the last axis of both x and W leaves y as it was.
"""

from functools import cache
from math import isqrt, prod, sqrt

import torch
from torch import Tensor

from qbench.quant.hadamard_bases import base, base_orders

# Two or three products with small matrices are faster than a butterfly of log n passes over memory.
MAX_DOUBLINGS = 6


def hadamard(n: int, device: torch.device | str | None = None) -> Tensor:
    """Orthonormal Hadamard matrix, float64 `(n, n)`, entries ±1/√n; symmetric where n is a power of two.

    Raises:
        ValueError: If no construction is known for the order.
    """
    h = torch.ones(1, 1, dtype=torch.float64, device=device)
    for factor in _factors(n):
        h = torch.kron(h, factor.to(h.device))
    return h / sqrt(n)


def has_hadamard(n: int) -> bool:
    """Whether a construction is known for this order."""
    try:
        _factors(n)
    except ValueError:
        return False
    return True


def hadamard_transform(x: Tensor) -> Tensor:
    """`x @ hadamard(n)` for the last axis of `x`, of size n, without forming the matrix.

    Differentiable. The dtype is kept; below float32, and under autocast, it is computed in float32.

    Raises:
        ValueError: If no construction is known for the order.
    """
    return _multiply(x, _scaled_factors(x.shape[-1], _compute_dtype(x), x.device))


def inverse_hadamard_transform(x: Tensor) -> Tensor:
    """`x @ hadamard(n).T`: undoes `hadamard_transform`. The same holds of dtypes and errors."""
    factors = _scaled_factors(x.shape[-1], _compute_dtype(x), x.device)
    return _multiply(x, tuple(f.T for f in factors))


def random_hadamard(n: int, generator: torch.Generator) -> Tensor:
    """Hadamard matrix with random column signs, H diag(±1): float64 `(n, n)`, orthonormal.

    Lies on the generator's device.

    Raises:
        ValueError: If no construction is known for the order.
    """
    signs = torch.randint(0, 2, (n,), generator=generator, device=generator.device).double() * 2 - 1
    return hadamard(n, generator.device) * signs


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """Random orthogonal matrix, uniform (Haar): float64 `(n, n)`, on the generator's device."""
    gaussian = torch.randn(n, n, dtype=torch.float64, generator=generator, device=generator.device)
    q, r = torch.linalg.qr(gaussian)
    # QR alone is not uniform: its signs are the library's convention (Mezzadri 2007).
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def kronecker_factors(n: int) -> tuple[int, int]:
    """The two factors of n nearest to √n, the smaller one first; (1, n) for a prime.

    Raises:
        ValueError: If n is not positive.
    """
    if n < 1:
        raise ValueError(f"only a positive size has factors, got {n}")
    small = next(d for d in range(isqrt(n), 0, -1) if n % d == 0)
    return small, n // small


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _multiply(x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    """`x @ (F₁ ⊗ F₂ ⊗ …)`, one factor at a time."""
    with torch.autocast(x.device.type, enabled=False):
        y = x.to(factors[0].dtype)
        after = x.shape[-1]
        for factor in factors:
            size = factor.shape[0]
            after //= size
            # Counted, not -1: a batch may be empty, as an expert's is that no token was sent to.
            rows = x.numel() // (size * after)
            y = y.reshape(rows, size) @ factor if after == 1 else factor.T @ y.reshape(rows, size, after)
    return y.reshape(x.shape).to(x.dtype)


@cache
def _scaled_factors(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    # Autograd refuses tensors that were made in inference mode, and these are used again outside it.
    with torch.inference_mode(False):
        first, *rest = (f.to(device, dtype) for f in _factors(n))
        return (first / sqrt(n), *rest)


@cache
def _factors(n: int) -> tuple[Tensor, ...]:
    """Small ±1 matrices, float64 on the CPU, whose Kronecker product is √n `hadamard(n)`; at least one."""
    doublings = max((n & -n).bit_length() - 1, 0)
    orders = base_orders(n >> doublings, doublings) if n > 0 else None
    if orders is None:
        reason = (
            f"a Hadamard matrix of order {n} cannot exist: the order must be 1, 2 or a multiple of 4"
            if n < 1 or n % 4
            else f"no construction is known here for a Hadamard matrix of order {n}"
        )
        raise ValueError(
            f"{reason}; use a random orthogonal rotation (`orthogonal`) instead, "
            "or switch the online rotation off (algo.online=false)"
        )
    doublings = (n // prod(orders)).bit_length() - 1
    parts = -(-doublings // MAX_DOUBLINGS)
    sizes = [(doublings + i) // parts for i in range(parts)]
    with torch.inference_mode(False):
        factors = [_sylvester(size) for size in sizes] + [base(order) for order in orders]
        return tuple(factors or [_sylvester(0)])


def _sylvester(doublings: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for _ in range(doublings):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h
