"""What a linear solver returns: a value, how it ended, and what to do about it."""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from theria.meta.solvers.loop import readable


class Result(IntEnum):
    """How a solve ended. Held as an integer tensor, so that every task under `torch.func.vmap` has its own."""

    converged = 0
    max_iterations = 1
    breakdown = 2
    indefinite = 3
    non_finite = 4

    @property
    def advice(self) -> str:
        """What happened and what to do, in one sentence."""
        return _ADVICE[self]


_ADVICE = {
    Result.converged: "the residual is within the tolerance",
    Result.max_iterations: (
        "the tolerance was not reached within the iterations allowed: raise max_iterations (for Nystrom: rank), "
        "loosen rtol or atol, give a preconditioner, or add damping to the operator"
    ),
    Result.breakdown: (
        "the method cannot get nearer to the tolerance: the operator is singular and b is outside its range, the "
        "tolerance is below what the dtype can resolve, the iteration diverges, or the operator is not of the "
        "solver's kind (symmetric, contractive): use another solver, float64, a looser tolerance or damping"
    ),
    Result.indefinite: (
        "the operator (or the preconditioner) is not positive definite: a direction of negative or zero curvature "
        "was met, so the inner problem may not be at a minimum; add damping (for IMAML: raise strength), optimise the "
        "inner problem further, or use MINRES (symmetric) or GMRES if a saddle point is meant"
    ),
    Result.non_finite: "NaN or infinity in b, x0, the operator or the preconditioner: look for it in the inner problem",
}


class SolverError(RuntimeError):
    """A solve failed.

    Attributes:
        result: how; of several failed tasks, that of the first.
        residual: of the same task.
        iterations: of the same task.
        tasks: the positions of the failed tasks in the flattened batch; empty for a single solve.
        of: the number of tasks.
        reason: what failed, how, and what to do about it.
    """

    def __init__(
        self,
        result: Result,
        residual: float,
        iterations: int,
        tasks: Sequence[int] = (),
        of: int = 1,
        *,
        what: str = "linear solve",
        advice: str | None = None,
    ) -> None:
        """
        Args:
            what: what was solved.
            advice: what to do; default the result's, which is that of linear solves.
        """
        self.result, self.residual, self.iterations = result, residual, iterations
        self.tasks, self.of = tuple(tasks), of
        which = f"{len(self.tasks)} of {of} tasks, the first of them task {self.tasks[0]}: " if self.tasks else ""
        after = f" after {iterations} iterations" if iterations else ""  # 0 where they are not known, too
        self.reason = (
            f"{what} did not converge ({which}{result.name}, residual {residual:.3e}{after}): {advice or result.advice}"
        )
        super().__init__(f"{self.reason}. With throw=False the solution is returned with its result instead")


class Solution(NamedTuple):
    """The outcome of a linear solve; a pytree, so it passes through `torch.func.vmap`.

    Attributes:
        value: a pytree like b (under `vmap` one for each task). An answer only where `result` is converged.
        result: int64 (), a `Result`.
        residual: (), the norm ||b - A value||_2, computed from `value` at the end, not by the method's recursion.
        iterations: int64 (), the iterations this task ran.
    """

    value: Any
    result: Tensor
    residual: Tensor
    iterations: Tensor

    def check(self) -> "Solution":
        """Itself when every task converged; synchronises with the device once.

        Raises:
            SolverError: when a task did not converge. Names all of them, also inside `torch.func.vmap`.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "checking a solution reads it on the host, which torch.compile cannot do: solve with throw=False "
                "inside the compiled function, return the solution and call solution.check() outside"
            )
        results = readable(self.result)
        failed = (results != Result.converged).flatten().nonzero().flatten().tolist()
        if failed:
            first = failed[0]
            # A quantity that does not depend on the task has one entry, whatever the batch.
            residual, iterations = (readable(x).expand(results.shape).flatten()[first].item() for x in self[2:])
            code = Result(int(results.flatten()[first].item()))
            tasks = failed if results.ndim else ()
            raise SolverError(code, float(residual), int(iterations), tasks, results.numel())
        return self
