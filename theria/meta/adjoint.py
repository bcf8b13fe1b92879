"""How to differentiate an inner solution: a value, the same for every algorithm."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from theria.curvature.second_order import second_order
from theria.meta.constant import constant, plain_gradient
from theria.meta.optimisers import Hyper, InnerOptimiser, Params

Context = Any  # a pytree of tensors: everything else the inner loss depends on
InnerLoss = Callable[[Params, Context], Tensor]


class Adjoint(ABC):
    """Runs the inner optimisation and decides what its result is a differentiable function of.

    `vmappable` says whether tasks may run under `torch.func.vmap`; if not, they run in a loop.
    """

    vmappable: ClassVar[bool] = True

    @abstractmethod
    def solve(
        self,
        inner_loss: InnerLoss,
        params: Params,
        context: Context,
        optimiser: InnerOptimiser,
        hyper: Hyper,
        steps: int,
    ) -> Params:
        """The parameters after `steps` updates from `params`.

        Args:
            inner_loss: (params, context) -> scalar; pure, and without tensors from outside that need a gradient.
                It runs inside `theria.curvature.second_order`, which mends what PyTorch gets wrong there.
            params: what is adapted, by name.
            context: a pytree with every other differentiable input (data, parameters that are not adapted).
            optimiser: makes the updates, from `optimiser.init(params)`.
            hyper: learned quantities of the optimiser, see `optimiser.hyper`.
            steps: number of updates; 0 returns `params`.
        """


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Plain differentiation through every step: exact, to any order and in both modes; memory grows with the steps."""

    def solve(
        self,
        inner_loss: InnerLoss,
        params: Params,
        context: Context,
        optimiser: InnerOptimiser,
        hyper: Hyper,
        steps: int,
    ) -> Params:
        state = optimiser.init(params)
        for _ in range(steps):
            grads = torch.func.grad(second_order(inner_loss))(params, context)
            params, state = optimiser.update(grads, state, params, hyper)
        return params


@dataclass(frozen=True)
class FirstOrder(Adjoint):
    """The inner gradients are constants: theta_T = theta_0 - sum of rates * constants (FOMAML).

    What remains differentiable is the update itself. So d theta_T / d theta_0 is the identity, a learned rate has
    its direct derivative -g_t (first-order Meta-SGD), and what the inner loss reads beside the adapted parameters
    (its data, the parameters that are not adapted) has none through the inner loop. It is an approximation by
    choice: every term with a second derivative of the inner loss is dropped.
    """

    def solve(
        self,
        inner_loss: InnerLoss,
        params: Params,
        context: Context,
        optimiser: InnerOptimiser,
        hyper: Hyper,
        steps: int,
    ) -> Params:
        state = optimiser.init(params)
        for _ in range(steps):
            with torch.no_grad():  # the outer levels record nothing of this
                grads = plain_gradient(lambda p: second_order(inner_loss)(p, context), params)
            params, state = optimiser.update(constant(grads), state, params, hyper)
        return params
