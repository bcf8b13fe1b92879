"""The outer gradient by a reverse sweep over stored parameters (MixFlow-MG, Kemaev et al. 2025, arXiv 2505.00793).

Let theta_{t+1}, s_{t+1} = U(g_t, s_t, theta_t, h) with g_t = grad_theta L(theta_t, c), t = 0 .. T-1. The forward pass
stores (theta_t, s_t) only. Backwards, from the cotangents (a, b) of (theta_{t+1}, s_{t+1}):

    w     = (dU/dg)^T (a, b)                              element-wise; needs no value of g_t when U is affine in it
    g_t,
    H w   = jvp of grad_theta L along theta-tangent w     forward over reverse: one pass gives all three,
    M w   = jvp of grad_c L     along the same tangent    for d/dc (g . w) = M w by symmetry of second derivatives
    a'    = (dU/dtheta)^T (a, b) + H w,   b' = (dU/ds)^T (a, b)
    cbar += M w,                          hbar += (dU/dh)^T (a, b)

Each line frees what it used before the next, so the activations of one step are alive at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from theria.curvature.second_order import second_order
from theria.meta.adjoint import Adjoint, Context, InnerLoss, check_every, one_step
from theria.meta.constant import plain_gradient
from theria.meta.cuts import cut
from theria.meta.levels import carries_tangent, unshared
from theria.meta.optimisers import Hyper, InnerOptimiser, Params, State
from theria.meta.recompute import Layout
from theria.meta.replay import Replay, closed_over_vmap, probe
from theria.meta.values import check_problem

Point = tuple[Params, State]


@dataclass(frozen=True)
class MixedMode(Adjoint):
    """Exact first derivative; memory of the parameter trajectory and one step, whatever the activations.

    Equal to `Unrolled` to rounding, with tasks under `vmap` and through `loss.backward()` or `torch.func.grad`.
    The inner loss runs once more in each step on the way back; random numbers of torch's global generators (dropout)
    are replayed there. It must draw from no other source, and what it calls must have a derivative forward over
    reverse (PyTorch raises where it has none, such as in `F.silu`): use `Unrolled` for those.

    Args:
        checkpoint_every: keep every k-th point of the trajectory only, and take the steps between again on the way
            back: T / k + k points instead of T, for one more gradient in each step. For many steps of a model whose
            parameters weigh more than its activations.

    Raises:
        NotImplementedError: when its gradient is differentiated again, or differentiated in forward mode.
        ValueError: when the inner loss or the optimiser reads a tensor that is differentiated or mapped over and not
            an argument; for a `checkpoint_every` below 1.
        RuntimeError: by the backward, when a tensor that the inner loss reads and that is no argument was written
            since. A module that it reads runs in the mode that it was in.
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
        if steps == 0:
            return params
        # Before PyTorch asks the Function below for its jvp, which under `vmap` is an AssertionError.
        if any(isinstance(x, Tensor) and carries_tangent(x) for x in pytree.tree_leaves((params, context, hyper))):
            raise NotImplementedError(
                "MixedMode has no forward mode, and it was given a tangent (torch.func.jvp, jacfwd or hessian). "
                "Use torch.func.grad or loss.backward(), or adjoint=Unrolled(), which has both modes"
            )
        replay = probe(self, inner_loss, params, context, optimiser, hyper)
        params = unshared(params)
        tensors, layout = Layout.split((params, context, hyper))
        n_hyper, every = len(pytree.tree_leaves(hyper)), self.checkpoint_every or 1
        loop = _Loop(inner_loss, optimiser, steps, every, len(params), n_hyper, layout, replay)
        with closed_over_vmap(self):
            final: tuple[Tensor, ...] = _InnerLoop.apply(loop, *tensors)  # type: ignore[assignment]
        return dict(zip(params, final, strict=False))  # the trajectory follows


@dataclass(frozen=True, eq=False)
class _Loop:
    """Everything about one inner loop that is not a tensor, and how its tensors are laid out."""

    inner_loss: InnerLoss
    optimiser: InnerOptimiser
    steps: int
    every: int  # how many steps lie between two stored points
    n_params: int
    n_hyper: int
    layout: Layout  # of (params, context, hyper)
    replay: Replay

    def follow(self, point: Point, context: Context, hyper: Hyper, steps: range) -> Iterator[Point]:
        """The points after each of these steps."""
        params, state = point
        for t in steps:
            with self.replay.step(t):
                grads = plain_gradient(lambda p: self.inner_loss(p, context), params)
                params, state = one_step(self.optimiser, grads, state, params, hyper)
            cut()
            yield params, state

    def stored(self, params: Params, trajectory: Sequence[Tensor]) -> list[Point]:
        """The (theta_t, s_t) for t = 0, k, 2k .. below T, from theta_0 and the stored rest."""
        leaves, spec = pytree.tree_flatten((params, self.optimiser.init(params)))
        chunks = [leaves, *(trajectory[i : i + len(leaves)] for i in range(0, len(trajectory), len(leaves)))]
        return [pytree.tree_unflatten(list(chunk), spec) for chunk in chunks]


