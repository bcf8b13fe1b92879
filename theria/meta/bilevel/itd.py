"""Iterative differentiation: h with z*(x) replaced by z after so many steps, differentiated by an adjoint.

With `Unrolled` or `MixedMode` the gradient is that of the truncated problem, exactly (Franceschi et al. 2018,
arXiv 1806.04910; ITD-BiO in Ji et al. 2021, arXiv 2010.07962, algorithm 2); it tends to equation 1 as T c^T, c the
contraction of a step.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from theria.meta.adjoint import Adjoint, Unrolled
from theria.meta.bilevel.problem import BilevelProblem, Evaluation, Method
from theria.meta.bilevel.trees import Tree, norm
from theria.meta.checks import check_inner, check_path
from theria.meta.constant import constant, plain_gradient
from theria.meta.optimisers import InnerOptimiser, Params
from theria.meta.values import check_steps


@dataclass(frozen=True)
class ITD(Method):
    """Through `steps` inner steps of `optimiser`, as `adjoint` does it.

    Args:
        optimiser: makes the steps, such as `SGD(0.1)`.
        steps: their number, at least 0.
        adjoint: `Unrolled()` (any order), `MixedMode()` (the memory of the trajectory), `Truncated(K)` and any other
            adjoint of `theria.meta`; implicit ones too, whose derivative then is equation 1.
        hyper: outer -> the optimiser's learned quantities, such as rates that are a part of the outer variable; None
            for those of the optimiser itself.

    The start of the inner optimisation is differentiated as well, where it depends on the outer variable.

    Raises:
        ValueError: by `evaluate` with an implicit adjoint, for a start or learned quantities that are differentiated:
            a minimum depends on neither. For weight decay with one, whose steps go elsewhere.
    """

    optimiser: InnerOptimiser
    steps: int
    adjoint: Adjoint = Unrolled()  # noqa: RUF009 (a frozen value)
    hyper: Any = None

    def __post_init__(self) -> None:
        check_steps(self.steps, least=0)
        check_inner(self.optimiser, self.adjoint, "optimiser")

    def evaluate(self, problem: BilevelProblem, outer: Tree, inner0: Tree, v0: Tree | None) -> Evaluation:
        if v0 is not None:
            raise ValueError("v0 starts the linear solve of AID, and ITD has none: leave it out")
        leaves, spec = pytree.tree_flatten(inner0)
        # Copies: forward mode refuses a tensor whose entries share memory, such as one that was expanded.
        params = {str(i): leaf.clone() for i, leaf in enumerate(leaves)}

        def inner_loss(params: Params, context: Any) -> Tensor:
            outer, batch = context
            return problem.on(batch).g(pytree.tree_unflatten(list(params.values()), spec), outer)

        hyper = self.optimiser.hyper(params) if self.hyper is None else self.hyper(outer)
        check_path(self.adjoint, inner0, hyper)
        context = (outer, problem.inner_batch)
        final = self.adjoint.solve(inner_loss, params, context, self.optimiser, hyper, self.steps)
        inner = pytree.tree_unflatten(list(final.values()), spec)
        value = problem.f(inner, outer)
        with torch.no_grad():
            ended, fixed = constant((inner, outer))
            residual = norm(plain_gradient(lambda z: problem.g(z, fixed), ended))
        return Evaluation(value, ended, residual, ())
