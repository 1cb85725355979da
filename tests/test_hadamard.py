"""The mathematics of rotations."""

from math import isqrt, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.quant.hadamard import (
    hadamard,
    hadamard_transform,
    inverse_hadamard_transform,
    kronecker_factors,
    random_hadamard,
    random_orthogonal,
)
from qbench.quant.hadamard_bases import CIRCULANTS

EPS32, EPS64 = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))

# Hidden and feed-forward sizes of models that are in use.
SIZES = [
    48, 112, 576, 640, 896, 960, 1152, 1408, 1536, 1920, 2304, 2560, 2880, 3072, 3200, 3584, 4544, 4864, 5120, 5376,
    5632, 5760, 6144, 6912, 7168, 8192, 8640, 8960, 9216, 9728, 10944, 11008, 12288, 12800, 13440, 13696, 13824,
    14336, 17408, 17920, 18176, 18432, 18944, 20480, 21504, 21888, 22016, 24576, 25600, 27392, 27648, 28672, 29568,
    36864, 53248,
]  # fmt: skip
# Multiples of 4 up to 256, which are the sizes of heads and counts of heads, and one order of every construction:
# GF(7³), GF(5²), GF(461), each table of circulants, a product of two bases.
ORDERS = [1, 2, *range(4, 260, 4), 344, 924, *(4 * v for v in CIRCULANTS), 16 * 23 * 59]


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def assert_orthonormal(rows: torch.Tensor) -> None:
    """Rows of unit length, orthogonal to each other, to the rounding error of a sum of n products."""
    n = rows.shape[1]
    identity = torch.eye(len(rows), dtype=rows.dtype)
    torch.testing.assert_close(rows @ rows.T, identity, rtol=0, atol=4 * n * EPS64)


@pytest.mark.parametrize("n", [n for n in ORDERS if n <= 1024])
def test_a_hadamard_matrix_is_orthonormal_with_entries_of_one_size(n):
    h = hadamard(n)
    assert h.dtype == torch.float64
    assert ((h.abs() * sqrt(n) - 1).abs() <= 4 * EPS64).all()
    # Products of integers are exact, so this is a proof.
    signs = h.sign()
    assert torch.equal(signs @ signs.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [*SIZES, 16 * 23 * 59])
def test_every_size_in_use_has_a_transform_onto_orthonormal_rows(n):
    unit = torch.zeros(24, n, dtype=torch.float64)
    unit[torch.arange(24), torch.randperm(n, generator=torch.Generator().manual_seed(n))[:24]] = 1
    rows = hadamard_transform(unit)
    assert ((rows.abs() * sqrt(n) - 1).abs() <= 16 * EPS64).all()
    signs = rows.sign()
    assert torch.equal(signs @ signs.T, n * torch.eye(24, dtype=torch.float64))


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([n for n in [*ORDERS, *SIZES] if n <= 1600]), st.sampled_from([(3,), (2, 3), ()]))
def test_the_transform_is_the_product_with_the_matrix(n, leading):
    x = normal(*leading, n)
    torch.testing.assert_close(hadamard_transform(x), x @ hadamard(n), rtol=0, atol=n * EPS64 * x.abs().max())
    back = x @ hadamard(n).T
    torch.testing.assert_close(inverse_hadamard_transform(x), back, rtol=0, atol=n * EPS64 * x.abs().max())


@pytest.mark.parametrize("n", SIZES)
def test_the_transform_keeps_norms_and_is_undone_by_its_inverse(n):
    x = normal(2, n)
    rotated = hadamard_transform(x)
    torch.testing.assert_close(rotated.norm(dim=1), x.norm(dim=1), rtol=n * EPS64, atol=0)
    torch.testing.assert_close(inverse_hadamard_transform(rotated), x, rtol=0, atol=n * EPS64 * x.abs().max())