class _InnerLoop(torch.autograd.Function):
    """Tensors of (params, context, hyper) -> final parameters, then the trajectory as non-differentiable outputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loop: _Loop, *tensors: Tensor) -> tuple[Tensor, ...]:
        params, context, hyper = loop.layout.join([tensor.detach() for tensor in tensors])
        trajectory: list[Tensor] = []
        start = params, loop.optimiser.init(params)
        for t, point in enumerate(loop.follow(start, context, hyper, range(loop.steps)), start=1):
            params, _ = point
            if t % loop.every == 0 and t < loop.steps:
                trajectory += pytree.tree_leaves(point)
        return (*params.values(), *trajectory)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        loop, *tensors = inputs
        trajectory = output[loop.n_params :]
        ctx.loop = loop
        ctx.mark_non_differentiable(*trajectory)
        ctx.set_materialize_grads(False)  # zeros for the trajectory would double its memory
        ctx.save_for_backward(*tensors, *trajectory)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = tuple(ctx.needs_input_grad[1:])
        given = zip(cotangents[: ctx.loop.n_params], ctx.saved_tensors, strict=False)  # the parameters come first
        final = [torch.zeros_like(p) if cotangent is None else cotangent for cotangent, p in given]
        gradients = iter(_ReverseSweep.apply(ctx.loop, needed, *final, *ctx.saved_tensors))  # type: ignore[arg-type]
        return None, *(next(gradients) if need else None for need in needed)


class _ReverseSweep(torch.autograd.Function):
    """Cotangents of the final parameters -> gradients of the needed inputs.

    A Function of its own so that it can refuse: left to autograd, the stored trajectory would be a constant and a
    second differentiation would lose terms without an error. `once_differentiable` does not prevent that.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(loop: _Loop, needed: tuple[bool, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        constants = [tensor.detach() for tensor in tensors]
        final, rest = constants[: loop.n_params], constants[loop.n_params :]
        return _sweep(loop, needed, final, rest[: len(needed)], rest[len(needed) :])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise NotImplementedError(_DIFFERENTIATED_TWICE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_DIFFERENTIATED_TWICE)


_DIFFERENTIATED_TWICE = (
    "MixedMode differentiates once, and its meta-gradient was differentiated again: that takes third derivatives of "
    "the inner loss. Use adjoint=Unrolled(), which has every order"
)


def _sweep(
    loop: _Loop, needed: Sequence[bool], final: Sequence[Tensor], inputs: Sequence[Tensor], trajectory: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Lines of the module's docstring for t = T-1 .. 0; the gradients of the inputs marked in `needed`."""
    params, context, hyper = loop.layout.join(inputs)
    rest = len(inputs) - loop.n_hyper
    chosen = [i for i in range(loop.n_params, rest) if needed[i]]
    selected = [inputs[i] for i in chosen]

    def loss(both: tuple[Params, Sequence[Tensor]]) -> Tensor:
        params, selected = both
        tensors = list(inputs)
        for i, tensor in zip(chosen, selected, strict=True):
            tensors[i] = tensor
        return loop.inner_loss(params, loop.layout.join(tensors)[1])

    points = loop.stored(params, trajectory)
    cotangent = (dict(zip(params, final, strict=True)), pytree.tree_map(torch.zeros_like, points[0][1]))
    d_selected, d_hyper = [torch.zeros_like(x) for x in selected], pytree.tree_map(torch.zeros_like, hyper)
    for first in reversed(range(0, loop.steps, loop.every)):
        start, last = points.pop(), min(first + loop.every, loop.steps)
        between = [start, *loop.follow(start, context, hyper, range(first, last - 1))]
        del start
        for t in reversed(range(first, last)):
            cut()
            cotangent, mixed, direct = _step_back(loop, t, loss, between.pop(), selected, hyper, cotangent)
            d_selected = [total + part for total, part in zip(d_selected, mixed, strict=True)]
            d_hyper = pytree.tree_map(torch.add, d_hyper, direct)

    gradients: dict[int, Tensor] = dict(enumerate(cotangent[0].values()))
    gradients |= dict(zip(chosen, d_selected, strict=True))
    gradients |= dict(enumerate(pytree.tree_leaves(d_hyper), start=rest))
    return tuple(gradients[i] for i, need in enumerate(needed) if need)


def _step_back(
    loop: _Loop, t: int, loss: Any, point: Point, selected: list[Tensor], hyper: Hyper, cotangent: Any
) -> tuple[Point, list[Tensor], Hyper]:
    """Cotangent of (theta_{t+1}, s_{t+1}) -> that of (theta_t, s_t), and the terms of context and hyper."""
    params, state = point
    update = partial(one_step, loop.optimiser)
    grads = params  # any point will do where the update is affine in the gradient
    if not loop.optimiser.linear_in_gradient:
        with loop.replay.step(t):
            grads = plain_gradient(lambda p: loss((p, selected)), params)
    (w,) = torch.func.vjp(lambda g: update(g, state, params, hyper), grads)[1](cotangent)

    with loop.replay.step(t):
        (grads, _), (curvature, mixed) = torch.func.jvp(lambda p: plain_gradient(loss, (p, selected)), (params,), (w,))[
            :2
        ]
    pull = torch.func.vjp(lambda rest: update(grads, *rest), (state, params, hyper))[1]
    ((d_state, d_params, d_hyper),) = pull(cotangent)
    d_params = {name: d + curvature[name] for name, d in d_params.items()}
    return (d_params, d_state), mixed, d_hyper
