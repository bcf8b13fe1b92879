"""Reptile (Nichol, Achiam and Schulman 2018, arXiv 1803.02999)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from theria.meta.adjoint import Context, FirstOrder, InnerLoss
from theria.meta.checks import check_positive
from theria.meta.constant import constant
from theria.meta.functional import Predictor
from theria.meta.learner import GradientLearner, LossFn
from theria.meta.optimisers import SGD, InnerOptimiser, Params


class Reptile(GradientLearner):
    """Moves the initialisation towards where gradient steps on each task lead: no derivative of the inner loop.

    The paper's Algorithm 2 steps theta_0 <- theta_0 + eps mean over tasks of (theta_T - theta_0), and treats
    (theta_0 - theta_T) / alpha as a gradient for any optimiser (section 2). The outer loss of a task is here

        |theta_0 - theta_T|^2 / (2 alpha)       with theta_T held constant,

    whose gradient is exactly that, so that `loss.backward()` and any torch optimiser do the rest: `SGD(eps * alpha)` is
    Algorithm 2. The value of this loss is a distance, not a loss on data; `predict` shows how well a task is learnt.

    Args:
        inner: the inner optimiser; default SGD(0.01). It cannot learn rates: they would get no gradient.
        steps: number of inner steps T; with 1 it is training on all tasks jointly (section 3).
        alpha: what the difference is divided by; None for the rate of `inner`, which then has to be a number.
        use_queries: learn from the support and the query set together, as Reptile has no split (section 2); False
            learns from the support set alone. `adapt` and `predict` always adapt to the support set.
    The others: see `Learner`. Frozen parameters are not adapted.

    Raises:
        ValueError: an inner optimiser that learns rates, or no `alpha` where `inner` has no single rate.
    """

    def __init__(
        self,
        model: nn.Module | Predictor,
        loss_fn: LossFn,
        inner: InnerOptimiser | None = None,
        steps: int = 5,
        *,
        alpha: float | None = None,
        use_queries: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, loss_fn, SGD(lr=0.01) if inner is None else inner, steps, FirstOrder(), **options)
        self._choose(None)
        if self.rates:
            raise ValueError(f"inner={inner!r} learns rates, which Reptile gives no gradient: use learn_lr=False")
        self.alpha = check_positive("alpha", getattr(self.inner, "lr", None) if alpha is None else alpha, _ALPHA)
        self.use_queries = use_queries

    def _problem(
        self, meta_params: Mapping[str, Tensor], x: Tensor, y: Tensor
    ) -> tuple[InnerLoss, Params, Context, Params]:
        initial, fixed = self._split(meta_params)
        return self._support_loss, initial, self._context(fixed, x, y), fixed

    def _task_loss(self, meta_params: Mapping[str, Tensor], sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        x, y = (torch.cat([sx, qx]), torch.cat([sy, qy])) if self.use_queries else (sx, sy)
        final = constant(self._adapt(meta_params, x, y, self.steps))
        initial, _ = self._split(meta_params)
        return torch.stack([(p - final[name]).square().sum() for name, p in initial.items()]).sum() / (2 * self.alpha)


_ALPHA = "what Reptile divides by; where the inner optimiser has no single rate give alpha=, which"
