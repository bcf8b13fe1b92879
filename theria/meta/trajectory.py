"""The parameters after every inner step, each differentiated as its adjoint says."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from theria.meta.adjoint import Adjoint, Context, FirstOrder, InnerLoss, Unrolled, one_step
from theria.meta.implicit_adjoint import Identity, Implicit
from theria.meta.mixed_mode import MixedMode
from theria.meta.optimisers import Hyper, InnerOptimiser, Params, State
from theria.meta.truncated import Truncated


def trajectory(
    adjoint: Adjoint,
    inner_loss: InnerLoss,
    params: Params,
    context: Context,
    optimiser: InnerOptimiser,
    hyper: Hyper,
    steps: int,
) -> Iterator[Params]:
    """The parameters after 1, 2, .. `steps` updates: each is `adjoint.solve(...)` with as many steps.

    The adjoints that treat every step alike take the steps one at a time, at the cost of one solve of `steps` steps;
    so do, where nothing is differentiated, those whose values are those of plain steps. The others solve anew for each
    length.
    """
    each = _of_one_step(adjoint)
    if each is None:
        yield from (adjoint.solve(inner_loss, params, context, optimiser, hyper, t) for t in range(1, steps + 1))
        return
    state, spec = pytree.tree_flatten(optimiser.init(params))
    paused = _Paused(optimiser, tuple(params), spec, optimiser.linear_in_gradient)
    point = paused.join(params, state)
    for _ in range(steps):
        point = each.solve(
            lambda p, c: inner_loss(paused.parameters(p), c), point, context, cast(InnerOptimiser, paused), hyper, 1
        )
        yield paused.parameters(point)


def _of_one_step(adjoint: Adjoint) -> Adjoint | None:
    """An adjoint that makes the same trajectory one step at a time; None if there is none."""
    if isinstance(adjoint, Unrolled | MixedMode | FirstOrder):
        return adjoint
    plain = isinstance(adjoint, Truncated) or (isinstance(adjoint, Implicit | Identity) and adjoint.tolerance is None)
    # `torch.func.grad` enables grad inside it, and `torch.func.jvp` enters a level of forward mode.
    differentiated = torch.is_grad_enabled() or forward_ad._current_level >= 0
    return FirstOrder() if plain and not differentiated else None


@dataclass(frozen=True)
class _Paused:
    """An optimiser whose state lies among the parameters, so that a solve goes on where another stopped.

    The inner loss does not read those entries: their gradients are zero, and nothing uses them.
    """

    optimiser: InnerOptimiser
    names: tuple[str, ...]
    spec: pytree.TreeSpec
    linear_in_gradient: bool

    def join(self, params: Params, state: list[Tensor]) -> Params:
        """Parameters and leaves of the state as one dict; a colon keeps their names apart."""
        return {**params, **{f"state:{i}": leaf for i, leaf in enumerate(state)}}

    def parameters(self, point: Params) -> Params:
        """Those of the inner problem."""
        return {name: point[name] for name in self.names}

    def hyper(self, params: Params) -> Hyper:
        raise NotImplementedError("rates are made from the optimiser itself")

    def init(self, params: Params) -> State:
        return {}

    def update(self, grads: Params, state: State, params: Params, hyper: Hyper) -> tuple[Params, State]:
        leaves = [params[f"state:{i}"] for i in range(self.spec.num_leaves)]
        kept = pytree.tree_unflatten(leaves, self.spec)
        new, kept = one_step(self.optimiser, self.parameters(grads), kept, self.parameters(params), hyper)
        return self.join(new, pytree.tree_leaves(kept)), {}
