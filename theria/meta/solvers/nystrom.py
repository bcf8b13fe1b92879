"""Randomised Nystrom approximation: Frangella, Tropp and Udell 2021, arXiv 2110.02820, algorithm 2.1 and section 5.

For the operator A = H + mu I with H positive semidefinite: H is approximated by U diag(l) U' of rank r, and
(U diag(l) U' + mu I)^-1 b = U ((l + mu)^-1 U'b) + (b - U U'b) / mu
(Hataya and Yamada 2023, arXiv 2302.09726, use it as the whole inverse for hypergradients).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from theria.meta.solvers.base import LinearSolver, check_count, check_tolerances, square_system
from theria.meta.solvers.dense import columns
from theria.meta.solvers.loop import INDEFINITE, NON_FINITE, RUNNING, classify, epsilon
from theria.meta.solvers.solution import Solution
from theria.meta.solvers.system import LinearMap, System, Tree


@dataclass(frozen=True)
class Nystrom(LinearSolver):
    """A = H + damping I, H positive semidefinite with a spectrum that decays: `rank` products in all, no iteration.

    `matvec` is A, damping included, so that the same system can be given to any other solver. Exact where the rank
    of H is at most `rank`; else an approximation, whose true residual is judged: too large a one ends with
    max_iterations. `preconditioner` makes CG converge in iterations that do not depend on the top `rank` eigenvalues.

    Args:
        rank: of the approximation; the number of products, and of vectors of memory.
        damping: the mu > 0 that is in A. H = A - mu I is what is approximated.
        rtol: tolerance relative to ||b||; loose, because the method does not refine.
        atol: absolute tolerance; the larger of the two counts.
        seed: of the random test matrix, which is the same for every task.
        vmap: make all products at once by `torch.func.vmap`; False for an operator that vmap cannot run.
    """

    rank: int
    damping: float
    rtol: float = 1e-2
    atol: float = 0.0
    seed: int = 0
    vmap: bool = True

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol)
        check_count("rank", self.rank)
        if self.rank is None or not (math.isfinite(self.damping) and self.damping > 0):
            raise ValueError(f"rank={self.rank}, damping={self.damping}: give a rank, and a positive finite damping")

    def solve(self, matvec: LinearMap, b: Tree, x0: Tree | None = None, *, throw: bool = True) -> Solution:
        system = square_system(matvec, b, x0, self.rtol, self.atol)
        U, eigenvalues, status = self._factor(system)
        r = system.residual
        along = r @ U
        d = U @ (along / (eigenvalues + self.damping)) + (r - U @ along) / self.damping
        d = torch.where(status == RUNNING, d, torch.zeros_like(d))
        solution = system.finish(d, status, torch.full_like(status, U.shape[1]))
        return solution.check() if throw else solution

    def preconditioner(self, matvec: LinearMap, like: Tree) -> LinearMap:
        """P^-1 of section 5.1 for `CG(preconditioner=...)`: (l_r + mu) U (l + mu)^-1 U' + (I - U U').

        Where H is not positive semidefinite, it returns NaN, so that the solve that uses it reports non_finite.

        Args:
            matvec: v -> A v, damping included.
            like: a pytree like b.
        """
        system = square_system(matvec, like, None, self.rtol, self.atol)
        U, eigenvalues, status = self._factor(system)
        gains = (eigenvalues[-1] + self.damping) / (eigenvalues + self.damping) - 1
        gains = torch.where(status == RUNNING, gains, torch.full_like(gains, float("nan")))

        def precondition(v: Tree) -> Tree:
            x = system.domain.ravel(v, "the argument of the preconditioner")
            return system.domain.unravel(x + U @ (gains * (x @ U)))

        return precondition

    def _factor(self, system: System) -> tuple[Tensor, Tensor, Tensor]:
        """U (N, r), the eigenvalues (r,) in descending order, and a status: RUNNING where all went well."""
        n = system.b.shape[0]
        r = min(self.rank, n)
        omega = torch.linalg.qr(_gaussian(n, r, self.seed, system.b.device))[0].to(system.b.dtype)
        Y = columns(system.apply, omega, self.vmap) - self.damping * omega
        finite = Y.isfinite().all()
        Y = torch.where(finite, Y, omega)
        # The shift makes the core positive definite where H is only semidefinite; its square root of N is the paper's.
        shift = math.sqrt(n) * epsilon(Y) * (torch.linalg.matrix_norm(Y) + self.damping)
        Y = Y + shift * omega
        core = omega.mT @ Y
        factor, info = torch.linalg.cholesky_ex(0.5 * (core + core.mT))  # L L', L = C' of the paper
        # What the core sees of negative curvature: an eigenvalue below what the shift covers.
        status = classify(system.target, (~finite, NON_FINITE), (info != 0, INDEFINITE))
        factor = torch.where(info == 0, factor, torch.eye(r, dtype=Y.dtype, device=Y.device))
        B = torch.linalg.solve_triangular(factor, Y.mT, upper=False).mT  # (N, r)
        U, singular, _ = torch.linalg.svd(B, full_matrices=False)
        return U, torch.clamp(singular.square() - shift, min=0), status


def _gaussian(n: int, r: int, seed: int, device: torch.device) -> Tensor:
    """(n, r) float64 standard normal numbers that are a function of the seed alone.

    Random functions raise under `torch.func.vmap` by default, and advance the generator of the caller. This is
    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), a counter through a mixing function, and Box-Muller.
    """
    z = (torch.arange(2 * n * r, device=device) + (seed + 1) * 0x632BE59B) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    uniform = (_shift(z ^ _shift(z, 31), 11).double() + 0.5) / 2**53  # in (0, 1)
    u, v = uniform.reshape(2, n, r)
    return torch.sqrt(-2 * torch.log(u)) * torch.cos(2 * math.pi * v)


def _signed(x: int) -> int:
    return x - 2**64


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right, of int64."""
    return (z >> bits) & (2 ** (64 - bits) - 1)
