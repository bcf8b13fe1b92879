"""The operator as a matrix: for small problems, and as the truth to compare with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from theria.meta.solvers.base import LinearSolver, check_tolerances, square_system
from theria.meta.solvers.loop import BREAKDOWN, NON_FINITE, RUNNING, classify
from theria.meta.solvers.solution import Solution
from theria.meta.solvers.system import LinearMap, Tree, VectorMap


@dataclass(frozen=True)
class Dense(LinearSolver):
    """Any square A: N products to write it down, N^2 numbers of memory, an LU factorisation.

    A singular A is reported as a breakdown, exactly singular with the value x0. Its `iterations` are the N products.

    Args:
        rtol: tolerance relative to ||b||.
        atol: absolute tolerance; the larger of the two counts.
        vmap: write all columns at once by `torch.func.vmap`; False for an operator that vmap cannot run.
    """

    rtol: float = 1e-6
    atol: float = 0.0
    vmap: bool = True

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol)

    def solve(self, matvec: LinearMap, b: Tree, x0: Tree | None = None, *, throw: bool = True) -> Solution:
        system = square_system(matvec, b, x0, self.rtol, self.atol)
        n = system.b.shape[0]
        matrix = columns(system.apply, torch.eye(n, dtype=system.b.dtype, device=system.b.device), self.vmap)
        d, info = torch.linalg.solve_ex(matrix, system.residual)
        finite = matrix.isfinite().all() & system.residual.isfinite().all()
        status = classify(system.target, (~finite, NON_FINITE), ((info != 0) | ~d.isfinite().all(), BREAKDOWN))
        d = torch.where(status == RUNNING, d, torch.zeros_like(d))
        status = torch.where(status == RUNNING, BREAKDOWN, status)  # if the residual says that it is no answer
        solution = system.finish(d, status, torch.full_like(status, n))
        return solution.check() if throw else solution


def columns(apply: VectorMap, vectors: Tensor, vmap: bool) -> Tensor:
    """A X for X (N, K), column by column.

    Products of a matrix that another `vmap` batches are batched over both.
    """
    if vmap:
        return torch.func.vmap(apply, in_dims=1, out_dims=1)(vectors)
    return torch.stack([apply(v) for v in vectors.unbind(1)], 1)
