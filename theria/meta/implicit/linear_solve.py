"""A linear solve whose derivative is one more linear solve, to every order, in both modes and under vmap."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from theria.meta.implicit.forward_mode import below_the_tangent
from theria.meta.implicit.frozen import Tree, check_function, differentiating
from theria.meta.implicit.operators import Args, Operator, Products
from theria.meta.implicit.rules import Rule, Selected, System, Theta
from theria.meta.levels import carries_derivative, freeze
from theria.meta.solvers import GMRES, LinearSolver, Result, Solution
from theria.meta.solvers.base import check_solver
from theria.meta.solvers.loop import norm
from theria.meta.solvers.system import LinearMap, Space, without_gradient


def linear_solve(
    matvec: Callable[..., Tree],
    b: Tree,
    *args: Any,
    solver: LinearSolver | None = None,
    symmetric: bool = False,
    throw: bool = True,
) -> Solution:
    """x with A(args) x = b, differentiable in b and in args.

    With A x = b:  x' = A^-1 (b' - A'x),  bbar = w and argsbar = -(d(A x)/dargs)' w where transpose(A) w = xbar. Each
    is one more solve by the same solver. The transpose is that of `matvec` by `torch.func.vjp`.

    Args:
        matvec: (v, *args) -> A(args) v, linear in v, on pytrees like b. What it depends on and is differentiated has
            to be among `args`.
        b: a pytree of tensors of one real floating-point dtype.
        args: pytrees.
        solver: how to solve, from `theria.meta.solvers`; default GMRES().
        symmetric: A is its own transpose, so that nothing has to be transposed.
        throw: raise when a solve fails, also one of a derivative. With False the result says how it ended; there is
            none for a derivative, which is NaN for each task whose solve failed.

    Returns:
        Solution(value, result, residual, iterations); only the value is differentiable.

    Raises:
        SolverError: with `throw`.
        ValueError: for structures and shapes that do not fit, and for a `matvec` that reads a tensor that is being
            differentiated and is no argument.
    """
    solver = solver or GMRES()
    check_solver("solver", solver)
    operator = Products(matvec, symmetric)
    check_function(matvec, (b, *args), "matvec")
    return solve_system(operator, args, b, solver, throw)


@dataclass(frozen=True)
class ScaledIdentity(LinearSolver):
    """A^-1 ~ scale I: the value is scale b, whatever A. No product is made, and the residual is not known (NaN).

    As the linear solver of an implicit rule: T1-T2 (Luketina et al. 2016, arXiv 1511.06727) at a minimum, the
    Jacobian-free backward (Fung et al. 2022, arXiv 2103.12803) at a fixed point. The derivative is then an
    approximation by choice; derivatives of it are exact.
    """

    scale: float = 1.0

    def solve(self, matvec: LinearMap, b: Tree, x0: Tree | None = None, *, throw: bool = True) -> Solution:
        first = pytree.tree_leaves(b)[0].flatten()[0]
        done = torch.zeros_like(first, dtype=torch.int64)
        value = pytree.tree_map(lambda x: self.scale * x, b)
        return Solution(value, done + Result.converged, torch.full_like(first, float("nan")), done)


@dataclass(frozen=True)
class Inexact(LinearSolver):
    """What a solver has after its bound of iterations, taken as the answer: a truncated series by choice.

    `Inexact(Neumann(max_iterations=K))` at a fixed point is the derivative through K more iterations there;
    `Inexact(CG(max_iterations=5))` is what iMAML does. The residual says how far it is. So it does where a recursion
    ends before its bound and the products are too coarse for the tolerance (TF32, or a network in half precision): that
    breakdown is an answer, too, if it is nearer than the start. Other failures stay failures.
    A derivative of the derivative is that of the exact inverse at the approximate value.
    """

    solver: LinearSolver

    def __post_init__(self) -> None:
        check_solver("solver", self.solver)

    def solve(self, matvec: LinearMap, b: Tree, x0: Tree | None = None, *, throw: bool = True) -> Solution:
        solution = self.solver.solve(matvec, b, x0, throw=False)
        b, x0 = without_gradient(b), without_gradient(x0)
        start = b if x0 is None else pytree.tree_map(torch.sub, b, matvec(x0))
        nearer = solution.residual < norm(Space.of(start, "b").ravel(start, "b"))
        stopped = (solution.result == Result.max_iterations) | ((solution.result == Result.breakdown) & nearer)
        result = torch.where(stopped, torch.full_like(solution.result, Result.converged), solution.result)
        solution = solution._replace(result=result)
        return solution.check() if throw else solution


def solve_system(operator: Operator, args: Args, b: Tree, solver: LinearSolver, throw: bool) -> Solution:
    """`linear_solve` for an operator as a value."""
    if isinstance(solver, ScaledIdentity):
        return solver.solve(lambda v: v, b)  # differentiable as it stands, as it depends on b alone
    fixed_args, fixed_b = freeze((args, b))
    with torch.no_grad():
        solution = solver.solve(operator.constant(fixed_args, fixed_b), fixed_b, throw=throw)
    value = attach(System(operator), solution.value, (b, args), solver, throw)
    return solution._replace(value=value)


def attach(rule: Rule, x: Tree, theta: Theta, solver: LinearSolver, throw: bool) -> Tree:
    """x, the solution of the rule's equation at theta, as a differentiable function of theta.

    Args:
        x: a pytree of constants.
        theta: pytrees; only tensors of a floating-point dtype are differentiated.
        solver: of the linear systems of the derivatives.
        throw: raise where such a solve fails; else the derivative is NaN there.
    """
    if not differentiating():
        return x
    values, structure = pytree.tree_flatten(x)
    leaves, spec = pytree.tree_flatten(theta)
    if any(isinstance(leaf, Tensor) and leaf.is_complex() and carries_derivative(leaf) for leaf in leaves):
        raise ValueError(
            "an implicit rule differentiates real tensors, and was given a complex one that is being "
            "differentiated: pass torch.view_as_real(z) and rebuild it in the function"
        )
    where = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    layout = _Layout(rule, solver, throw, structure, len(values), spec, where, constants)
    outputs = _Implicit.apply(layout, *values, *(leaves[i] for i in where))
    return pytree.tree_unflatten(list(outputs), structure)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class _Layout:
    """Everything about one application of a rule that is no tensor, and how its tensors are laid out."""

    rule: Rule
    solver: LinearSolver
    throw: bool
    structure: pytree.TreeSpec
    n: int  # the tensors of x, which come first
    spec: pytree.TreeSpec
    where: tuple[int, ...]
    constants: tuple[Any, ...]

    def theta(self, tensors: Sequence[Tensor]) -> Theta:
        leaves = list(self.constants)
        for i, tensor in zip(self.where, tensors, strict=True):
            leaves[i] = tensor
        return pytree.tree_unflatten(leaves, self.spec)

    def solution(self, tensors: Sequence[Tensor]) -> Tree:
        return pytree.tree_unflatten(list(tensors), self.structure)

    def of(self, tensors: Sequence[Tensor], chosen: Sequence[int]) -> Callable[[Selected], Theta]:
        """theta with other tensors at the chosen places."""

        def of(selected: Selected) -> Theta:
            replaced = list(tensors)
            for i, tensor in zip(chosen, selected, strict=True):
                replaced[i] = tensor
            return self.theta(replaced)

        return of

    def solve(self, operator: Operator, args: Args, b: Tree) -> Tree:
        solution = solve_system(operator, args, b, self.solver, self.throw)
        if self.throw:
            return solution.value
        solved = solution.result == Result.converged
        return pytree.tree_map(lambda x: torch.where(solved, x, torch.full_like(x, float("nan"))), solution.value)


class _Implicit(torch.autograd.Function):
    """(x, theta) -> x, with the derivative of NOTE [Implicit rule] in theta and none in the given x.

    The x of the formulas is the output, not the input, so that it is a function of theta when they are differentiated.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(layout: _Layout, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in tensors[: layout.n])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.layout = inputs[0]
        ctx.set_materialize_grads(False)
        theta = inputs[1 + ctx.layout.n :]
        ctx.save_for_backward(*output, *theta)
        ctx.save_for_forward(*output, *theta)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        layout: _Layout = ctx.layout
        values, tensors = ctx.saved_tensors[: layout.n], ctx.saved_tensors[layout.n :]
        nothing = (None,) * (1 + layout.n)
        needed = ctx.needs_input_grad[1 + layout.n :]
        chosen = [i for i, need in enumerate(needed) if need and tensors[i].is_floating_point()]
        if not chosen or all(g is None for g in cotangents):
            return (*nothing, *(None for _ in tensors))
        x, theta = layout.solution(values), layout.theta(tensors)
        given = [torch.zeros_like(v) if g is None else g for g, v in zip(cotangents, values, strict=True)]
        w = layout.solve(layout.rule.operator.T, layout.rule.arguments(x, theta), layout.solution(given))
        selected = [tensors[i] for i in chosen]
        gradients = dict(zip(chosen, layout.rule.pull(x, layout.of(tensors, chosen), selected, w), strict=True))
        return (*nothing, *(gradients.get(i) for i in range(len(tensors))))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        layout: _Layout = ctx.layout
        with below_the_tangent(ctx.saved_tensors, tangents[1 + layout.n :]) as (saved, moving):
            values, tensors = saved[: layout.n], saved[layout.n :]
            chosen = [i for i, t in enumerate(moving) if t is not None and tensors[i].is_floating_point()]
            if not chosen:
                return tuple(torch.zeros_like(v) for v in values)
            x, theta = layout.solution(values), layout.theta(tensors)
            selected, along = [tensors[i] for i in chosen], [moving[i] for i in chosen]
            s = layout.rule.push(x, layout.of(tensors, chosen), selected, along)
            x_dot = layout.solve(layout.rule.operator, layout.rule.arguments(x, theta), s)
            return tuple(pytree.tree_leaves(x_dot))