@given(st.integers(0, 8))
def test_a_power_of_two_has_sylvesters_matrix(k):
    """Entry (i, j) is the parity of the bits that i and j have in common."""
    n = 2**k
    signs = [[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
    assert torch.equal(hadamard(n).sign(), torch.tensor(signs, dtype=torch.float64))


@pytest.mark.parametrize("n", [64, 172, 11008])
def test_a_linear_layer_is_unchanged_when_its_input_and_its_weight_are_transformed(n):
    x, weight = normal(3, n), normal(5, n).flip(0)
    y = hadamard_transform(x) @ hadamard_transform(weight).T
    atol = n * EPS64 * x.norm(dim=1).max() * weight.norm(dim=1).max()
    torch.testing.assert_close(y, x @ weight.T, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [128, 172])
def test_the_transform_keeps_the_dtype_and_rounds_once(dtype, n):
    x = normal(4, n, dtype=dtype)
    rotated = hadamard_transform(x)
    assert rotated.dtype == dtype
    expected = x.double() @ hadamard(n)
    eps = torch.finfo(dtype).eps
    atol = sqrt(n) * max(EPS64, EPS32 if dtype != torch.float64 else 0) * x.abs().max().item()
    torch.testing.assert_close(rotated.double(), expected, rtol=eps, atol=4 * atol)


def test_autocast_does_not_lower_the_precision():
    x = normal(4, 172, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rotated = hadamard_transform(x)
    assert torch.equal(rotated, hadamard_transform(x))


@pytest.mark.parametrize("n", [16, 12, 92])
def test_gradients_are_those_of_the_dense_product(n):
    x = normal(2, n).requires_grad_()
    (hadamard_transform(x) ** 3).sum().backward()
    dense = x.detach().clone().requires_grad_()
    ((dense @ hadamard(n)) ** 3).sum().backward()
    torch.testing.assert_close(x.grad, dense.grad, rtol=0, atol=100 * n * EPS64)


def test_a_transform_first_used_in_inference_mode_can_be_trained_through_later():
    n = 4 * 23 * 2  # used in no other test with this dtype
    with torch.inference_mode():
        hadamard_transform(normal(1, n, dtype=torch.float32))
    x = normal(1, n, dtype=torch.float32).requires_grad_()
    hadamard_transform(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("n", [1, 8, 12, 8192])
def test_an_empty_batch_stays_empty(n):
    assert hadamard_transform(torch.zeros(0, n)).shape == (0, n)


def test_editing_a_matrix_does_not_change_the_next_one():
    hadamard(1).zero_()
    hadamard(12).zero_()
    assert_orthonormal(hadamard(1))
    assert_orthonormal(hadamard(12))


@pytest.mark.parametrize("n", [-4, 0, 3, 14, 71])
def test_an_order_for_which_no_matrix_can_exist_is_refused(n):
    with pytest.raises(ValueError, match=rf"order {n} cannot exist.*`orthogonal`.*algo\.online=false"):
        hadamard(n)


def test_an_order_without_a_known_construction_is_refused():
    """668 was the smallest order in doubt for two decades."""
    with pytest.raises(ValueError, match=r"no construction is known here .* order 668;.*algo\.online=false"):
        hadamard_transform(torch.zeros(2, 668))


@pytest.mark.parametrize("n", [1, 2, 12, 64, 172])
def test_a_random_hadamard_matrix_is_orthonormal_and_repeats_with_its_seed(n):
    def make(seed: int) -> torch.Tensor:
        return random_hadamard(n, torch.Generator().manual_seed(seed))

    assert_orthonormal(make(0))
    assert torch.equal(make(0), make(0))
    assert torch.equal((make(0) * hadamard(n)).sign().unique(dim=0), (make(0) * hadamard(n)).sign()[:1])
    assert n < 12 or not torch.equal(make(0), make(1))


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_a_random_orthogonal_matrix_is_orthonormal(n, seed):
    q = random_orthogonal(n, torch.Generator().manual_seed(seed))
    assert q.dtype == torch.float64
    torch.testing.assert_close(q @ q.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=16 * (n + 4) * EPS64)


def test_random_orthogonal_matrices_have_no_preferred_signs():
    """QR alone fixes the signs of R's diagonal, and the corner of Q would nearly always have one sign."""
    generator = torch.Generator().manual_seed(0)
    draws = 400
    corners = torch.stack([random_orthogonal(3, generator).diagonal() for _ in range(draws)])
    # A diagonal entry of a uniform rotation has mean 0 and variance 1/n.
    assert (corners.mean(0).abs() <= 5 / sqrt(3 * draws)).all()
    assert ((corners**2).mean(0) - 1 / 3).abs().max() <= 5 / sqrt(draws)


@given(st.integers(1, 5000))
def test_kronecker_factors_are_the_divisors_nearest_to_the_root(n):
    small, large = kronecker_factors(n)
    assert small * large == n
    assert small <= large
    assert not any(n % d == 0 for d in range(small + 1, isqrt(n) + 1))


def test_only_positive_sizes_have_factors():
    with pytest.raises(ValueError, match="positive size"):
        kronecker_factors(0)
