"""Stabilised bi-conjugate gradients: van der Vorst, SIAM J. Sci. Stat. Comput. 13 (1992) 631, its algorithm."""

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
    nonzero,
    norm,
)
from theria.meta.solvers.system import System


@dataclass(frozen=True)
class BiCGSTAB(IterativeSolver):
    """Any square A, without its transpose and in constant memory: two products an iteration.

    The residual does not fall monotonically, and the method can break down (a rotation by 90 degrees does it at
    once), which is reported; GMRES does not. Preconditioned from the right.
    """

    def _run(self, system: System, bound: int) -> tuple[Tensor, Tensor, Tensor]:
        eps = epsilon(system.b)
        shadow = system.residual
        shadow_size = norm(shadow)

        def step(state: Vectors) -> Stepped:
            x, r, p, rho = state
            y = system.precondition(p)
            v = system.apply(y)
            against = shadow @ v
            alpha = rho / nonzero(against)
            half = r - alpha * v
            z = system.precondition(half)
            t = system.apply(z)
            done = norm(half) <= system.goal
            omega = torch.where(done, torch.zeros_like(rho), (t @ half) / nonzero(t @ t))
            x = x + alpha * y + omega * z
            r = half - omega * t
            new_rho = shadow @ r
            p = r + (new_rho / nonzero(rho)) * (alpha / nonzero(omega)) * (p - omega * v)
            size = norm(r)
            code = classify(
                rho,
                (~(alpha + omega + size).isfinite(), NON_FINITE),
                (against.abs() <= eps * shadow_size * norm(v), BREAKDOWN),
                (size <= system.goal, CONVERGED),
                ((t @ half).abs() <= eps * norm(t) * norm(half), BREAKDOWN),
                (new_rho.abs() <= eps * shadow_size * size, BREAKDOWN),
            )
            return code, (x, r, p, new_rho)

        state = (torch.zeros_like(shadow), shadow, shadow, shadow @ shadow)
        status, iterations, state = iterate(
            step, first_status(shadow_size, system.goal), state, bound, self.check_every
        )
        return state[0], status, iterations
