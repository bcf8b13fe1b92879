"""Roots of equations: x with F(x, *theta) = 0, as a differentiable function of theta."""

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
from theria.meta.implicit.forward_mode import push_forward
from theria.meta.implicit.frozen import Tree
from theria.meta.implicit.rules import Root
from theria.meta.implicit.search import backtrack
from theria.meta.solvers import GMRES, LinearSolver, Solution
from theria.meta.solvers.base import check_solver
from theria.meta.solvers.loop import (
    BREAKDOWN,
    CONVERGED,
    NON_FINITE,
    Stepped,
    Vectors,
    classify,
    first_status,
    iterate,
    norm,
)

_TIGHT = GMRES(rtol=1e-10, check_every=1)


@dataclass(frozen=True)
class Newton(Method):
    """Newton's method: x <- x - t J^-1 F(x), quadratic near a root; t is halved until ||F|| falls.

    Args:
        linear_solver: of J d = -F. Its tolerance bounds the rate: with rtol the residual falls by rtol a step at best.
        halvings: of one step at most; the solve ends as a breakdown where they do not help.
        check_every: look every so many iterations whether all tasks are done; None never looks.
    """

    solves: ClassVar[str] = "root"

    linear_solver: LinearSolver = _TIGHT
    halvings: int = 20
    check_every: int | None = 1

    def __post_init__(self) -> None:
        check_solver("linear_solver", self.linear_solver)

    def run(self, function: Callable[[Tensor], Tensor], x: Tensor, tol: float, bound: int) -> Ended:
        def step(state: Vectors) -> Stepped:
            x, r = state
            size = norm(r)
            d = self.linear_solver.solve(lambda v: push_forward(function, x, v), -r, throw=False).value

            def trial(t: Tensor) -> tuple[Tensor, Vectors]:
                there = x + t * d
                value = function(there)
                return norm(value) <= (1 - 1e-4 * t) * size, (there, value)

            good, (x, r) = backtrack(trial, torch.ones_like(size), self.halvings)
            after = norm(r)
            rules = (~after.isfinite(), NON_FINITE), (after <= tol, CONVERGED), (~good, BREAKDOWN)
            return classify(size, *rules), (x, r)

        r = function(x)
        first = first_status(norm(r), torch.full_like(norm(r), tol))
        status, iterations, state = iterate(step, first, (x, r), bound, self.check_every)
        return state[0], status, iterations


def root(
    F: Callable[..., Tree],
    x0: Tree,
    *theta: Any,
    solver: Method | None = None,
    linear_solver: LinearSolver | None = None,
    tol: float = 1e-6,
    max_iter: int = 100,
    throw: bool = True,
) -> Solution:
    """x with F(x, *theta) = 0, differentiable in theta by the root rule: x' = -(dF/dx)^-1 (dF/dtheta) theta'.

    To every order, in both modes, under vmap (where each task stops on its own); nothing of the iteration is stored.

    Args:
        F: (x, *theta) -> a pytree like x; pure. What it depends on and is differentiated has to be among theta.
        x0: where to start. The root does not depend on it, so it has no derivative.
        theta: pytrees.
        solver: how to find the root; default Newton().
        linear_solver: of the derivatives' linear systems; default GMRES to `tol`.
        tol: ||F(x)||_2 is to be at most this.
        max_iter: the bound of the solver's iterations.
        throw: raise where the root is not found or a derivative's system not solved. With False the result says the
            former; the derivative is then that at the value returned, and NaN where its own system was not solved.

    Returns:
        Solution(value, result, residual, iterations); only the value is differentiable.

    Raises:
        SolverError: with `throw`.
        ValueError: for structures and shapes that do not fit, and for an F that reads a tensor that is being
            differentiated and is not among its arguments.
    """
    adjoint = linear_solver or GMRES(rtol=resolved(tol, x0))
    request = Request("root", tol, adjoint, throw)
    return iterate_to_solution(request, Root(second_order(F)), solver or Newton(), x0, theta, max_iter)


def custom_root(
    F: Callable[..., Tree],
    *,
    linear_solver: LinearSolver | None = None,
    tol: float = 1e-6,
    vectorized: bool = False,
    throw: bool = True,
) -> Callable[[UserSolver], Callable[..., Solution]]:
    """Decorate any solver of F(x, *theta) = 0: `solver(x0, *theta) -> x` becomes differentiable in theta.

    The solver may be anything, numpy and loops that write in place included: it gets constants, and under vmap one
    task after another. The decorated one returns a Solution (its iterations are 0: not known). `root` says the rest.

    Args:
        tol: ||F(x)||_2 of what the solver returns is to be at most this; math.inf accepts everything.
        vectorized: the solver is made of torch operations that run under vmap, so that all tasks run at once.
    """

    def decorate(solver: UserSolver) -> Callable[..., Solution]:
        @wraps(solver)
        def solve(x0: Tree, *theta: Any) -> Solution:
            adjoint = linear_solver or GMRES(rtol=resolved(min(tol, 1e-6), x0))
            request = Request(getattr(solver, "__name__", "the solver"), tol, adjoint, throw)
            return solution_of_user(request, Root(second_order(F)), solver, x0, theta, vectorized)

        return solve

    return decorate
