"""Roots and fixed points: the two adjoints, values, published rates, each task on its own. All in float64."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap

from tests.meta.implicit_cases import N, close, contraction, randn, zeros
from theria.meta.implicit import (
    Anderson,
    Inexact,
    IterationError,
    Newton,
    Picard,
    ScaledIdentity,
    fixed_point,
    root,
)
from theria.meta.solvers import Neumann

# --- the two adjoints --------------------------------------------------------------------------------------------


def test_root_and_fixed_point_have_different_adjoints():
    """x = M x + c, as a fixed point or as a root of M x + c - x: (I - M)^-1. Swapped rules give (M - I)^-1, M^-1."""
    M, c = contraction(0.8), randn(N, seed=1)
    expected = torch.linalg.inv(torch.eye(N, dtype=torch.float64) - M)
    assert (expected - expected.mT).abs().max() > 0.5  # a missing transpose shows
    fixed = jacrev(lambda c: fixed_point(lambda x, c: M @ x + c, zeros(), c, tol=1e-12, max_iter=300).value)(c)
    close(fixed, expected)
    close(jacrev(lambda c: root(lambda x, c: M @ x + c - x, zeros(), c, tol=1e-12).value)(c), expected)
    close(jacrev(lambda c: root(lambda x, c: M @ x + c, zeros(), c, tol=1e-12).value)(c), -torch.linalg.inv(M))


def test_neumann_with_k_terms_is_truncated_reverse_of_k_plus_1_steps():
    M, c, weights = contraction(0.9), randn(N, seed=1), randn(N, seed=2)

    def f(x: Tensor, c: Tensor) -> Tensor:
        return torch.tanh(M @ x + c)

    star = fixed_point(f, zeros(), c, tol=1e-14, max_iter=1000).value
    for K in range(5):  # the series up to the power K: K + 1 iterations of the solver from 0
        solver = Inexact(Neumann(rtol=0.0, max_iterations=K + 1, check_every=None))

        def implicit(c: Tensor, solver: Inexact = solver) -> Tensor:
            return weights @ fixed_point(f, star, c, tol=1e-12, linear_solver=solver).value

        def truncated(c: Tensor, steps: int = K + 1) -> Tensor:
            x = star
            for _ in range(steps):
                x = f(x, c)
            return weights @ x

        close(grad(implicit)(c), grad(truncated)(c), 1e-12)


def test_jacobian_free_is_one_step_at_the_fixed_point():
    M, c = contraction(0.8), randn(N, seed=1)

    def f(x: Tensor, c: Tensor) -> Tensor:
        return torch.tanh(M @ x + c)

    def free(c: Tensor) -> Tensor:
        return fixed_point(f, zeros(), c, tol=1e-13, max_iter=500, linear_solver=ScaledIdentity()).value.sin().sum()

    star = fixed_point(f, zeros(), c, tol=1e-13, max_iter=500).value
    close(grad(free)(c), grad(lambda c: f(star, c).sin().sum())(c))
    close(jvp(free, (c,), (c,))[1], grad(free)(c) @ c)


def test_second_derivatives_of_an_approximate_inverse_are_those_of_the_approximation():
    """With A^-1 ~ s I the derivative of 0.5 t x^2 - x is x' = -s x, so x'' = -s x' = s^2 x where x' enters as such."""
    t = torch.tensor(2.0, dtype=torch.float64)

    def x(t: Tensor) -> Tensor:
        return root(lambda x, t: t * x - 1, torch.ones_like(t), t, tol=1e-13, linear_solver=ScaledIdentity(0.3)).value

    close(grad(x)(t).item(), -0.3 * 0.5)
    close(grad(grad(x))(t).item(), 0.3 * 0.3 * 0.5)


# --- what is solved ------------------------------------------------------------------------------------------------


def test_pytrees_integers_and_constants_in_arguments():
    def F(x, theta, labels, n, nothing):
        assert nothing is None
        a, (b,) = theta["a"], theta["b"]
        return {"u": x["u"] ** n - a, "v": [x["v"][0] * b - x["u"][labels]]}

    start = {"u": torch.ones(2, dtype=torch.float64), "v": [torch.ones(3, dtype=torch.float64)]}
    theta = {"a": torch.tensor([4.0, 9.0], dtype=torch.float64), "b": (torch.tensor(2.0, dtype=torch.float64),)}
    labels = torch.tensor([0, 1, 1])

    def solve(theta):
        return root(F, start, theta, labels, 2, None, tol=1e-13).value

    close(solve(theta), {"u": torch.tensor([2.0, 3.0]).double(), "v": [torch.tensor([1.0, 1.5, 1.5]).double()]})
    jacobian = jacrev(solve)(theta)
    close(jacobian["u"]["a"], torch.diag(torch.tensor([0.25, 1 / 6], dtype=torch.float64)))
    close(jacobian["v"][0]["b"][0], torch.tensor([-0.5, -0.75, -0.75], dtype=torch.float64))
    batch = torch.tensor([[0, 0, 1], [1, 1, 0]])
    mapped = vmap(lambda labels: grad(lambda a: solve_v(F, start, a, labels))(theta["a"]))(batch)
    close(mapped, torch.tensor([[0.25, 1 / 12], [0.125, 1 / 6]], dtype=torch.float64))


