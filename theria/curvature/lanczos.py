"""Lanczos' tridiagonalisation of a symmetric operator, and the ends of its spectrum.

After k steps from a unit vector, V (N, k) has orthonormal columns that span the Krylov space, T = V'AV is tridiagonal
and A V = V T + beta v_{k+1} e_k'. An eigenpair (theta, s) of T then satisfies |A V s - theta V s| = beta |s_k|, so that
an eigenvalue of A lies within that of theta (Parlett, The Symmetric Eigenvalue Problem, section 13.2). The theta
interlace: the extreme ones approach those of A from inside.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from theria.curvature.vectors import Layout, LinearMap, Tree, VectorMap, check_count, generator_of, many, normal


class Tridiagonal(NamedTuple):
    """T for each of P starting vectors.

    Attributes:
        diagonal: (P, k).
        off_diagonal: (P, k - 1).
        beyond: (P,), the next entry of the off-diagonal, beta.
        dimension: (P,), int64, of the Krylov space; at most k. Beyond it T is its first entry times the identity.
        basis: (P, k, N), rows v_j; None unless reorthogonalised.
    """

    diagonal: Tensor
    off_diagonal: Tensor
    beyond: Tensor
    dimension: Tensor
    basis: Tensor | None

    def matrix(self) -> Tensor:
        """(P, k, k); raises where a product was NaN or infinite."""
        T = torch.diag_embed(self.diagonal)
        T = T + torch.diag_embed(self.off_diagonal, 1) + torch.diag_embed(self.off_diagonal, -1)
        if not T.isfinite().all():
            raise ValueError("a product of the operator is NaN or infinite, so that its spectrum is not defined.")
        return T


def tridiagonalise(apply: VectorMap, start: Tensor, steps: int, reorthogonalise: bool) -> Tridiagonal:
    """`steps` (at most N) steps of Lanczos' recurrence from each row of `start` (P, N), none of them zero.

    Without reorthogonalisation only three vectors are kept. The theta are still near eigenvalues, but those that have
    converged appear again and again as copies (Paige 1980), and V is not orthogonal.
    """
    P, N = start.shape
    steps = min(steps, N)
    v = start / torch.linalg.vector_norm(start, dim=-1, keepdim=True)
    previous, beta = torch.zeros_like(v), v.new_zeros(P)
    basis = v.new_zeros(P, steps, N) if reorthogonalise else None
    alphas, betas, scale, dimension = [], [], v.new_zeros(P), torch.zeros(P, dtype=torch.int64, device=v.device)
    tiny = 4 * torch.finfo(v.dtype).eps * N**0.5
    alive = torch.ones_like(beta, dtype=torch.bool)
    for j in range(steps):
        dimension = dimension + alive
        w = apply(v) - beta[:, None] * previous
        alpha = (v * w).sum(-1)
        alphas.append(torch.where(alive, alpha, alphas[0]) if j else alpha)
        w = w - alpha[:, None] * v
        if basis is not None:
            basis[:, j] = v
            for _ in range(2):  # once leaves a share of the rounding error: "twice is enough" (Kahan, Parlett)
                done = basis[:, : j + 1]
                w = w - ((done @ w[:, :, None]).mT @ done)[:, 0]
        size = torch.linalg.vector_norm(w, dim=-1)
        scale = torch.maximum(scale, alpha.abs() + beta + size)
        alive = alive & ~(size <= tiny * scale)  # else an invariant subspace is found, and what is left is rounding
        previous, beta = v, torch.where(alive, size, torch.zeros_like(size))
        v = torch.where(alive[:, None], w / torch.where(alive, size, torch.ones_like(size))[:, None], 0)
        betas.append(beta)
    off_diagonal = torch.stack(betas[:-1], -1) if steps > 1 else v.new_zeros(P, 0)
    return Tridiagonal(torch.stack(alphas, -1), off_diagonal, betas[-1], dimension, basis)


class Extremes(NamedTuple):
    """The ends of a spectrum as Lanczos sees them.

    Attributes:
        smallest, largest: (), Ritz values; those of the operator are outside of [smallest, largest], or equal.
        smallest_error, largest_error: (), an eigenvalue is within this of the Ritz value.
        smallest_vector, largest_vector: pytrees, the Ritz vectors, of norm 1; None without reorthogonalisation.
        steps: the dimension of the Krylov space. With N, or less at an error of 0, the values are exact for every
            eigenvector that the start has a share of.
    """

    smallest: Tensor
    largest: Tensor
    smallest_error: Tensor
    largest_error: Tensor
    smallest_vector: Tree
    largest_vector: Tree
    steps: int


def extreme_eigenvalues(
    matvec: LinearMap,
    like: Tree,
    *,
    steps: int = 64,
    seed: int | torch.Generator = 0,
    reorthogonalise: bool = True,
) -> Extremes:
    """The smallest and the largest eigenvalue of a symmetric operator, from one random start.

    Args:
        matvec: v -> A v on pytrees like `like`, symmetric (not checked), e.g. `partial(hvp, loss_fn, params)`.
        like: a pytree of tensors of one dtype on one device; its values are not used.
        steps: products with A; at most N.
        seed: of the start; a number, or a generator, which is advanced.
        reorthogonalise: against all earlier vectors, which keeps `steps` vectors of memory.

    Raises:
        ValueError: arguments that do not fit; a product that is NaN or infinite.
    """
    check_count("steps", steps, 1)
    layout = Layout.of(like, "like")
    apply = layout.on_vectors(matvec)
    start = normal(layout, generator_of(seed))[None]
    with torch.no_grad():
        found = tridiagonalise(lambda v: many(apply, v, 1), start, steps, reorthogonalise)
        k = int(found.dimension)
        theta, s = torch.linalg.eigh(found.matrix()[0, :k, :k])
        errors = found.beyond[0] * s[-1].abs()
        low = high = None
        if found.basis is not None:
            ends = s[:, [0, -1]].mT @ found.basis[0, :k]  # (2, N)
            low, high = (layout.unravel(x / torch.linalg.vector_norm(x)) for x in ends)
    return Extremes(theta[0], theta[-1], errors[0], errors[-1], low, high, k)
