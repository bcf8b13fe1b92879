"""Fixed points: x with f(x, *theta) = x, as a differentiable function of theta."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor

from theria.curvature.second_order import second_order
from theria.meta.implicit.equation import (
    Ended,
    Method,
    Request,
    UserSolver,
    iterate_to_solution,
    resolved,
    solution_of_user,
)
from theria.meta.implicit.frozen import Tree
from theria.meta.implicit.rules import FixedPoint
from theria.meta.solvers import GMRES, LinearSolver, Solution
from theria.meta.solvers.base import check_count
from theria.meta.solvers.loop import (
    CONVERGED,
    NON_FINITE,
    RUNNING,
    Stepped,
    Vectors,
    classify,
    iterate,
    nonzero,
    norm,
)


@dataclass(frozen=True)
class Picard(Method):
    """x <- x + damping (f(x) - x): linear, by the spectral radius of df/dx where undamped.

    Args:
        damping: in (0, 1].
        check_every: look every so many iterations whether all tasks are done; None never looks.
    """

    solves: ClassVar[str] = "fixed_point"

    damping: float = 1.0
    check_every: int | None = 8

    def __post_init__(self) -> None:
        _check_damping(self.damping)
        check_count("check_every", self.check_every)

    def run(self, function: Callable[[Tensor], Tensor], x: Tensor, tol: float, bound: int) -> Ended:
        def step(state: Vectors) -> Stepped:
            (x,) = state
            r = function(x) - x
            return _code(r, x, tol), (x + self.damping * r,)

        status, iterations, (x,) = iterate(step, _running(x), (x,), bound, self.check_every)
        return x, status, iterations


@dataclass(frozen=True)
class Anderson(Method):
    """Anderson's acceleration (Walker and Ni, SIAM J. Numer. Anal. 49 (2011) 1715, algorithm AA in difference form).

    With r = f(x) - x and the differences dX, dR of the last `memory` steps (their rows):
        g = argmin ||r - dR'g||,   x <- x + damping r - (dX + damping dR)'g
    On an affine f it is GMRES in disguise: exact after N + 1 steps if memory >= N. No step is guarded; where it does
    not converge the result says so.

    Args:
        memory: differences kept, each two vectors.
        damping: in (0, 1].
        ridge: relative weight that keeps g bounded where the differences become linearly dependent.
        check_every: look every so many iterations whether all tasks are done; None never looks.
    """

    solves: ClassVar[str] = "fixed_point"

    memory: int = 5
    damping: float = 1.0
    ridge: float = 1e-12
    check_every: int | None = 8

    def __post_init__(self) -> None:
        _check_damping(self.damping)
        check_count("memory", self.memory)
        check_count("check_every", self.check_every)

    def run(self, function: Callable[[Tensor], Tensor], x: Tensor, tol: float, bound: int) -> Ended:
        def step(state: Vectors) -> Stepped:
            x, last_x, last_r, dX, dR = state
            r = function(x) - x
            dX = torch.cat([dX[1:], (x - last_x)[None]])  # zeros in the first step, whose g is 0 then
            dR = torch.cat([dR[1:], torch.where((x != last_x).any(), r - last_r, torch.zeros_like(r))[None]])
            g = self._mix(dR, r)
            x_new = x + self.damping * r - (dX + self.damping * dR).mT @ g
            x_new = torch.where(norm(r) <= tol * torch.clamp(norm(x), min=1), x + r, x_new)
            return _code(r, x, tol), (x_new, x, r, dX, dR)

        none = x.new_zeros(self.memory, x.shape[0])
        state = (x, x, torch.zeros_like(x), none, none)
        status, iterations, state = iterate(step, _running(x), state, bound, self.check_every)
        return state[0], status, iterations

    def _mix(self, dR: Tensor, r: Tensor) -> Tensor:
        """g (memory,), of rows scaled to norm 1; a row of zeros gets 0."""
        sizes = nonzero(torch.linalg.vector_norm(dR, dim=1))
        rows = dR / sizes[:, None]
        gram = rows @ rows.mT
        eye = torch.eye(self.memory, dtype=r.dtype, device=r.device)
        weight = max(self.ridge, 4 * torch.finfo(r.dtype).eps)
        empty = torch.diagonal(gram) == 0
        return torch.linalg.solve_ex(gram + weight * eye + torch.diag_embed(empty.to(r.dtype)), rows @ r)[0] / sizes


def _check_damping(damping: float) -> None:
    if not 0 < damping <= 1:
        raise ValueError(f"damping={damping} is outside (0, 1]: give 1 for none, or such as 0.5")


def _running(x: Tensor) -> Tensor:
    return torch.full_like(x.sum(), RUNNING, dtype=torch.int64)


def _code(r: Tensor, x: Tensor, tol: float) -> Tensor:
    size = norm(r)
    return classify(size, (~size.isfinite(), NON_FINITE), (size <= tol * torch.clamp(norm(x), min=1), CONVERGED))


def fixed_point(
    f: Callable[..., Tree],
    x0: Tree,
    *theta: Any,
    solver: Method | None = None,
    linear_solver: LinearSolver | None = None,
    tol: float = 1e-6,
    max_iter: int = 100,
    throw: bool = True,
) -> Solution:
    """x with f(x, *theta) = x, differentiable in theta by the rule x' = (I - df/dx)^-1 (df/dtheta) theta'.

    To every order, in both modes, under vmap (where each task stops on its own); nothing of the iteration is stored.

    Args:
        f: (x, *theta) -> a pytree like x; pure. What it depends on and is differentiated has to be among theta.
        x0: where to start. The fixed point does not depend on it, so it has no derivative.
        theta: pytrees.
        solver: Picard() by default, or Anderson().
        linear_solver: of the derivatives' linear systems; default GMRES to `tol`. `Neumann()` is backpropagation
            through further iterations, `ScaledIdentity()` the Jacobian-free approximation.
        tol: ||f(x) - x||_2 is to be at most tol max(1, ||x||_2).
        max_iter: the bound of the solver's iterations.
        throw: raise where the iteration does not converge or a derivative's system is not solved. With False the result
            says the former; the derivative is then that at the value returned, and NaN where its own system was not
            solved.

    Returns:
        Solution(value, result, residual, iterations); only the value is differentiable.

    Raises:
        SolverError: with `throw`.
        ValueError: for structures and shapes that do not fit, and for an f that reads a tensor that is being
            differentiated and is not among its arguments.
    """
    adjoint = linear_solver or GMRES(rtol=resolved(tol, x0))
    request = Request("fixed_point", tol, adjoint, throw)
    return iterate_to_solution(request, FixedPoint(second_order(f)), solver or Picard(), x0, theta, max_iter)


def custom_fixed_point(
    f: Callable[..., Tree],
    *,
    linear_solver: LinearSolver | None = None,
    tol: float = 1e-6,
    vectorized: bool = False,
    throw: bool = True,
) -> Callable[[UserSolver], Callable[..., Solution]]:
    """Decorate any solver of f(x, *theta) = x: `solver(x0, *theta) -> x` becomes differentiable in theta.

    As `custom_root`, with the rule of a fixed point; `tol` is that of `fixed_point`.
    """

    def decorate(solver: UserSolver) -> Callable[..., Solution]:
        @wraps(solver)
        def solve(x0: Tree, *theta: Any) -> Solution:
            adjoint = linear_solver or GMRES(rtol=resolved(min(tol, 1e-6), x0))
            request = Request(getattr(solver, "__name__", "the solver"), tol, adjoint, throw)
            return solution_of_user(request, FixedPoint(second_order(f)), solver, x0, theta, vectorized)

        return solve

    return decorate
