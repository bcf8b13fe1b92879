"""F2SA: bilevel optimisation with first derivatives alone (Kwon et al. 2023, arXiv 2301.10945, algorithm 1).

The constraint "z solves the inner problem" becomes a penalty: L(x) = min over y of f(y, x) + l (g(y, x) - min g(., x)).
With z the minimiser of g and y that of f + l g, both followed by gradient steps,

    dL/dx = df/dx(y, x) + l (dg/dx(y, x) - dg/dx(z, x))                                                         (3)

which differs from the hypergradient by O(1/l) (their lemma 3.1). No Hessian-vector product is taken.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from theria.meta.bilevel.directions import Rate, check_rates, outer_terms, rate_at
from theria.meta.bilevel.problem import BilevelProblem
from theria.meta.bilevel.trees import Tree, add, copied, descend, scaled, subtract
from theria.meta.constant import plain_gradient
from theria.meta.values import check_steps


class F2SAState(NamedTuple):
    """z (minimises g), y (minimises f + penalty g), x, the penalty, and the number of steps done; constants."""

    inner: Tree
    penalised: Tree
    outer: Tree
    penalty: Tensor
    step: Tensor


class F2SAInfo(NamedTuple):
    """What a step saw.

    Attributes:
        outer: equation 3, the direction of x.
        penalty: l, with which it was computed.
    """

    outer: Tree
    penalty: Tensor


@dataclass(frozen=True)
class F2SA:
    """A step: `inner_steps` of z and of y, then one of x along equation 3, then the penalty grows.

    Args:
        inner_rate: of z on g, and of y on g + f / l: the paper's alpha_k is `inner_rate` / l. Below 2 / (L_g + L_f / l)
            with L the largest eigenvalues of the two Hessians in the inner variable.
        outer_rate: of x: the paper's xi alpha_k.
        penalty: l at the start; the bias is O(1/l). It has to exceed 2 L_f / mu, mu the least eigenvalue of H, for
            f + l g to be strongly convex.
        increase: delta, added to l after every step. 0 keeps the bias, growth removes it while the rates fall with it.
        inner_steps: T, at least 1; all on the same batch.
    """

    inner_rate: Rate
    outer_rate: Rate
    penalty: float = 10.0
    increase: float = 0.0
    inner_steps: int = 1

    def __post_init__(self) -> None:
        check_rates(inner_rate=self.inner_rate, outer_rate=self.outer_rate, increase=self.increase)
        check_steps(self.inner_steps, least=1)
        if not self.penalty > 0:
            raise ValueError(f"penalty={self.penalty}: give a positive number, such as 10")

    def init(self, outer: Tree, inner: Tree) -> F2SAState:
        """The state at these variables: z and y start at `inner`."""
        leaf = pytree.tree_leaves(inner)[0]
        penalty = torch.as_tensor(self.penalty, dtype=leaf.dtype, device=leaf.device)
        step = torch.zeros((), dtype=torch.int64, device=leaf.device)
        return F2SAState(copied(inner), copied(inner), copied(outer), penalty, step)

    def step(self, problem: BilevelProblem, state: F2SAState) -> tuple[F2SAState, F2SAInfo]:
        """One step on the batches of `problem`."""
        with torch.no_grad():
            z, y, x, penalty, step = state
            rate = rate_at(self.inner_rate, step)
            for _ in range(self.inner_steps):
                z = descend(z, rate, plain_gradient(lambda z: problem.g(z, x), z))
                y = descend(y, rate, plain_gradient(lambda y: problem.g(y, x) + problem.f(y, x) / penalty, y))
            at_y, at_z = (plain_gradient(lambda x, point=point: problem.g(point, x), x) for point in (y, z))
            direction = add(outer_terms(problem, y, x).outer, scaled(penalty, subtract(at_y, at_z)))
            x = descend(x, rate_at(self.outer_rate, step), direction)
            return F2SAState(z, y, x, penalty + self.increase, step + 1), F2SAInfo(direction, penalty)
