"""Generalised minimal residuals: Saad and Schultz, SIAM J. Sci. Stat. Comput. 7 (1986) 856, algorithm 4.

Right-preconditioned, so that the residual minimised is the plain one. Arnoldi by classical Gram-Schmidt, twice, which
is two products with the stacked basis instead of j inner products. The rotations are kept as their product Q.
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
        iterations, done = torch.zeros_like(status), 0
        while done < bound:
            steps = min(self.restart, bound - done, r.shape[0])
            cycle = _Cycle(system, r, status)
            for j in range(steps):
                if self.check_every and (done + j) % self.check_every == 0 and not any_running(cycle.status):
                    break
                iterations = iterations + (cycle.status == RUNNING)
                cycle.extend()
            if not cycle.columns:
                break
            x = torch.where(status == RUNNING, x + cycle.correction(), x)
            done += len(cycle.columns)
            status = cycle.status
            if done < bound:
                r = system.residual - system.apply(x)
                # The residual decides: a cycle that only believed to have converged goes on with another.
                again = ((status == CONVERGED) | (status == RUNNING)) & (iterations > 0)
                status = torch.where(again, first_status(norm(r), system.goal), status)
        return x, status, iterations


class _Cycle:
    """One Krylov space of growing dimension; tasks that are done get columns of the identity, and coefficients 0."""

    def __init__(self, system: System, r: Tensor, status: Tensor) -> None:
        size = norm(r)
        self.system, self.status, self.size = system, status, size
        self.basis: list[Tensor] = [r / nonzero(size)]  # v_j, (N,)
        self.rotation: list[list[Tensor]] = [[torch.ones_like(size)]]  # rows of Q; Q H = [R; 0]
        self.columns: list[Tensor] = []  # of R, (j + 1,)
        self.coefficients: list[Tensor] = []  # of Q |r| e_0

    def extend(self) -> None:
        """Add a dimension."""
        j, size = len(self.columns), self.size
        w = self.system.apply(self.system.precondition(self.basis[j]))
        scale = norm(w)
        basis = torch.stack(self.basis)  # (j + 1, N)
        h = basis @ w
        w = w - h @ basis
        again = basis @ w
        h, w = h + again, w - again @ basis
        below = norm(w)

        rows = torch.stack([torch.stack(row) for row in self.rotation])  # (j + 1, j + 1)
        column = rows @ h
        diagonal = torch.hypot(column[j], below)
        c, s = column[j] / nonzero(diagonal), below / nonzero(diagonal)
        zero = torch.zeros_like(size)
        last = self.rotation[j]
        self.rotation = [[*row, zero] for row in self.rotation[:j]]
        self.rotation += [[*(c * q for q in last), s], [*(-s * q for q in last), c]]
        estimate = (size * self.rotation[j + 1][0]).abs()

        running = self.status == RUNNING
        code = classify(
            size,
            (~(estimate + scale).isfinite(), NON_FINITE),
            (diagonal <= 4 * epsilon(w) * scale, BREAKDOWN),  # the new dimension adds nothing: A is singular on it
            (estimate <= self.system.goal, CONVERGED),
            (below <= 4 * epsilon(w) * scale, BREAKDOWN),  # the space is exhausted
        )
        taken = running & (diagonal > 4 * epsilon(w) * scale) & diagonal.isfinite()
        unit = torch.zeros_like(column)
        unit = torch.cat([unit[:j], torch.ones_like(unit[:1])])
        self.columns.append(torch.where(taken, torch.cat([column[:j], diagonal[None]]), unit))
        self.coefficients.append(torch.where(taken, size * self.rotation[j][0], zero))
        self.status = torch.where(running, code, self.status)
        going = self.status == RUNNING
        self.basis.append(torch.where(going, w / nonzero(below), torch.zeros_like(w)))

    def correction(self) -> Tensor:
        """M V y with R y = the coefficients."""
        k = len(self.columns)
        r = torch.stack([torch.cat([c, c.new_zeros(k - 1 - i)]) for i, c in enumerate(self.columns)], 1)
        y = torch.linalg.solve_triangular(r, torch.stack(self.coefficients)[:, None], upper=True)[:, 0]
        return self.system.precondition(y @ torch.stack(self.basis[:k]))
