"""Minima: x where L(x, *theta) is smallest, as a differentiable function of theta."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from theria.curvature.second_order import second_order
from theria.meta.implicit.equation import Method, Request, iterate_to_solution, resolved
from theria.meta.implicit.frozen import Tree
from theria.meta.implicit.minimisers import LBFGS
from theria.meta.implicit.rules import Stationary
from theria.meta.solvers import CG, LinearSolver, Solution


def argmin(
    loss: Callable[..., Tensor],
    x0: Tree,
    *theta: Any,
    solver: Method | None = None,
    linear_solver: LinearSolver | None = None,
    tol: float = 1e-6,
    max_iter: int = 100,
    throw: bool = True,
) -> Solution:
    """x with dL/dx(x, *theta) = 0, a minimum, differentiable in theta: x' = -(d2L/dx2)^-1 (d2L/dx dtheta) theta'.

    To every order, in both modes, under vmap (where each task stops on its own); nothing of the iteration is stored.
    The Hessian is never formed: its products are taken forward over reverse.

    Args:
        loss: (x, *theta) -> scalar; pure. What it depends on and is differentiated has to be among theta.
        x0: where to start. It chooses the minimum, of which it has no derivative.
        theta: pytrees.
        solver: LBFGS() by default, GradientDescent(lr) or NewtonCG().
        linear_solver: of the derivatives' linear systems; default CG to `tol`, which reports a Hessian that is not
            positive definite: x is then no minimum.
        tol: ||dL/dx||_2 is to be at most this.
        max_iter: the bound of the solver's iterations.
        throw: raise where no minimum is found or a derivative's system is not solved. With False the result says the
            former; the derivative is then that at the value returned, and NaN where its own system was not solved.

    Returns:
        Solution(value, result, residual, iterations); only the value is differentiable.

    Raises:
        SolverError: with `throw`.
        ValueError: for structures that do not fit, a loss that is no scalar, and one that reads a tensor that is being
            differentiated and is not among its arguments.
    """
    adjoint = linear_solver or CG(rtol=resolved(tol, x0))
    request = Request("argmin", tol, adjoint, throw)
    return iterate_to_solution(request, Stationary(second_order(loss)), solver or LBFGS(), x0, theta, max_iter)
