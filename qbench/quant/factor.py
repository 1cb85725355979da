"""How the rounding error of one input channel spreads to the others: the factor of the inverse Hessian.

It is made in place, in one float64 matrix: with Cholesky's own result, its inverse and the matrices that are flipped and
added to on the way there would be six, which for layers of many inputs is more than all else that a block takes.
"""

import torch
from torch import Tensor

# Of the blocks, of which there are up to `BLOCKS` beside the matrix, in whatever form. Matrices of no more than one are
# factorized as a whole.
WIDTH, BLOCKS = 1024, 8


def inverse_factor(gram: Tensor, order: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor of the damped inverse, `(in, in)` in float64; row `j` says how column `j`'s error spreads.

    Rows and columns are those of `gram` in `order`; channels that are never active, zero on the diagonal, count as if
    they had a mean square of one; `damp` is a fraction of the diagonal's mean.

    Raises:
        torch.linalg.LinAlgError: If the damped Hessian is not positive definite.
    """
    hessian = _upper(gram, order)
    diagonal = hessian.diagonal()
    diagonal.masked_fill_(diagonal == 0, 1.0)
    diagonal.add_(damp * diagonal.mean())
    # With R Rᵀ = H and R upper, R⁻¹ is the factor of H⁻¹: one factorization in place of two and an inverse.
    if failed := _factorize(hessian):
        raise torch.linalg.LinAlgError(
            f"GPTQ: the damped Hessian of {len(gram)} inputs is not positive definite (minor {failed}); "
            f"raise algo.damp above {damp}, or calibrate with more tokens"
        )
    _invert(hessian)
    return hessian


def _spans(n: int) -> list[tuple[int, int]]:
    return [(start, min(start + WIDTH, n)) for start in range(0, n, WIDTH)]


def _upper(gram: Tensor, order: Tensor) -> Tensor:
    """The upper blocks of `gram` in `order`, in float64, with zeros below."""
    upper = torch.zeros(gram.shape, dtype=torch.float64, device=gram.device)
    for start, stop in _spans(len(gram)):
        upper[start:stop, start:] = gram[order[start:stop, None], order[start:]]
    return upper


def _factorize(h: Tensor) -> int:
    """Replace `h`, whose upper blocks are read, by the upper `R` with `R Rᵀ = h`, from the last block to the first.

    Returns:
        The minor, counted from the last row, that is not positive; 0 if all are.
    """
    spans = _spans(len(h))
    for index in reversed(range(len(spans))):
        start, stop = spans[index]
        corner = h[start:stop, start:stop]
        h[:stop, start:stop].addmm_(h[:stop, stop:], h[start:stop, stop:].T, alpha=-1)
        # With rows and columns reversed a lower factor is an upper one.
        lower, failed = torch.linalg.cholesky_ex(corner.flip(0, 1))
        if failed:
            return len(h) - stop + int(failed)
        corner.copy_(lower.flip(0, 1))
        for a, b in spans[:index]:
            h[a:b, start:stop] = torch.linalg.solve_triangular(
                corner.T, h[a:b, start:stop], upper=False, left=False
            )
    return 0


def _invert(r: Tensor) -> None:
    """Replace an upper triangular matrix by its inverse, one column of blocks after another."""
    spans = _spans(len(r))
    for index, (start, stop) in enumerate(spans):
        corner = r[start:stop, start:stop]
        upper = corner.T.contiguous().T  # as LAPACK has it; a row-major one is solved with other last bits
        inverse = torch.linalg.solve_triangular(upper, torch.eye(stop - start).to(r), upper=True)
        # Downwards: a row of blocks needs those of `r` below it, and none above.
        for a, b in spans[:index]:
            r[a:b, start:stop] = (r[a:b, a:start] @ r[a:start, start:stop]) @ -inverse
        corner.copy_(inverse)
