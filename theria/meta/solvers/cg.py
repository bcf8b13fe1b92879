"""Conjugate gradients: Hestenes and Stiefel, J. Res. Nat. Bur. Standards 49 (1952) 409, algorithms (3:1) and (10:2)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from theria.meta.solvers.base import IterativeSolver, LinearSolver, check_count, check_tolerances
from theria.meta.solvers.loop import (
    BREAKDOWN,
    CONVERGED,
    INDEFINITE,
    NON_FINITE,
    Stepped,
    Vectors,
    classify,
    epsilon,
    first_status,
    iterate,
    nonzero,
    norm,
)
from theria.meta.solvers.solution import Solution
from theria.meta.solvers.system import (
    LinearMap,
    Space,
    System,
    Transposable,
    Tree,
    VectorMap,
    conclude,
    on_vectors,
    without_gradient,
)


@dataclass(frozen=True)
class CG(IterativeSolver):
    """Symmetric positive definite A (and M): one product and one preconditioning an iteration, N iterations at most.

    A direction with p'Ap <= 0, up to the rounding of the product, is reported as indefinite; the value is then the
    iterate before it. A semidefinite A with b in its range converges to x0 + the minimum-norm correction.
    """

    def _run(self, system: System, bound: int) -> tuple[Tensor, Tensor, Tensor]:
        eps = epsilon(system.b)

        def step(state: Vectors) -> Stepped:
            x, r, p, rho, scale = state
            q = system.apply(p)
            curvature = p @ q
            length = torch.linalg.vector_norm(p)
            scale = torch.maximum(scale, torch.linalg.vector_norm(q) / nonzero(length))  # at most |A|
            # p'Ap >= |A| |p|^2 / kappa for definite A: within the rounding of the product only if kappa > 1 / (4 eps).
            flat = curvature <= 4 * eps * scale * length.square()
            alpha = rho / nonzero(curvature)
            x, r = x + alpha * p, r - alpha * q
            z = system.precondition(r)
            new_rho = r @ z
            p = z + new_rho / nonzero(rho) * p
            size = norm(r)
            code = classify(
                rho,
                (~(curvature + size + rho).isfinite(), NON_FINITE),
                (flat | (rho <= 0), INDEFINITE),
                (size <= system.goal, CONVERGED),
            )
            return code, (x, r, p, new_rho, scale)

        r = system.residual
        z = system.precondition(r)
        state = (torch.zeros_like(r), r, z, r @ z, torch.zeros_like(system.goal))
        status, iterations, state = iterate(step, first_status(norm(r), system.goal), state, bound, self.check_every)
        return state[0], status, iterations


@dataclass(frozen=True)
class NormalCG(LinearSolver):
    """Any A, also rectangular: CG on A'A x = A'b in the form that keeps r = b - A x (Hestenes and Stiefel, section 10).

    Two products an iteration, with A and with A'; it converges with the square of the condition number of A. An
    inconsistent system is reported as a breakdown, its value being the least-squares solution (of minimum norm from
    x0 = 0), unless `least_squares` asks for just that: then converged means ||A'(b - A x)|| <= max(rtol ||A'b||, atol),
    and that norm is the residual.

    Args:
        preconditioner: v -> M v with M symmetric positive definite, near the inverse of A'A, on pytrees like x.
        least_squares: accept the least-squares solution of an inconsistent system as an answer.
    The others: see `IterativeSolver`.
    """

    rtol: float = 1e-6
    atol: float = 0.0
    max_iterations: int | None = None
    preconditioner: LinearMap | None = None
    check_every: int | None = 8
    least_squares: bool = False

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol)
        check_count("max_iterations", self.max_iterations)
        check_count("check_every", self.check_every)

    def solve(
        self,
        matvec: LinearMap,
        b: Tree,
        x0: Tree | None = None,
        *,
        rmatvec: LinearMap | None = None,
        throw: bool = True,
    ) -> Solution:
        """As `LinearSolver.solve`.

        Args:
            rmatvec: u -> A'u. Without it, a `Transposable` knows its own, and `torch.func.vjp` transposes any other
                `matvec`; x is then like x0, or like b.
        """
        b, x0 = without_gradient(b), without_gradient(x0)
        image = Space.of(b, "b")
        domain = image if x0 is None else Space.of(x0, "x0")
        if rmatvec is None and isinstance(matvec, Transposable):
            rmatvec = matvec.transpose()
        elif rmatvec is not None and x0 is None:
            domain = Space.of(rmatvec(b), "the value of rmatvec")
        apply = on_vectors(matvec, domain, image, "matvec")
        transpose = _transpose(matvec, apply, domain, image, b) if rmatvec is None else None
        transpose = transpose or on_vectors(rmatvec, image, domain, "rmatvec")  # type: ignore[arg-type]
        m = self.preconditioner
        precondition = (lambda v: v) if m is None else on_vectors(m, domain, domain, "the preconditioner")
        start = None if x0 is None else domain.ravel(x0, "x0")
        system = System.of(apply, precondition, domain, image.ravel(b, "b"), start, self.rtol, self.atol)
        solution = self._solve(system, transpose)
        return solution.check() if throw else solution

    def _solve(self, system: System, transpose: VectorMap) -> Solution:
        bound = self.max_iterations or min(10 * system.start.shape[0], 1000)
        if not self.least_squares:
            return system.finish(*self._run(system, transpose, system.goal, bound))
        target = torch.clamp(self.rtol * norm(transpose(system.b)), min=self.atol)
        d, status, iterations = self._run(system, transpose, 0.5 * target / system.scale, bound)
        x = system.start + system.scale * d
        gradient = transpose(system.b - system.apply(x))
        return conclude(system.domain.unravel(x), norm(gradient), target, status, iterations)

    def _run(self, system: System, transpose: VectorMap, goal: Tensor, bound: int) -> tuple[Tensor, Tensor, Tensor]:
        stationary = epsilon(system.b) ** 0.75  # |A'r| / (|A| |r|) of a least-squares solution, with room for rounding

        def step(state: Vectors) -> Stepped:
            x, r, s, p, rho, scale = state
            q = system.apply(p)
            length = torch.linalg.vector_norm(q)
            scale = torch.maximum(scale, length / nonzero(torch.linalg.vector_norm(p)))
            over = torch.linalg.vector_norm(s) <= stationary * scale * torch.linalg.vector_norm(r)
            alpha = rho / nonzero(length.square())
            x, r = x + alpha * p, r - alpha * q
            s = transpose(r)
            z = system.precondition(s)
            new_rho = s @ z
            p = z + new_rho / nonzero(rho) * p
            size = norm(s) if self.least_squares else norm(r)
            code = classify(
                rho,
                (~(length + size + rho).isfinite(), NON_FINITE),
                (over, BREAKDOWN),
                (rho <= 0, INDEFINITE),  # of the preconditioner: A'A is never
                (size <= goal, CONVERGED),
            )
            return code, (x, r, s, p, new_rho, scale)

        r = system.residual
        s = transpose(r)
        z = system.precondition(s)
        state = (torch.zeros_like(s), r, s, z, s @ z, torch.zeros_like(goal))
        status = first_status(norm(s) if self.least_squares else norm(r), goal)
        status, iterations, state = iterate(step, status, state, bound, self.check_every)
        return state[0], status, iterations


def _transpose(matvec: LinearMap, apply: VectorMap, domain: Space, image: Space, b: Tree) -> VectorMap:
    """u -> A'u by reverse mode; A is linear, so its graph at 0 serves every u."""
    zero = image.ravel(b, "b").new_zeros(sum(shape.numel() for shape in domain.shapes))
    apply(zero)  # looks at what matvec returns, which reverse mode below would hide
    pull: Callable[[Tree], tuple[Tree]] = torch.func.vjp(matvec, domain.unravel(zero))[1]
    return on_vectors(lambda u: pull(u)[0], image, domain, "the transpose of matvec")
