"""iMAML: meta-learning with implicit gradients (Rajeswaran et al. 2019, arXiv 1909.04630)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from theria.curvature.second_order import second_order
from theria.meta.adjoint import Adjoint, Context, InnerLoss
from theria.meta.checks import Adapt, check_positive, check_stationary
from theria.meta.constant import constant, plain_gradient
from theria.meta.functional import Predictor
from theria.meta.implicit_adjoint import Identity, Implicit
from theria.meta.learner import GradientLearner, LossFn
from theria.meta.optimisers import SGD, InnerOptimiser, Params


class IMAML(GradientLearner):
    """MAML whose inner problem has a minimum that does not forget where it began, differentiated at that minimum.

        phi* = argmin_phi G(phi, theta),   G = support loss(phi) + strength / 2 |phi - theta|^2   (section 2.2, eq. 4)
        d phi* / d theta = (I + H / strength)^-1 = strength (H + strength I)^-1                    (Lemma 1)

    with H the Hessian of the support loss at phi*. By default `Implicit(CG())` solves with the Hessian of G, which is
    H + strength I; relative to the right-hand side that is the paper's system (I + H / strength) g = v (Algorithm 2),
    with the same iterates and the same tolerance. The path to phi* does not matter, and is not stored.

    The derivative belongs to the minimum. So each outer loss looks how near the inner steps came to it (`tol`), and a
    direction of negative curvature, where phi_T is no minimum, is a `SolverError`. Raise `strength` against it: CG
    needs H + strength I positive definite.

    Args:
        inner: how G is minimised; default SGD(0.1). A rate above 2 / (|H| + strength) diverges.
        steps: number of inner steps.
        strength: lambda of the paper, which takes 2.
        adjoint: default `Implicit()`, with CG; the paper's five iterations, whatever their residual, are
            `Implicit(Inexact(CG(max_iterations=5)))`. Any other differentiates in its own way, of the same problem.
        tol: largest norm of the gradient of G at phi_T, relative to that at theta. The outer gradient knows nothing of
            the inner steps, so that training itself can make them diverge (features that grow raise |H|): 1 says no
            more than that they did not. With an adjoint whose `throw` is False the host looks at nothing: the loss and
            the gradient of a task above `tol` are NaN. None does not look, which saves two gradients and, with
            `throw`, a synchronisation with the device in each outer step; `stationarity` looks when asked. A network
            with kinks (ReLU behind BatchNorm) may settle where its gradient does not vanish: it needs 1 or None.
    The others: see `MAML`.

    Raises:
        SolverError: by an outer loss, when the inner steps end farther from the minimum than `tol`; by the backward,
            when the linear solve fails.
    """

    def __init__(
        self,
        model: nn.Module | Predictor,
        loss_fn: LossFn,
        inner: InnerOptimiser | None = None,
        steps: int = 16,
        adjoint: Adjoint | None = None,
        adapt: Adapt = None,
        *,
        strength: float = 2.0,
        tol: float | None = 0.1,
        **options: Any,
    ) -> None:
        adjoint = Implicit() if adjoint is None else adjoint
        super().__init__(model, loss_fn, SGD(lr=0.1) if inner is None else inner, steps, adjoint, **options)
        self._choose(adapt)
        self.strength = check_positive("strength", strength, "the weight of the proximal term")
        self.tol = None if tol is None else check_positive("tol", tol, "the tolerance on the inner gradient, or None,")

    def stationarity(self, episode: Any, *, batched: bool | None = None) -> Tensor:
        """|grad G| at phi_T over that at theta, for each task: ([T],). 0 is a minimum, 1 is no progress."""
        meta_params = dict(self.named_parameters())

        def task(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
            return self._stationarity(meta_params, self._adapt(meta_params, sx, sy, self.steps), sx, sy)

        with torch.no_grad():
            return self._over_tasks(task, episode, batched)

    def _inner_loss(self, params: Params, context: tuple[Params, Tensor, Tensor, Params]) -> Tensor:
        """G of phi = params, given `_context` and theta."""
        fixed, data, y, theta = context
        proximity = torch.stack([(p - theta[name]).square().sum() for name, p in params.items()]).sum()
        return self._support_loss(params, (fixed, data, y)) + self.strength / 2 * proximity

    def _problem(
        self, meta_params: Mapping[str, Tensor], x: Tensor, y: Tensor
    ) -> tuple[InnerLoss, Params, Context, Params]:
        theta, fixed = self._split(meta_params)
        return self._inner_loss, theta, (*self._context(fixed, x, y), theta), fixed

    def _task_loss(self, meta_params: Mapping[str, Tensor], sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        adapted = self._adapt(meta_params, sx, sy, self.steps)
        loss = self._query_loss(meta_params, adapted, qx, qy)
        if self.tol is None:
            return loss
        ratio = self._stationarity(meta_params, adapted, sx, sy)
        if isinstance(self.adjoint, Implicit | Identity) and not self.adjoint.throw:
            return loss * torch.where(ratio <= self.tol, 1.0, math.nan)
        check_stationary(ratio, self.tol, self.steps)
        return loss

    def _stationarity(self, meta_params: Mapping[str, Tensor], adapted: Params, x: Tensor, y: Tensor) -> Tensor:
        theta, fixed, x, adapted = constant((*self._split(meta_params), x, adapted))
        context = (*self._context(fixed, x, y), theta)

        def norm(params: Params) -> Tensor:
            with torch.no_grad():
                gradient = plain_gradient(lambda p: second_order(self._inner_loss)(p, context), params)
            return torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt()

        begin = norm(theta)
        least = torch.finfo(begin.dtype).eps ** 0.5  # below it a gradient is as good as zero
        return norm({name: adapted[name] for name in theta}) / begin.clamp(min=least)
