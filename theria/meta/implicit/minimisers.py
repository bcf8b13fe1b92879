"""Ways to minimise a smooth function of a vector, each task under vmap on its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from theria.meta.constant import plain_gradient
from theria.meta.implicit.equation import Ended, Method
from theria.meta.implicit.forward_mode import hessian_product
from theria.meta.implicit.search import backtrack
from theria.meta.solvers import CG, LinearSolver
from theria.meta.solvers.base import check_count, check_solver
from theria.meta.solvers.loop import (
    BREAKDOWN,
    CONVERGED,
    NON_FINITE,
    Stepped,
    Vectors,
    classify,
    epsilon,
    first_status,
    iterate,
    nonzero,
    norm,
)

Loss = Callable[[Tensor], Tensor]  # (N,) -> ()
_LOOSE = CG(rtol=1e-4, check_every=1)


@dataclass(frozen=True)
class GradientDescent(Method):
    """x <- x - lr g: linear, at best by (k - 1) / (k + 1) a step for a condition number k (lr = 2 / (l_min + l_max)).

    Args:
        lr: the rate; below 2 / l_max.
        check_every: look every so many iterations whether all tasks are done; None never looks.
    """

    solves: ClassVar[str] = "argmin"

    lr: float
    check_every: int | None = 8

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr}: the rate has to be positive, such as 0.1")
        check_count("check_every", self.check_every)

    def run(self, function: Loss, x: Tensor, tol: float, bound: int) -> Ended:
        def step(state: Vectors) -> Stepped:
            x = state[0] - self.lr * state[1]
            g = plain_gradient(function, x)
            return _code(norm(g), tol), (x, g)

        g = plain_gradient(function, x)
        status, iterations, state = iterate(step, _first(g, tol), (x, g), bound, self.check_every)
        return state[0], status, iterations


@dataclass(frozen=True)
class LBFGS(Method):
    """Limited-memory BFGS with backtracking (Nocedal and Wright, Numerical Optimization, 2006, algorithm 7.4).

    A pair (s, y) counts only where s'y > 0 beyond rounding (cautious update), so that the metric stays positive.

    Args:
        memory: pairs kept.
        halvings: of one step at most; the solve ends as a breakdown where they do not help.
        check_every: look every so many iterations whether all tasks are done; None never looks.
    """

    solves: ClassVar[str] = "argmin"

    memory: int = 10
    halvings: int = 30
    check_every: int | None = 1

    def __post_init__(self) -> None:
        check_count("memory", self.memory)
        check_count("check_every", self.check_every)

    def run(self, function: Loss, x: Tensor, tol: float, bound: int) -> Ended:
        def step(state: Vectors) -> Stepped:
            x, value, g, S, Y, scale = state
            good, (x_new, value_new, g_new) = _search(function, x, value, g, -_metric(g, S, Y, scale), self.halvings)
            s, y = x_new - x, g_new - g
            curved = s @ y > epsilon(x) * norm(s) * norm(y)
            S = torch.where(curved, torch.cat([S[1:], s[None]]), S)
            Y = torch.where(curved, torch.cat([Y[1:], y[None]]), Y)
            scale = torch.where(curved, (s @ y) / nonzero(y @ y), scale)
            return _code(norm(g_new), tol, good), (x_new, value_new, g_new, S, Y, scale)

        value, g = _value_and_gradient(function, x)
        none = x.new_zeros(self.memory, x.shape[0])
        state = (x, value, g, none, none, 1 / nonzero(norm(g)))
        status, iterations, state = iterate(step, _first(g, tol), state, bound, self.check_every)
        return state[0], status, iterations


def _metric(g: Tensor, S: Tensor, Y: Tensor, scale: Tensor) -> Tensor:
    """H g by the two-loop recursion (algorithm 7.4 there); rows of zeros change nothing."""
    products = (S * Y).sum(1)
    weights = torch.where(products > 0, 1 / nonzero(products), torch.zeros_like(products))
    q, along = g, []
    for i in reversed(range(S.shape[0])):
        along.append(weights[i] * (S[i] @ q))
        q = q - along[-1] * Y[i]
    q = scale * q
    for i, a in enumerate(reversed(along)):
        q = q + (a - weights[i] * (Y[i] @ q)) * S[i]
    return q


@dataclass(frozen=True)
class NewtonCG(Method):
    """Newton's direction by conjugate gradients on Hessian products, with backtracking: quadratic near a minimum.

    Where the Hessian is not positive definite the direction is CG's last before the negative curvature, or the
    gradient's (Nocedal and Wright, algorithm 7.1).

    Args:
        linear_solver: of H d = -g. Its tolerance bounds the rate: with rtol the gradient falls by rtol a step at best.
        halvings: of one step at most; the solve ends as a breakdown where they do not help.
        check_every: look every so many iterations whether all tasks are done; None never looks.
    """

    solves: ClassVar[str] = "argmin"

    linear_solver: LinearSolver = _LOOSE
    halvings: int = 30
    check_every: int | None = 1

    def __post_init__(self) -> None:
        check_solver("linear_solver", self.linear_solver)

    def run(self, function: Loss, x: Tensor, tol: float, bound: int) -> Ended:
        def step(state: Vectors) -> Stepped:
            x, value, g = state
            d = self.linear_solver.solve(
                lambda v: hessian_product(function, x, v, constant=True), -g, throw=False
            ).value
            good, (x, value, g) = _search(function, x, value, g, d, self.halvings)
            return _code(norm(g), tol, good), (x, value, g)

        value, g = _value_and_gradient(function, x)
        status, iterations, state = iterate(step, _first(g, tol), (x, value, g), bound, self.check_every)
        return state[0], status, iterations


def _search(function: Loss, x: Tensor, value: Tensor, g: Tensor, d: Tensor, halvings: int) -> tuple[Tensor, Vectors]:
    """(x, value, gradient) at the first of the steps 1, 1/2, ... along d that decreases enough.

    Armijo's condition, or, where rounding of the value hides a decrease, the approximate one that looks at the slope
    (Hager and Zhang, SIAM J. Optim. 16 (2005) 170, (4.1)). A d that is no descent direction gives way to -g.
    """
    d = torch.where((g @ d < 0) & d.isfinite().all(), d, -g)
    slope = g @ d
    rounding = epsilon(x) ** 0.75 * value.abs()

    def trial(t: Tensor) -> tuple[Tensor, Vectors]:
        there = x + t * d
        value_there, g_there = _value_and_gradient(function, there)
        armijo = value_there <= value + 1e-4 * t * slope
        flat = (value_there <= value + rounding) & ((g_there @ d).abs() <= 0.8 * slope.abs())
        return (armijo | flat) & g_there.isfinite().all(), (there, value_there, g_there)

    return backtrack(trial, torch.ones_like(slope), halvings)


def _value_and_gradient(function: Loss, x: Tensor) -> tuple[Tensor, Tensor]:
    value, pull = torch.func.vjp(function, x)[:2]
    return value, pull(torch.ones_like(value), retain_graph=False, create_graph=False)[0]


def _first(g: Tensor, tol: float) -> Tensor:
    size = norm(g)
    return first_status(size, torch.full_like(size, tol))


def _code(size: Tensor, tol: float, good: Tensor | None = None) -> Tensor:
    rules = [(~size.isfinite(), NON_FINITE), (size <= tol, CONVERGED)]
    return classify(size, *rules, *([] if good is None else [(~good, BREAKDOWN)]))
