"""Generalised minimal residuals: Saad and Schultz, SIAM J. Sci. Stat. Comput. 7 (1986) 856, algorithm 4.

Right-preconditioned, so that the residual minimised is the plain one. Arnoldi by classical Gram-Schmidt, twice, which
is two products with the stacked basis instead of j inner products. The rotations are kept as their product Q, and of
R the inverse, column by column: a diagonal of R does not show that A is singular on the Krylov space, |R^-1 e_j| does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from theria.meta.solvers.base import IterativeSolver, check_count
from theria.meta.solvers.loop import (
    BREAKDOWN,
    CONVERGED,
    NON_FINITE,
    RUNNING,
    any_running,
    classify,
    epsilon,
    first_status,
    nonzero,
    norm,
)
from theria.meta.solvers.system import System


@dataclass(frozen=True)
class GMRES(IterativeSolver):
    """Any square A: one product an iteration, `restart` + 1 vectors of memory. Without a restart, N iterations.

    Restarted, it can stagnate where A is not positive real; it then ends with max_iterations. An inconsistent
    singular system is reported: as a breakdown where the Krylov space is exhausted, else as max_iterations.

    Args:
        restart: the dimension of the Krylov space after which it is built anew.
    The others: see `IterativeSolver`.
    """

    restart: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("restart", self.restart)

    def _run(self, system: System, bound: int) -> tuple[Tensor, Tensor, Tensor]:
        x, r = torch.zeros_like(system.residual), system.residual
        status = first_status(norm(r), system.goal)
        iterations, done, scale = torch.zeros_like(status), 0, torch.zeros_like(system.goal)
        while done < bound:
            steps = min(self.restart, bound - done, r.shape[0])
            cycle = _Cycle(system, r, status, scale)
            for j in range(steps):
                if self.check_every and (done + j) % self.check_every == 0 and not any_running(cycle.status):
                    break
                iterations = iterations + (cycle.status == RUNNING)
                cycle.extend()
            if not len(cycle.inverse):
                break
            x = torch.where(status == RUNNING, x + cycle.correction(), x)
            done += len(cycle.inverse)
            status, scale = cycle.status, cycle.scale
            if done < bound:
                r = system.residual - system.apply(x)
                # The residual decides: a cycle that only believed to have converged goes on with another.
                again = ((status == CONVERGED) | (status == RUNNING)) & (iterations > 0)
                status = torch.where(again, first_status(norm(r), system.goal), status)
        return x, status, iterations


class _Cycle:
    """One Krylov space of growing dimension; tasks that are done get columns of the identity, and coefficients 0."""

    def __init__(self, system: System, r: Tensor, status: Tensor, scale: Tensor) -> None:
        size = norm(r)
        self.system, self.status, self.size = system, status, size
        self.scale = scale  # the largest |A M v| so far, at most |A M|
        self.basis: list[Tensor] = [r / nonzero(size)]  # v_j, (N,)
        self.rotation = torch.ones_like(r[:1, None])  # Q, (k + 1, k + 1); Q H = [R; 0]
        self.inverse = r.new_zeros(0, 0)  # R^-1, (k, k)
        self.coefficients = r[:0]  # of Q |r| e_0, (k,)

    def extend(self) -> None:
        """Add a dimension."""
        j, size = len(self.inverse), self.size
        w = self.system.apply(self.system.precondition(self.basis[j]))
        self.scale = torch.maximum(self.scale, norm(w))
        basis = torch.stack(self.basis)  # (j + 1, N)
        h = basis @ w
        w = w - h @ basis
        again = basis @ w
        h, w = h + again, w - again @ basis
        below = norm(w)

        column = self.rotation @ h
        diagonal = torch.hypot(column[j], below)
        c, s = column[j] / nonzero(diagonal), below / nonzero(diagonal)
        last = self.rotation[j]
        rows = torch.stack([torch.cat([c * last, s[None]]), torch.cat([-s * last, c[None]])])
        self.rotation = torch.cat([_widened(self.rotation[:j]), rows])
        estimate = (size * rows[1, 0]).abs()

        above = self.inverse @ column[:j]
        inverse = torch.cat([-above, torch.ones_like(column[:1])]) / nonzero(diagonal)  # R^-1 e_j
        tiny = 64 * epsilon(w) * self.scale  # of a null vector, its own rounding and that of the product: 33 were seen
        # |R R^-1 e_j| = 1: with |R^-1 e_j| >= 1 / tiny the new dimension adds nothing, A is singular on the space.
        singular = (diagonal <= tiny) | (norm(inverse) * tiny >= 1)

        running = self.status == RUNNING
        code = classify(
            size,
            (~(estimate + self.scale).isfinite(), NON_FINITE),
            (singular, BREAKDOWN),
            (estimate <= self.system.goal, CONVERGED),
            (below <= tiny, BREAKDOWN),  # the space is exhausted
        )
        taken = running & ~singular & diagonal.isfinite()
        unit = torch.cat([torch.zeros_like(column[:j]), torch.ones_like(column[:1])])
        inverse = torch.where(taken, inverse, unit)
        self.inverse = torch.cat([torch.cat([self.inverse, torch.zeros_like(inverse[None, :j])]), inverse[:, None]], 1)
        coefficient = torch.where(taken, size * rows[0, 0], torch.zeros_like(size))
        self.coefficients = torch.cat([self.coefficients, coefficient[None]])
        self.status = torch.where(running, code, self.status)
        going = self.status == RUNNING
        self.basis.append(torch.where(going, w / nonzero(below), torch.zeros_like(w)))

    def correction(self) -> Tensor:
        """M V y with R y = the coefficients."""
        y = self.inverse @ self.coefficients
        return self.system.precondition(y @ torch.stack(self.basis[: len(y)]))


def _widened(matrix: Tensor) -> Tensor:
    """With a column of zeros at the end."""
    return torch.cat([matrix, torch.zeros_like(matrix[:, :1])], 1)
