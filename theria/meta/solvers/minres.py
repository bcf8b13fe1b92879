"""Minimum residuals: Paige and Saunders, SIAM J. Numer. Anal. 12 (1975) 617, section 6.

Lanczos' recurrence A v_j = gamma_j v_{j-1} + delta_j v_j + gamma_{j+1} v_{j+1}, its tridiagonal matrix triangularised
by one Givens rotation (c, s) an iteration; |eta| is the norm of the residual.
"""

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
class MINRES(IterativeSolver):
    """Symmetric A, definite or not: one product an iteration.

    A singular A with b in its range gives the minimum-norm solution (from x0 = 0). With b outside the range the
    residual stops at a least-squares solution, which is the value, reported as a breakdown; it is not the one of
    minimum norm. `preconditioner` is not supported: the stopping rule is on the plain residual.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preconditioner is not None:
            raise ValueError("MINRES takes no preconditioner: use GMRES, or CG where the operator is positive definite")

    def _run(self, system: System, bound: int) -> tuple[Tensor, Tensor, Tensor]:
        # |A r| / (|A| |r|) of a least-squares solution, with room for the rounding of the recurrence.
        stationary = epsilon(system.b) ** 0.75

        def step(state: Vectors) -> Stepped:
            x, v_prev, v, w_prev, w, gamma, eta, c_prev, c, s_prev, s, scale = state
            u = system.apply(v) - gamma * v_prev
            delta = v @ u
            u = u - delta * v
            new_gamma = norm(u)
            a0 = c * delta - c_prev * s * gamma
            a1 = torch.hypot(a0, new_gamma)
            a2 = s * delta + c_prev * c * gamma
            a3 = s_prev * gamma
            scale = torch.maximum(scale, torch.sqrt(gamma.square() + delta.square() + new_gamma.square()))
            # |A r_{k-1}| = |eta| |(a0, c gamma')|: the residual so far is that of least squares.
            over = torch.hypot(a0, c * new_gamma) <= stationary * scale
            new_c, new_s = a0 / nonzero(a1), new_gamma / nonzero(a1)
            new_w = (v - a3 * w_prev - a2 * w) / nonzero(a1)
            x = x + new_c * eta * new_w
            eta = -new_s * eta
            code = classify(
                eta,
                (~(eta + scale).isfinite(), NON_FINITE),
                (over, BREAKDOWN),
                (eta.abs() <= system.goal, CONVERGED),
            )
            return code, (x, v, u / nonzero(new_gamma), w, new_w, new_gamma, eta, c, new_c, s, new_s, scale)

        r = system.residual
        eta, zero = norm(r), torch.zeros_like(r)
        none, one = torch.zeros_like(eta), torch.ones_like(eta)
        state = (zero, zero, r / nonzero(eta), zero, zero, none, eta, one, one, none, none, none)
        status, iterations, state = iterate(step, first_status(eta, system.goal), state, bound, self.check_every)
        return state[0], status, iterations
