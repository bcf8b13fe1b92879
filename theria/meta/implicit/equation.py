"""From an equation and a way to iterate to a solution that is judged, and differentiable by the equation's rule."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from theria.meta.implicit.frozen import Tree, check_function, each_task
from theria.meta.implicit.linear_solve import attach
from theria.meta.implicit.rules import Equation, Theta
from theria.meta.levels import freeze
from theria.meta.solvers import LinearSolver, Result, Solution, SolverError
from theria.meta.solvers.base import check_solver
from theria.meta.solvers.loop import norm
from theria.meta.solvers.system import Space, conclude
from theria.meta.values import check_value

Ended = tuple[Tensor, Tensor, Tensor]  # x (N,), its status, its iterations
UserSolver = Callable[..., Tree]


class Method(ABC):
    """A way to iterate, on vectors (N,). Its `check_every` is that of the linear solvers: see `IterativeSolver`.

    `solves` names the function that it is a solver of: "root", "fixed_point" or "argmin"; "" is any.
    """

    solves: ClassVar[str] = ""

    @abstractmethod
    def run(self, function: Callable[[Tensor], Tensor], x: Tensor, tol: float, bound: int) -> Ended:
        """Iterate from x, at most `bound` times.

        Args:
            function: what the equation is about, on constants: F, f or the loss.
        """


_EXAMPLES = {"root": "Newton()", "fixed_point": "Picard() or Anderson()", "argmin": "LBFGS() or GradientDescent(0.1)"}


def check_method(what: str, method: Any) -> None:
    """A value, and of the kind that iterates on this equation."""
    check_value("solver", method, Method, f"a way to iterate such as {_EXAMPLES[what]}")
    if method.solves not in ("", what):
        raise TypeError(f"solver={method!r} is one of {method.solves}: for {what} give {_EXAMPLES[what]}")


class IterationError(SolverError):
    """A nonlinear solve did not reach its tolerance. The attributes are those of `SolverError`."""

    def __init__(self, what: str, error: SolverError) -> None:
        parts = error.result, error.residual, error.iterations, error.tasks, error.of
        super().__init__(*parts, what=what, advice=_ADVICE[error.result])


_ADVICE = {
    Result.max_iterations: (
        "allow more iterations (max_iter, or the inner steps), loosen the tolerance, start nearer to the solution, or "
        "use another solver; a fixed-point iteration converges only where the spectral radius of df/dx is below 1"
    ),
    Result.breakdown: (
        "the solver ended, or no step of it gets nearer: tol is below what it or the dtype resolves, the function is "
        "not smooth there, or its Jacobian is singular; use float64, a looser tol, another start or another solver"
    ),
    Result.non_finite: "NaN or infinity: the iteration diverges (damp it, or lower the rate), or the function has one",
    Result.indefinite: "the Hessian is not positive definite there: start nearer to a minimum",
}


@dataclass(frozen=True)
class Request:
    """How a solve was asked for, the same for all of them."""

    what: str
    tol: float
    linear_solver: LinearSolver
    throw: bool

    def __post_init__(self) -> None:
        if not self.tol >= 0:
            raise ValueError(f"tol={self.tol}: give a number of at least 0, such as 1e-6")
        check_solver("linear_solver", self.linear_solver)


def iterate_to_solution(
    request: Request, rule: Equation, method: Method, x0: Tree, theta: Theta, max_iter: int
) -> Solution:
    """Run the method on the rule's equation, judge what it gives, attach the rule's derivative."""
    if isinstance(max_iter, bool) or not isinstance(max_iter, int) or max_iter < 1:
        raise ValueError(f"max_iter={max_iter!r}: give an integer of at least 1")
    check_method(request.what, method)
    x, constants = freeze((x0, theta))
    space = Space.of(x, "x0")
    _check_function(request, rule, x, theta)

    def function(vector: Tensor) -> Tensor:
        value = rule.value(space.unravel(vector), constants)
        return value if rule.scalar else torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(value)])

    with torch.no_grad():
        vector, status, iterations = method.run(function, space.ravel(x, "x0"), request.tol, max_iter)
        x = space.unravel(vector)
    return differentiable(request, rule, judge(request, rule, x, constants, status, iterations), theta)


def solution_of_user(
    request: Request, rule: Equation, solver: UserSolver, x0: Tree, theta: Theta, vectorized: bool
) -> Solution:
    """The same for a solver of which nothing is known but what it returns."""
    start, constants = freeze((x0, theta))
    with torch.no_grad():
        x = solver(start, *constants) if vectorized else each_task(solver, start, *constants)
        x = freeze(x)
    _check_function(request, rule, x, theta)
    unknown = torch.zeros_like(pytree.tree_leaves(x)[0].sum(), dtype=torch.int64)
    return differentiable(request, rule, judge(request, rule, x, constants, unknown, unknown), theta)


def _check_function(request: Request, rule: Equation, x: Tree, theta: Theta) -> None:
    """One evaluation: its value has to be of the right shape, and see `check_function`."""
    name = f"the value of the function of {request.what}"
    value = check_function(lambda x, *theta: rule.value(x, theta), (x, *theta), f"the function of {request.what}")
    if not rule.scalar:
        Space.of(x, "x").ravel(freeze(value), name)  # vmap hides its dimensions from the shapes of x
    elif not (isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point()):
        given = f"{tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} is {given}: it has to be one floating-point number, such as a sum over the samples")


def judge(request: Request, rule: Equation, x: Tree, constants: Theta, status: Tensor, iterations: Tensor) -> Solution:
    """x, a constant, with its true residual, whatever the method believed.

    Raises:
        IterationError: with `throw`, where the residual is above the tolerance.
    """
    with torch.no_grad():
        space = Space.of(x, f"the solution of {request.what}")
        residual = norm(space.ravel(rule.residual(x, constants), f"the residual of {request.what}"))
        target = rule.target(request.tol, norm(space.ravel(x, "x")))
    solution = conclude(x, residual, target, status, iterations)
    if request.throw:
        try:
            solution.check()
        except SolverError as error:
            raise IterationError(request.what, error) from None
    return solution


def differentiable(request: Request, rule: Equation, solution: Solution, theta: Theta) -> Solution:
    """The solution with its value as a function of theta."""
    value = attach(rule, solution.value, theta, request.linear_solver, request.throw)
    return solution._replace(value=value)


def resolved(tol: float, x: Tree) -> float:
    """The default tolerance of the derivative's solves: `tol`, as far as the dtype resolves it.

    The residual of a system with condition number k cannot be brought below about k eps: 4 eps^(2/3), which is 1.5e-10
    in float64 and 1e-4 in float32, leaves room for a k of 1e6 and 800.
    """
    dtypes = [leaf.dtype for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return max([tol, *(4 * torch.finfo(dtype).eps ** (2 / 3) for dtype in dtypes)])
