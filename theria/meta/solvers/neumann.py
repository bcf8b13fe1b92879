"""Neumann series: A^-1 = alpha sum_k (I - alpha A)^k (Lorraine, Vicol and Duvenaud 2020, arXiv 1911.02590)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from theria.meta.solvers.base import IterativeSolver
from theria.meta.solvers.loop import (
    BREAKDOWN,
    CONVERGED,
    NON_FINITE,
    Stepped,
    Vectors,
    classify,
    epsilon,
    first_status,
    iterate,
    norm,
)
from theria.meta.solvers.system import System


@dataclass(frozen=True)
class Neumann(IterativeSolver):
    """x <- x + scale M (b - A x): k iterations from 0 are the first k terms of the series; one product an iteration.

    The error falls by I - scale M A each iteration: it converges if the spectral radius of that is below 1. A residual
    that has grown by 1 / eps is reported as a breakdown. For a truncated series by choice, give
    `max_iterations=terms` and `throw=False`.

    Args:
        scale: alpha; below 2 / lambda_max for a symmetric positive definite A. 1 for A = I - df/dx at a fixed point.
    The others: see `IterativeSolver`.
    """

    scale: float = 1.0

    def _run(self, system: System, bound: int) -> tuple[Tensor, Tensor, Tensor]:
        first = norm(system.residual)
        most = first / epsilon(system.b)

        def step(state: Vectors) -> Stepped:
            x, r = state
            x = x + self.scale * system.precondition(r)
            r = system.residual - system.apply(x)
            size = norm(r)
            code = classify(
                size, (~size.isfinite(), NON_FINITE), (size > most, BREAKDOWN), (size <= system.goal, CONVERGED)
            )
            return code, (x, r)

        state = (torch.zeros_like(system.residual), system.residual)
        status, iterations, state = iterate(step, first_status(first, system.goal), state, bound, self.check_every)
        return state[0], status, iterations
