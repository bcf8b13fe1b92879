"""How to differentiate an inner solution: a value, the same for every algorithm."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from theria.curvature.second_order import second_order
from theria.meta.constant import constant, plain_gradient
from theria.meta.cuts import cut_both_ways
from theria.meta.optimisers import Hyper, InnerOptimiser, Params, State
from theria.meta.recompute import Layout, recompute
from theria.meta.replay import Replay, closed_over_vmap, probe
from theria.meta.values import check_problem

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
            steps: number of updates; with 0 the value is `params`.

        Raises:
            TypeError: for `params` that are no dict of tensors, an optimiser that is a class, `steps` that are no int.
            ValueError: for a negative number of steps, and for a loss that is no floating-point scalar.
        """


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Plain differentiation through every step: exact, to any order and in both modes; memory grows with the steps.

    Args:
        checkpoint_every: keep the parameters and the optimiser's state of every k-th step only, and run the k steps
            between again for the derivatives. Memory is T / k states and the activations of k steps, least near
            k = sqrt(T) where a state costs as much as the activations of a step; time is one more forward run. Orders
            and modes are all there, each recomputing in turn. Random numbers of torch's global generators (dropout)
            are drawn again as they were; the loss must draw from no other source. None keeps everything.

    Raises:
        ValueError: for a `checkpoint_every` below 1; with it, when the inner loss or the optimiser reads a tensor
            that is differentiated and not an argument.
        RuntimeError: with it, by a derivative, when a tensor that they read and that is no argument was written since.
        NotImplementedError: with it, by the backward of several tasks whose loss has an implicit derivative.
    """

    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        check_every(self.checkpoint_every)

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
        state = optimiser.init(params)
        if self.checkpoint_every is not None and steps:
            replay = probe(self, inner_loss, params, context, optimiser, hyper)
            for first in range(0, steps, self.checkpoint_every):
                last = min(first + self.checkpoint_every, steps)
                tensors, layout = Layout.split((params, state, context, hyper))
                segment = _Segment(inner_loss, optimiser, range(first, last), layout, replay)
                with closed_over_vmap(self):
                    ends = iter(recompute(segment, *tensors))
                params, state = pytree.tree_map(lambda _, ends=ends: next(ends), (params, state))
            return params
        for _ in range(steps):
            params, state = cut_both_ways((params, state))
            grads = torch.func.grad(inner_loss)(params, context)
            params, state = optimiser.update(grads, state, params, hyper)
        return cut_both_ways(params)


def one_step(
    optimiser: InnerOptimiser, grads: Params, state: State, params: Params, hyper: Hyper
) -> tuple[Params, State]:
    """An update whose results have their keys in the order of what they replace, for those who count leaves."""
    new = optimiser.update(grads, state, params, hyper)
    return pytree.tree_map(lambda _, leaf: leaf, (params, state), new)


def check_every(checkpoint_every: int | None) -> None:
    """None, or an int of at least 1."""
    if checkpoint_every is not None and (not isinstance(checkpoint_every, int) or checkpoint_every < 1):
        raise ValueError(
            f"checkpoint_every={checkpoint_every!r}: give the number of inner steps between two checkpoints, at least "
            f"1 and near the square root of the number of steps, or None to keep every step"
        )


@dataclass(frozen=True, eq=False)
class _Segment:
    """Some inner steps as a function of tensors: (params, state, context, hyper) -> (params, state) after them."""

    inner_loss: InnerLoss
    optimiser: InnerOptimiser
    steps: range
    layout: Layout
    replay: Replay

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self._run(torch.func.grad, tensors)

    def once(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same, freeing the activations of each step."""
        return self._run(lambda loss: lambda p: plain_gradient(loss, p), tensors)

    def _run(self, gradient: Callable[..., Any], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        params, state, context, hyper = self.layout.join(tensors)
        for t in self.steps:
            with self.replay.step(t):
                grads = gradient(lambda p: self.inner_loss(p, context))(params)
                params, state = one_step(self.optimiser, grads, state, params, hyper)
        return tuple(pytree.tree_leaves((params, state)))


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
        inner_loss = second_order(check_problem(inner_loss, params, optimiser, steps))
        return first_order_steps(inner_loss, params, context, optimiser, hyper, steps)[0]


def first_order_steps(
    inner_loss: InnerLoss, params: Params, context: Context, optimiser: InnerOptimiser, hyper: Hyper, steps: int
) -> tuple[Params, State]:
    """Parameters and state after steps whose gradients are constants."""
    state = optimiser.init(params)
    for _ in range(steps):
        with torch.no_grad():  # the outer levels record nothing of this
            grads = plain_gradient(lambda p: inner_loss(p, context), params)
        params, state = optimiser.update(constant(grads), state, params, hyper)
    return params, state