def solve_v(F, start, a, labels):
    b = (torch.tensor(2.0, dtype=torch.float64),)
    return root(F, start, {"a": a, "b": b}, labels, 2, None, tol=1e-13).value["v"][0].sum()


def test_nothing_is_differentiated_in_the_start():
    M, c = contraction(0.5), randn(N, seed=1)
    f = grad(lambda x0: fixed_point(lambda x, c: M @ x + c, x0, c, tol=1e-12).value.sum())
    assert (f(randn(N, seed=3)) == 0).all()


def test_newton_converges_quadratically_and_where_a_full_step_does_not():
    def error(steps: int) -> float:
        solution = root(lambda x, a: x**3 - a, 2 * torch.ones_like(a), a, tol=0.0, max_iter=steps, throw=False)
        return abs(solution.value.item() - a.item() ** (1 / 3))

    a = torch.tensor(3.0, dtype=torch.float64)
    errors = [error(k) for k in (2, 3, 4)]
    orders = [math.log(errors[i + 1] / errors[i]) / math.log(errors[i] / (errors[i - 1])) for i in (1,)]
    assert 1.8 < orders[0] < 2.2
    # Full Newton steps on arctan diverge from 3; halved ones do not.
    far = torch.tensor(3.0, dtype=torch.float64)
    solution = root(lambda x, a: torch.arctan(x) - a, far, torch.zeros_like(far), tol=1e-12)
    assert abs(solution.value.item()) < 1e-12
    with pytest.raises(IterationError, match="did not converge"):
        root(lambda x, a: torch.arctan(x) - a, far, torch.zeros_like(far), solver=Newton(halvings=1), tol=1e-12)


def test_root_agrees_with_scipy():
    A, b = 3 * np.eye(N) + randn(N, N).numpy(), randn(N, seed=1).numpy()
    expected = scipy.optimize.root(lambda x: A @ x + x**3 - b, np.zeros(N), tol=1e-13).x
    A_, b_ = torch.from_numpy(A), torch.from_numpy(b)
    close(root(lambda x, A, b: A @ x + x**3 - b, zeros(), A_, b_, tol=1e-12).value, torch.from_numpy(expected))


def test_picard_contracts_by_the_spectral_radius():
    M, c = contraction(0.7), randn(N, seed=1)
    exact = torch.linalg.solve(torch.eye(N, dtype=torch.float64) - M, c)

    def error(steps: int, damping: float = 1.0) -> float:
        solution = fixed_point(
            lambda x, c: M @ x + c, zeros(), c, solver=Picard(damping), tol=0.0, max_iter=steps, throw=False
        )
        assert solution.iterations.item() == steps
        return (solution.value - exact).norm().item()

    assert abs((error(40) / error(30)) ** 0.1 - 0.7) < 1e-3
    assert abs((error(80, 0.5) / error(60, 0.5)) ** 0.05 - 0.85) < 1e-3  # 1 - 0.5 (1 - 0.7)


def test_anderson_is_exact_on_affine_maps_after_n_plus_1_steps():
    M, c = contraction(3.0, n=4), randn(4, seed=1)  # no contraction: Picard diverges
    exact = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - M, c)
    errors = [
        fixed_point(lambda x, c: M @ x + c, zeros(4), c, solver=Anderson(memory=4), tol=0.0, max_iter=k, throw=False)
        for k in (4, 5)
    ]
    before, after = ((solution.value - exact).norm().item() for solution in errors)
    assert before > 1e-1
    assert after < 1e-6  # the ridge of 1e-12, times the condition number of the differences' squares
    with pytest.raises(IterationError, match=r"spectral radius|diverges"):
        fixed_point(lambda x, c: M @ x + c, zeros(4), c)


def test_anderson_is_faster_than_picard_on_a_nonlinear_map():
    M, c = contraction(0.95), randn(N, seed=1)
    steps = [
        fixed_point(
            lambda x, c: torch.tanh(M @ x + 0.1 * c), zeros(), c, solver=s, tol=1e-10, max_iter=1000
        ).iterations.item()
        for s in (Picard(check_every=1), Anderson(check_every=1))
    ]
    assert steps[1] < 0.3 * steps[0]


# --- each task on its own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [Picard(check_every=1), Anderson(check_every=1), Picard(check_every=None)])
def test_tasks_stop_on_their_own(solver):
    radii, c = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), randn(3, N, seed=1)
    M = contraction(1.0)

    def solve(radius: Tensor, c: Tensor):
        def f(x, radius, c):
            return torch.tanh(radius * M @ x + c)

        return fixed_point(f, zeros(), radius, c, solver=solver, tol=1e-10, max_iter=300)

    together = vmap(solve)(radii, c)
    alone = [solve(r, c) for r, c in zip(radii, c, strict=True)]
    assert together.iterations.tolist() == [s.iterations.item() for s in alone]
    assert len(set(together.iterations.tolist())) > 1
    close(together.value, torch.stack([s.value for s in alone]), 1e-13)
