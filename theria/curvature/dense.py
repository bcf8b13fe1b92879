"""`torch.linalg.solve`, determinants and their like, by operations whose derivatives are right in every composition.

NOTE [PyTorch's solve and determinants over forward mode]. Their forward-mode formulas reuse the factorisation of the
value, which carries no derivative. So grad(jvp) and jvp(jvp) of `torch.linalg.solve`, `solve_ex`, `tensorsolve`, `det`,
`slogdet` and `logdet` lose terms without an error (PyTorch 2.13: by 10 % to 400 % on random matrices); grad(grad) and
jvp(grad) are right, and so are `inv`, Cholesky, LU, triangular solves and least squares. `torch.cholesky_inverse` is
wrong in jvp(grad), too (2 %), `torch.linalg.householder_product` in grad(jvp) (100 %). Here they are made of LU,
Cholesky and triangular solves.

An exactly singular matrix has a determinant of 0, whose derivative is NaN here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from theria.curvature.precision import float32_under_autocast


def solve(A: Tensor, B: Tensor, *, left: bool = True, out: Tensor | None = None) -> Tensor:
    """`torch.linalg.solve`: X with A X = B, or X A = B; A (..., N, N), B (..., N, K), or vectors (..., N)."""
    if out is not None or not _square(A) or (_is_vector(A, B) and not left):
        return torch.linalg.solve(A, B, left=left, out=out)
    if A.device.type == "cpu":
        A, B = float32_under_autocast(A, B)
    factors, pivots = torch.linalg.lu_factor(A)
    return _by_lu(factors, pivots, A, B, left)


def _is_vector(A: Tensor, B: Tensor) -> bool:
    return B.ndim == 1 or (A.ndim - 1 == B.ndim and B.shape == A.shape[:-1])


def _by_lu(factors: Tensor, pivots: Tensor, A: Tensor, B: Tensor, left: bool) -> Tensor:
    vector = _is_vector(A, B)
    X = torch.linalg.lu_solve(factors, pivots, B.unsqueeze(-1) if vector else B, left=left)
    return X.squeeze(-1) if vector else X


class SolveResult(NamedTuple):
    result: Tensor
    info: Tensor


def solve_ex(A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False, out: Any = None) -> Any:
    """`torch.linalg.solve_ex`: the solution, and the number of the zero pivot, 0 for none."""
    if out is not None or not _square(A) or (_is_vector(A, B) and not left):
        return torch.linalg.solve_ex(A, B, left=left, check_errors=check_errors, out=out)
    factors, pivots, info = torch.linalg.lu_factor_ex(A, check_errors=check_errors)
    return SolveResult(_by_lu(factors, pivots, A, B, left), info)


def tensorsolve(A: Tensor, B: Tensor, dims: Sequence[int] | None = None, *, out: Tensor | None = None) -> Tensor:
    """`torch.linalg.tensorsolve`: `solve` of A as a matrix, its dimensions `dims` moved to the end."""
    moved = A if dims is None else A.movedim(tuple(dims), tuple(range(-len(dims), 0)))
    shape = moved.shape[B.ndim :]
    if out is not None or shape.numel() != B.numel() or not B.numel():
        return torch.linalg.tensorsolve(A, B, dims, out=out)
    return solve(moved.reshape(B.numel(), -1), B.flatten()).reshape(shape)


def cholesky_inverse(L: Tensor, upper: bool = False, *, out: Tensor | None = None) -> Tensor:
    """`torch.cholesky_inverse`: (L L')^-1 of a Cholesky factor (..., N, N), of which one triangle is read."""
    if out is not None or not _square(L):
        return torch.cholesky_inverse(L, upper, out=out)
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    half = torch.linalg.solve_triangular(L, eye, upper=upper)
    return half @ half.mT if upper else half.mT @ half


def householder_product(A: Tensor, tau: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`torch.linalg.householder_product`: the first columns of H_1 ... H_k, with H_i = I - tau_i v_i v_i'.

    v_i is 0 above its entry i, 1 there, and A (..., M, N) below. With V of these columns the product is I - V T V', T
    upper triangular, T^-1 = diag(tau)^-1 + strict upper part of V'V (Joffrain et al., ACM Trans. Math. Softw. 32 (2006)
    169); so T = (I + diag(tau) U)^-1 diag(tau), where a tau may be 0.
    """
    if out is not None or A.ndim < 2 or A.is_complex() or not A.shape[-2] >= A.shape[-1] >= tau.shape[-1] > 0:
        return torch.linalg.householder_product(A, tau, out=out)
    eye = torch.eye(*A.shape[-2:], dtype=A.dtype, device=A.device)
    V = (A.tril(-1) + eye)[..., : tau.shape[-1]]
    scaled = torch.diag_embed(tau)
    T = torch.linalg.solve_triangular(scaled @ (V.mT @ V).triu(1), scaled, upper=True, unitriangular=True)
    return eye - V @ (T @ V.mT[..., : A.shape[-1]])


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
    torch.linalg.solve_ex: solve_ex,
    torch.linalg.tensorsolve: tensorsolve,
    torch.cholesky_inverse: cholesky_inverse,
    Tensor.cholesky_inverse: cholesky_inverse,
    torch.linalg.householder_product: householder_product,
    torch.orgqr: householder_product,
    Tensor.orgqr: householder_product,
    torch.linalg.det: det,
    torch.det: det,
    torch.Tensor.det: det,
    torch.linalg.slogdet: slogdet,
    torch.slogdet: slogdet,
    torch.Tensor.slogdet: slogdet,
    torch.logdet: logdet,
    torch.Tensor.logdet: logdet,
}
