"""What the linear solvers have in common: their arguments, and the way into and out of a solve."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from theria.meta.solvers.solution import Solution
from theria.meta.solvers.system import LinearMap, Space, System, Tree, on_vectors, without_gradient
from theria.meta.values import check_value


class LinearSolver(ABC):
    """Solves A x = b for a linear map A that is given by its products, on pytrees of tensors.

    A solve is not differentiated through: an implicit rule gives its derivative by one more solve. So a b, x0 or
    operator that is being differentiated raises, unless under `torch.no_grad()`, where the value is a constant.
    (Forward-mode tangents are not switched off by `no_grad`, and raise there too; under `torch.compile` nothing looks.)
    """

    @abstractmethod
    def solve(self, matvec: LinearMap, b: Tree, x0: Tree | None = None, *, throw: bool = True) -> Solution:
        """x with ||b - A x||_2 <= max(rtol ||b||_2, atol).

        Args:
            matvec: v -> A v, linear and pure, on pytrees like b. Runs under `torch.func.vmap` if the solve does.
            b: a pytree of tensors of any shapes, of one real floating-point dtype on one device.
            x0: where to start, a pytree like b; default 0.
            throw: raise when a task has not converged, which synchronises with the device once. With False the
                result says how each task ended: see `Solution.check`. Under `torch.compile` only False works.

        Raises:
            SolverError: with `throw`, naming result, residual and iterations.
            ValueError: for structures, shapes or dtypes that do not fit, and for what is being differentiated.
        """


def check_solver(name: str, solver: Any) -> None:
    """A linear solver, as a value."""
    check_value(name, solver, LinearSolver, "a linear solver such as CG() or GMRES()")


def check_tolerances(rtol: float, atol: float) -> None:
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value}: give a finite number of at least 0, such as 1e-6")


def check_count(name: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name}={value!r}: give an integer of at least 1, or None for the default")


def square_system(
    matvec: LinearMap, b: Tree, x0: Tree | None, rtol: float, atol: float, preconditioner: LinearMap | None = None
) -> System:
    """The system of an operator that maps pytrees like b to pytrees like b."""
    b, x0 = without_gradient(b), without_gradient(x0)
    space = Space.of(b, "b")
    apply = on_vectors(matvec, space, space, "matvec")
    precondition = _same if preconditioner is None else on_vectors(preconditioner, space, space, "the preconditioner")
    start = None if x0 is None else space.ravel(x0, "x0")
    return System.of(apply, precondition, space, space.ravel(b, "b"), start, rtol, atol)


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class IterativeSolver(LinearSolver):
    """The arguments of every iterative solver.

    Args:
        rtol: tolerance relative to ||b||.
        atol: absolute tolerance; the larger of the two counts.
        max_iterations: the bound of the loop; None for min(10 N, 1000), N the number of entries of b.
        preconditioner: v -> M v with M near the inverse of A, a pytree like b to a pytree like b.
        check_every: look after every so many iterations whether all tasks are done, and stop. Each look is one
            synchronisation with the device; without a look (None) all `max_iterations` are run, the finished tasks
            frozen. On average (check_every - 1) / 2 iterations are run in vain. It works under `vmap`, where the look
            is at all tasks; under `torch.compile` the loop always runs to its bound. 1 is best on a CPU.
    """

    rtol: float = 1e-6
    atol: float = 0.0
    max_iterations: int | None = None
    preconditioner: LinearMap | None = None
    check_every: int | None = 8

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol)
        check_count("max_iterations", self.max_iterations)
        check_count("check_every", self.check_every)

    def solve(self, matvec: LinearMap, b: Tree, x0: Tree | None = None, *, throw: bool = True) -> Solution:
        system = square_system(matvec, b, x0, self.rtol, self.atol, self.preconditioner)
        solution = system.finish(*self._run(system, self.bound(system.b)))
        return solution.check() if throw else solution

    def bound(self, b: Tensor) -> int:
        return self.max_iterations or min(10 * b.shape[0], 1000)

    @abstractmethod
    def _run(self, system: System, bound: int) -> tuple[Tensor, Tensor, Tensor]:
        """d with A d near `system.residual`, its status, its iterations."""
