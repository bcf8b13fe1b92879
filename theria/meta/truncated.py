"""Truncated back-propagation through the inner steps (Shaban et al. 2019, arXiv 1810.10667)."""

from dataclasses import dataclass

import torch

from theria.curvature.second_order import second_order
from theria.meta.adjoint import Adjoint, Context, InnerLoss, first_order_steps
from theria.meta.optimisers import Hyper, InnerOptimiser, Params
from theria.meta.values import check_problem


@dataclass(frozen=True)
class Truncated(Adjoint):
    """The last `steps` inner steps are differentiated as by `Unrolled`, the earlier ones as by `FirstOrder`.

    So `Truncated(0)` is `FirstOrder()`, and with at least as many steps as the inner loop has it is `Unrolled()`.
    Memory is that of the last steps. Let theta* be a fixed point of gradient descent with rate lr on L(theta, c), H
    and M the second derivatives of L in theta twice and in (theta, c) there. K + 1 steps give

        d theta / d c = -lr sum_{k=0..K} (I - lr H)^k M,

    the Neumann series of -H^-1 M with K terms after the first: the error of the truncation is (I - lr H)^(K+1), which
    vanishes geometrically where lr H has its spectrum in (0, 2).

    Args:
        steps: how many, at least 0.

    Raises:
        ValueError: for a number of steps that is negative or no int.
    """

    steps: int

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 0:
            raise ValueError(
                f"Truncated(steps={self.steps!r}): give the number of last inner steps to differentiate through, "
                f"an int of at least 0"
            )

    def solve(
        self,
        inner_loss: InnerLoss,
        params: Params,
        context: Context,
        optimiser: InnerOptimiser,
        hyper: Hyper,
        steps: int,
    ) -> Params:
        inner_loss = second_order(check_problem(inner_loss, params, optimiser, steps))
        early = max(steps - self.steps, 0)
        params, state = first_order_steps(inner_loss, params, context, optimiser, hyper, early)
        for _ in range(early, steps):
            grads = torch.func.grad(inner_loss)(params, context)
            params, state = optimiser.update(grads, state, params, hyper)
        return params
