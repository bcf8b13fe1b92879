"""Adjoints that differentiate the inner minimum, not the steps that led there.

Where the inner loss L(theta, c) is stationary in theta, theta*(c) satisfies dL/dtheta = 0 and

    d theta* = -H^-1 (d2L / dtheta dc) dc,   cbar = -(d2L / dtheta dc)' w,   H w = thetabar,   H = d2L/dtheta2

(Bengio, Neural Computation 12 (2000) 1889; Rajeswaran et al. 2019, arXiv 1909.04630). Nothing of the steps is stored.
theta* is a function of the context alone: by the theorem the initial parameters and the optimiser's learned
quantities have no derivative. A loss with a proximal term around the initial parameters has them in its context.
"""

import math
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from theria.curvature.second_order import second_order
from theria.meta.adjoint import Adjoint, Context, InnerLoss
from theria.meta.constant import plain_gradient
from theria.meta.implicit.equation import Request, judge, resolved
from theria.meta.implicit.frozen import check_function, differentiating
from theria.meta.implicit.linear_solve import ScaledIdentity, attach
from theria.meta.implicit.rules import Stationary, Theta
from theria.meta.levels import freeze
from theria.meta.optimisers import Hyper, InnerOptimiser, Params
from theria.meta.outside import Outside
from theria.meta.solvers import CG, LinearSolver, Result
from theria.meta.solvers.base import check_solver
from theria.meta.solvers.loop import MAX_ITERATIONS
from theria.meta.values import check_problem, check_undecayed


@dataclass(frozen=True)
class Implicit(Adjoint):
    """The derivative of the inner minimum by one linear solve with Hessian products: see the module's docstring.

    To every order, in both modes, tasks under vmap. Memory is that of one Hessian product and the solver's vectors,
    whatever the number of steps. The error is that of the steps: the derivative is exact at a minimum, and off by
    O(||dL/dtheta||) elsewhere; `tolerance` bounds that. With `steps=0` the initial parameters are taken
    for the minimum, as by `AID`.

    Args:
        solver: of H w = thetabar; default CG to 1e-6 (float32: 1e-4). It reports a Hessian that is not positive
            definite, by SolverError; `Inexact(CG(max_iterations=k))` takes what k iterations give.
        tolerance: raise SolverError unless ||dL/dtheta||_2 is at most this after the steps; None does not look.
        throw: raise where a solve fails; else the derivative is NaN for each task whose solve failed, and what does
            not meet `tolerance` has the value NaN.

    Raises:
        ValueError: for an inner loss that reads a tensor that is being differentiated and is not an argument, or that
            draws random numbers; for weight decay, whose steps end at another function's minimum.
        RuntimeError: by the derivative, when a tensor that the loss reads and that is no argument was written since.
        SolverError: with `throw`, in the forward pass for the tolerance, in the derivative for the linear solve.
    """

    solver: LinearSolver | None = None
    tolerance: float | None = None
    throw: bool = True

    def __post_init__(self) -> None:
        _check_tolerance(self.tolerance)
        if self.solver is not None:
            check_solver("solver", self.solver)

    def solve(
        self,
        inner_loss: InnerLoss,
        params: Params,
        context: Context,
        optimiser: InnerOptimiser,
        hyper: Hyper,
        steps: int,
    ) -> Params:
        solver = self.solver or CG(rtol=resolved(1e-6, params))
        return _solve(self, solver, inner_loss, params, context, optimiser, hyper, steps)


@dataclass(frozen=True)
class Identity(Adjoint):
    """`Implicit` with H^-1 ~ scale I: T1-T2 (Luketina et al. 2016, arXiv 1511.06727), one product and no solve.

    An approximation by choice, cbar = -scale (d2L / dtheta dc)' thetabar: its angle to the exact gradient is below 90
    degrees near a minimum, its length is not right. It is the last step of `Unrolled` with SGD of rate `scale`, at the
    minimum. Derivatives of it, in every mode and order, are exact derivatives of the approximation.

    Args:
        scale: that of H^-1; the rate of the inner steps is the usual choice.
        tolerance, throw: as for `Implicit`.
    """

    scale: float = 1.0
    tolerance: float | None = None
    throw: bool = True

    def __post_init__(self) -> None:
        _check_tolerance(self.tolerance)
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale={self.scale}: give a positive finite number, such as the inner rate")

    def solve(
        self,
        inner_loss: InnerLoss,
        params: Params,
        context: Context,
        optimiser: InnerOptimiser,
        hyper: Hyper,
        steps: int,
    ) -> Params:
        return _solve(self, ScaledIdentity(self.scale), inner_loss, params, context, optimiser, hyper, steps)


def _check_tolerance(tolerance: float | None) -> None:
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance}: give a number of at least 0, or None to accept any inner solution")


def _solve(
    adjoint: Implicit | Identity,
    solver: LinearSolver,
    inner_loss: InnerLoss,
    params: Params,
    context: Context,
    optimiser: InnerOptimiser,
    hyper: Hyper,
    steps: int,
) -> Params:
    """The steps on constants, then the derivative of a stationary point."""
    inner_loss = second_order(check_problem(inner_loss, params, optimiser, steps))
    check_undecayed(adjoint, optimiser, hyper)
    final, constants, hyper = freeze((params, context, hyper))
    if differentiating():
        outside = Outside(inner_loss)
        with outside.watched():
            check_function(inner_loss, (final, context), "the inner loss")
        inner_loss = outside.repeated(inner_loss)
    rule = Stationary(inner_loss)
    with torch.no_grad():
        state = optimiser.init(final)
        for _ in range(steps):
            grads = plain_gradient(lambda p: rule.loss(p, constants), final)
            final, state = optimiser.update(grads, state, final, hyper)
    if adjoint.tolerance is not None:
        request = Request("the inner problem", adjoint.tolerance, solver, adjoint.throw)
        final = _judged(request, rule, final, (constants,), steps)
    return attach(rule, final, (context,), solver, adjoint.throw)


def _judged(request: Request, rule: Stationary, final: Params, constants: Theta, steps: int) -> Params:
    """The parameters, when they are a stationary point to the tolerance; without `throw`, NaN where they are not."""
    first = pytree.tree_leaves(final)[0]
    status = torch.full_like(first.sum(), MAX_ITERATIONS, dtype=torch.int64)
    solution = judge(request, rule, final, constants, status, torch.full_like(status, steps))
    missed = solution.result != Result.converged
    return pytree.tree_map(lambda p: torch.where(missed, torch.full_like(p, float("nan")), p), final)
