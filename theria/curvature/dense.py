"""`torch.linalg.solve` and determinants, by operations whose derivatives are right in every composition.

NOTE [PyTorch's solve and determinants over forward mode]. Their forward-mode formulas reuse the factorisation of the
value, which carries no derivative. So grad(jvp) and jvp(jvp) of `torch.linalg.solve`, `solve_ex`, `det`, `slogdet` and
`logdet` lose terms without an error (PyTorch 2.13: by 10 % to 400 % on random matrices); grad(grad) and jvp(grad) are
right, and so are `inv`, Cholesky, LU, triangular solves and least squares. Here all but
`solve_ex`, which stays as it is, are made of an LU factorisation.

An exactly singular matrix has a determinant of 0, whose derivative is NaN here.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from theria.curvature.precision import float32_under_autocast


def solve(A: Tensor, B: Tensor, *, left: bool = True, out: Tensor | None = None) -> Tensor:
    """`torch.linalg.solve`: X with A X = B, or X A = B; A (..., N, N), B (..., N, K), or vectors (..., N)."""
    vector = B.ndim == 1 or (A.ndim - 1 == B.ndim and B.shape == A.shape[:-1])
    if out is not None or not _square(A) or (vector and not left):
        return torch.linalg.solve(A, B, left=left, out=out)
    if A.device.type == "cpu":
        A, B = float32_under_autocast(A, B)
    factors, pivots = torch.linalg.lu_factor(A)
    X = torch.linalg.lu_solve(factors, pivots, B.unsqueeze(-1) if vector else B, left=left)
    return X.squeeze(-1) if vector else X


class SlogdetResult(NamedTuple):
    sign: Tensor
    logabsdet: Tensor


def slogdet(A: Tensor, *, out: Any = None) -> SlogdetResult:
    """`torch.linalg.slogdet`: sign and log of the absolute value of the determinant of A (..., N, N)."""
    if out is not None or not _square(A):
        return torch.linalg.slogdet(A, out=out)
    factors, pivots, _ = torch.linalg.lu_factor_ex(A)
    diagonal = factors.diagonal(dim1=-2, dim2=-1)
    swaps = (pivots != torch.arange(1, A.shape[-1] + 1, dtype=pivots.dtype, device=A.device)).sum(-1)
    return SlogdetResult(diagonal.sign().prod(-1) * (1 - 2 * (swaps % 2)), diagonal.abs().log().sum(-1))


def det(A: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`torch.linalg.det`."""
    if out is not None or not _square(A):
        return torch.linalg.det(A, out=out)
    sign, logarithm = slogdet(A)
    return sign * logarithm.exp()


def logdet(A: Tensor) -> Tensor:
    """`torch.logdet`: NaN for a negative determinant."""
    if not _square(A):
        return torch.logdet(A)
    sign, logarithm = slogdet(A)
    return torch.where(sign < 0, torch.full_like(logarithm, float("nan")), logarithm)


def _square(A: Tensor) -> bool:
    """Whether it is for us: what is not is left to PyTorch and its own errors."""
    return A.ndim > 1 and A.shape[-1] == A.shape[-2] and A.shape[-1] > 0 and not A.is_complex()


REPLACEMENTS = {
    torch.linalg.solve: solve,
    torch.linalg.det: det,
    torch.det: det,
    torch.Tensor.det: det,
    torch.linalg.slogdet: slogdet,
    torch.slogdet: slogdet,
    torch.Tensor.slogdet: slogdet,
    torch.logdet: logdet,
    torch.Tensor.logdet: logdet,
}
