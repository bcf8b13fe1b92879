"""Approximate implicit differentiation: equation 1 at an approximate z and an approximate v.

HOAG (Pedregosa 2016, arXiv 1602.02355, algorithm 1) solves both to a tolerance that falls along the outer steps;
AID-BiO (Ji et al. 2021, arXiv 2010.07962, algorithm 1) takes a fixed number of steps for each and warm-starts both;
with `Neumann` as the solver it is algorithm 3 of Lorraine et al. 2020 (arXiv 1911.02590).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from theria.curvature.hvp import Mode, hvp
from theria.meta.bilevel.directions import inner_terms
from theria.meta.bilevel.problem import BilevelProblem, Evaluation, Method
from theria.meta.bilevel.trees import Tree, add, norm, scaled, zeros_like
from theria.meta.constant import plain_gradient
from theria.meta.optimisers import InnerOptimiser, Params
from theria.meta.solvers import CG, LinearSolver, Solution
from theria.meta.solvers.base import check_solver
from theria.meta.values import check_optimiser, check_steps, check_undecayed


class Computed(NamedTuple):
    """What an evaluation computes: `Evaluation`, and the gradient beside it."""

    value: Tensor
    gradient: Tree
    inner: Tree
    inner_residual: Tensor
    linear: Solution


@dataclass(frozen=True)
class AID(Method):
    """`steps` inner steps of `optimiser` from inner0, then a linear solve for v from v0, then equation 1.

    Nothing is differentiated through the steps: memory does not grow with them. The error is that of the inner solution
    plus that of v (Grazzi et al. 2020, arXiv 2006.16218, theorem 2.2); `inner_residual` and `linear.residual` say how
    large the two are. inner0 has a zero derivative, as a converged inner solution has none in its start.

    Args:
        optimiser: makes the inner steps, such as `SGD(0.1)`.
        steps: their number; 0 where inner0 is the solution already.
        solver: of H v = -df/dz, any of `theria.meta.solvers`.
        throw: raise `SolverError` when the solve has not converged. False for a number of iterations by choice, such as
            `Neumann(scale=0.1, max_iterations=10)`; `linear.result` says how it ended.
        mode: of the Hessian-vector products, see `theria.hvp`.

    Raises:
        NotImplementedError: when its gradient is differentiated again: z and v are constants in equation 1, and the
            second derivative of that would be wrong. `ITD` with `Unrolled()` or `Implicit(solver=...)` has every order,
            the latter by the same equation, without the warm start of v.
    """

    optimiser: InnerOptimiser
    steps: int
    solver: LinearSolver = CG()  # noqa: RUF009 (a frozen value)
    throw: bool = True
    mode: Mode = "forward_over_reverse"

    def __post_init__(self) -> None:
        check_steps(self.steps, least=0)
        check_optimiser("optimiser", self.optimiser)
        check_undecayed(self, self.optimiser)
        check_solver("solver", self.solver)

    def evaluate(self, problem: BilevelProblem, outer: Tree, inner0: Tree, v0: Tree | None) -> Evaluation:
        batches = (problem.inner_batch, problem.outer_batch)
        v0 = zeros_like(inner0) if v0 is None else v0
        leaves, spec = pytree.tree_flatten((outer, inner0, v0, batches))
        constants = tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        run = _Run(self, problem, spec, constants, len(pytree.tree_leaves(outer)))
        outputs = _Value.apply(run, *(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        value, _, inner, residual, linear = pytree.tree_unflatten(list(outputs), run.output_spec(outer, inner0))
        return Evaluation(value, inner, residual, linear)

    def compute(self, problem: BilevelProblem, outer: Tree, inner0: Tree, v0: Tree) -> Computed:
        """Everything, at constants."""
        z = self._descend(problem, outer, inner0)
        value, (f_z, f_x) = _value_and_gradients(problem.f, z, outer)
        solution = self.solver.solve(
            lambda u: hvp(lambda z: problem.g(z, outer), z, u, self.mode), scaled(-1.0, f_z), v0, throw=self.throw
        )

        terms = inner_terms(problem, z, solution.value, outer)
        return Computed(value, add(f_x, terms.cross), z, norm(terms.gradient), solution)

    def _descend(self, problem: BilevelProblem, outer: Tree, inner0: Tree) -> Tree:
        leaves, spec = pytree.tree_flatten(inner0)
        params = {str(i): leaf.clone() for i, leaf in enumerate(leaves)}
        state, hyper = self.optimiser.init(params), self.optimiser.hyper(params)

        def loss(params: Params) -> Tensor:
            return problem.g(pytree.tree_unflatten(list(params.values()), spec), outer)

        for _ in range(self.steps):
            params, state = self.optimiser.update(plain_gradient(loss, params), state, params, hyper)
        return pytree.tree_unflatten(list(params.values()), spec)


def _value_and_gradients(loss: Any, inner: Tree, outer: Tree) -> tuple[Tensor, tuple[Tree, Tree]]:
    gradients, value = torch.func.grad_and_value(loss, (0, 1))(inner, outer)
    return value, gradients


_TENSOR = object()


@dataclass(frozen=True, eq=False)
class _Run:
    """Everything about one evaluation that is not a tensor, and how its tensors are laid out."""

    method: AID
    problem: BilevelProblem
    spec: pytree.TreeSpec
    constants: tuple[Any, ...]  # _TENSOR where a tensor belongs
    n_outer: int

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        given = iter(tensors)
        tensor_or_constant = [next(given) if c is _TENSOR else c for c in self.constants]
        outer, inner0, v0, batches = pytree.tree_unflatten(tensor_or_constant, self.spec)
        return pytree.tree_leaves(self.method.compute(self.problem.on(*batches), outer, inner0, v0))

    @staticmethod
    def output_spec(outer: Tree, inner0: Tree) -> pytree.TreeSpec:
        return pytree.tree_structure(Computed(0, outer, inner0, 0, Solution(inner0, 0, 0, 0)))  # type: ignore


class _Value(torch.autograd.Function):
    """Tensors of (outer, inner0, v0, batches) -> the leaves of `Computed`; the value alone is differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(run: _Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(run([tensor.detach() for tensor in tensors]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        run, *tensors = inputs
        n = ctx.n_outer = run.n_outer
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1 : n + 1], *tensors[:n])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None,) * (len(ctx.needs_input_grad) - 1 - ctx.n_outer)
        if cotangents[0] is None:
            return None, *(None,) * ctx.n_outer, *rest
        return None, *_Scaled.apply(cotangents[0], ctx.n_outer, *ctx.saved_tensors), *rest  # type: ignore

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "AID has no forward mode, and it was given a tangent (torch.func.jvp, jacfwd or hessian). Use "
            "torch.func.grad or loss.backward(), or ITD, which has both modes"
        )


class _Scaled(torch.autograd.Function):
    """The cotangent of the value times the gradient.

    A Function of its own so that it can refuse: left to autograd, the stored gradient would be a constant, and its
    derivative zero without an error.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(cotangent: Tensor, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(cotangent * gradient for gradient in tensors[:n])

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
    "AID differentiates once, and its hypergradient was differentiated again: z and v are constants in it. Use ITD "
    "with an adjoint that has the order, such as Unrolled()"
)
