"""The parameters after every inner step, each differentiated as its adjoint says."""

from dataclasses import dataclass
from typing import cast

from torch import Tensor
from torch.utils import _pytree as pytree

from theria.meta.adjoint import Adjoint, Context, FirstOrder, InnerLoss, Unrolled, one_step
from theria.meta.mixed_mode import MixedMode
from theria.meta.optimisers import Hyper, InnerOptimiser, Params, State


def trajectory(
    adjoint: Adjoint,
    inner_loss: InnerLoss,
    params: Params,
    context: Context,
    optimiser: InnerOptimiser,
    hyper: Hyper,
    steps: int,
) -> list[Params]:
    """The parameters after 1, 2, .. `steps` updates: each is `adjoint.solve(...)` with as many steps.

    The adjoints that treat every step alike take the steps one at a time, at the cost of one solve of `steps` steps;
    the others solve anew for each length.
    """
    if not isinstance(adjoint, Unrolled | MixedMode | FirstOrder):
        return [adjoint.solve(inner_loss, params, context, optimiser, hyper, t) for t in range(1, steps + 1)]
    state, spec = pytree.tree_flatten(optimiser.init(params))
    paused = _Paused(optimiser, tuple(params), spec, optimiser.linear_in_gradient)
    point, path = paused.join(params, state), []
    for _ in range(steps):
        point = adjoint.solve(
            lambda p, c: inner_loss(paused.parameters(p), c), point, context, cast(InnerOptimiser, paused), hyper, 1
        )
        path.append(paused.parameters(point))
    return path


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
