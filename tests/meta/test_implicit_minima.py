"""argmin: minima and their derivatives, published rates of the minimisers, each task on its own. All in float64."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap

from tests.meta.implicit_cases import N, close, randn, zeros
from theria.meta.implicit import (
    LBFGS,
    GradientDescent,
    NewtonCG,
    argmin,
    root,
)
from theria.meta.solvers import CG


def spd(low: float, high: float, n: int = N, seed: int = 0) -> Tensor:
    Q = torch.linalg.qr(randn(n, n, seed=seed))[0]
    return (Q * torch.linspace(low, high, n, dtype=torch.float64)) @ Q.mT


MINIMISERS = {
    "GradientDescent": GradientDescent(2 / (1 + 10 + 2)),
    "LBFGS": LBFGS(),
    "NewtonCG": NewtonCG(),
}


@pytest.mark.parametrize("solver", MINIMISERS.values(), ids=list(MINIMISERS))
def test_minima_and_their_derivatives(solver):
    H, theta = spd(1, 10), randn(N, seed=1)

    def loss(x: Tensor, theta: Tensor) -> Tensor:
        return 0.5 * x @ H @ x + 0.25 * x.pow(4).sum() - theta @ x

    def minimum(theta: Tensor) -> Tensor:
        return argmin(loss, zeros(), theta, solver=solver, tol=1e-11, max_iter=1000, linear_solver=CG(rtol=1e-13)).value

    star = minimum(theta)
    oracle = scipy.optimize.minimize(
        lambda x: loss(torch.from_numpy(x), theta).item(),
        np.zeros(N),
        jac=lambda x: grad(loss)(torch.from_numpy(x), theta).numpy(),
        tol=1e-13,
    )
    close(star, torch.from_numpy(oracle.x), 1e-7)
    assert (H @ star + star**3 - theta).norm() <= 1e-11
    close(jacrev(minimum)(theta), torch.linalg.inv(H + torch.diag(3 * star**2)))


def test_rates_of_the_minimisers():
    """Linear by (k - 1) / (k + 1) with the best fixed rate; quadratic for Newton; L-BFGS superlinear in between."""
    H, theta = spd(1, 10), randn(N, seed=1)

    def error(solver, steps: int, quartic: float) -> float:
        def loss(x: Tensor, theta: Tensor) -> Tensor:
            return 0.5 * x @ H @ x + quartic * x.pow(4).sum() - theta @ x

        star = argmin(loss, zeros(), theta, solver=NewtonCG(CG(rtol=1e-12)), tol=1e-13).value
        solution = argmin(loss, 2 + zeros(), theta, solver=solver, tol=0.0, max_iter=steps, throw=False)
        return (solution.value - star).norm().item()

    descent = GradientDescent(2 / 11)
    assert abs((error(descent, 60, 0.0) / error(descent, 40, 0.0)) ** (1 / 20) - 9 / 11) < 1e-2
    newton = NewtonCG(CG(rtol=1e-14))
    a, b, c = (error(newton, k, 1.0) for k in (4, 5, 6))
    assert 1.7 < math.log(c / b) / math.log(b / a) < 2.3
    lbfgs = [error(LBFGS(), k, 1.0) for k in (10, 15, 20)]
    assert lbfgs[2] / lbfgs[1] < 0.5 * (9 / 11) ** 5
    assert lbfgs[2] < 1e-5


def test_lbfgs_on_rosenbrock():
    def rosenbrock(x: Tensor, a: Tensor) -> Tensor:
        return (a - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2

    a, start = torch.tensor(1.5, dtype=torch.float64), torch.tensor([-1.2, 1.0], dtype=torch.float64)
    for solver in (LBFGS(), NewtonCG()):
        solution = argmin(rosenbrock, start, a, solver=solver, tol=1e-9)
        close(solution.value, torch.tensor([1.5, 2.25], dtype=torch.float64), 1e-8)  # (a, a^2)
        assert solution.iterations < 60

        def star(a: Tensor, solver=solver) -> Tensor:
            return argmin(rosenbrock, start, a, solver=solver, tol=1e-9, linear_solver=CG(rtol=1e-12)).value

        close(jacrev(star)(a), torch.tensor([1.0, 3.0], dtype=torch.float64), 1e-6)


def test_ridge_regression_in_closed_form():
    """dw/dlambda = -n (X'X + n lambda I)^-1 w."""
    X, y, lam = randn(20, 4), randn(20, seed=1), torch.tensor(0.3, dtype=torch.float64)

    def loss(w: Tensor, lam: Tensor) -> Tensor:
        return 0.5 * (X @ w - y).square().mean() + 0.5 * lam * w.square().sum()

    def w(lam: Tensor) -> Tensor:
        return argmin(loss, zeros(4), lam, tol=1e-13, linear_solver=CG(rtol=1e-13)).value

    A = torch.linalg.inv(X.mT @ X + 20 * lam * torch.eye(4, dtype=torch.float64))
    close(w(lam), A @ X.mT @ y)
    close(jvp(w, (lam,), (torch.ones_like(lam),))[1], -20 * A @ w(lam))
    close(jacrev(jacrev(w))(lam), 2 * 400 * A @ A @ w(lam))


def test_minimisers_batch_over_tasks():
    theta = randn(4, N, seed=1) * torch.tensor([[0.1], [1.0], [10.0], [100.0]], dtype=torch.float64)
    H = spd(1, 10)

    def loss(x: Tensor, theta: Tensor) -> Tensor:
        return 0.5 * x @ H @ x + 0.25 * x.pow(4).sum() - theta @ x

    def minimise(solver):
        return lambda t: argmin(loss, zeros(), t, solver=solver, tol=1e-10)

    def find(t):
        return root(lambda x, t: H @ x + x**3 - t, zeros(), t, tol=1e-10)

    for solve in (minimise(LBFGS()), minimise(NewtonCG()), find):
        together, alone = vmap(solve)(theta), [solve(t) for t in theta]
        assert together.iterations.tolist() == [s.iterations.item() for s in alone]
        assert len(set(together.iterations.tolist())) > 1
        close(together.value, torch.stack([s.value for s in alone]), 1e-12)
