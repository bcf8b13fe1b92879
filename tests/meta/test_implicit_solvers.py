"""Roots, fixed points and minima: values, published rates, each task on its own, and every way to fail."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap

from theria.meta.implicit import (
    LBFGS,
    Anderson,
    GradientDescent,
    Inexact,
    IterationError,
    Newton,
    NewtonCG,
    Picard,
    ScaledIdentity,
    argmin,
    custom_fixed_point,
    custom_root,
    fixed_point,
    linear_solve,
    root,
)
from theria.meta.solvers import CG, GMRES, MINRES, Dense, Neumann, Result, SolverError

EXACT = 1e-10  # float64, solves to 1e-12 of systems with condition numbers below 1e2
N = 6


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def zeros(n: int = N) -> Tensor:
    return torch.zeros(n, dtype=torch.float64)


def close(actual, expected, tol=EXACT):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def contraction(radius: float, n: int = N, seed: int = 0) -> Tensor:
    """A matrix with eigenvalues in [-radius, radius], the largest met, and far from symmetric."""
    basis = torch.eye(n, dtype=torch.float64) + 0.3 * randn(n, n, seed=seed)
    return basis @ torch.diag(torch.linspace(-0.5, 1, n, dtype=torch.float64) * radius) @ torch.linalg.inv(basis)


def spd(low: float, high: float, n: int = N, seed: int = 0) -> Tensor:
    Q = torch.linalg.qr(randn(n, n, seed=seed))[0]
    return (Q * torch.linspace(low, high, n, dtype=torch.float64)) @ Q.mT


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


# --- minima --------------------------------------------------------------------------------------------------------

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


# --- decorators ----------------------------------------------------------------------------------------------------


def test_custom_root_around_scipy():
    """The Sylvester equation X A + B X = C by a LAPACK routine; its derivative is another Sylvester equation."""

    def F(X, A, B, C):
        return X @ A + B @ X - C

    @custom_root(F, linear_solver=GMRES(rtol=1e-13, restart=12), tol=1e-9)
    def sylvester(start, A, B, C):
        return torch.from_numpy(scipy.linalg.solve_sylvester(B.numpy(), A.numpy(), C.numpy()))

    A, B, C = spd(1, 3, 3), 2 * torch.eye(4, dtype=torch.float64) + 0.3 * randn(4, 4), randn(4, 3, seed=1)
    solution = sylvester(None, A, B, C)
    assert (solution.result.item(), solution.iterations.item()) == (Result.converged, 0)
    dC = randn(4, 3, seed=2)
    tangent = jvp(lambda C: sylvester(None, A, B, C).value, (C,), (dC,))[1]
    close(tangent, sylvester(None, A, B, dC).value)
    gradient = vmap(grad(lambda A, C: sylvester(None, A, B, C).value.sum(), (0, 1)), in_dims=(None, 0))
    dA, dC = gradient(A, torch.stack([C, 2 * C]))
    close(dC[0], sylvester(None, A.mT, B.mT, torch.ones_like(C)).value)
    close(dA[0], -solution.value.mT @ dC[0])
    close(dA[1], 2 * dA[0])


def test_custom_fixed_point_around_a_loop_in_place_and_around_torch():
    M, c = contraction(0.6), randn(3, N, seed=1)

    def f(x, c):
        return torch.tanh(M @ x + c)

    seen = []

    def run(x0, c):
        seen.append(tuple(c.shape))
        x = x0.clone()
        for _ in range(100):
            x.copy_(f(x, c))
        return x

    loop = custom_fixed_point(f, tol=1e-11, linear_solver=GMRES(rtol=1e-13))(run)

    @custom_fixed_point(f, tol=1e-11, linear_solver=GMRES(rtol=1e-13), vectorized=True)
    def vectorized(x0, c):
        return run(x0 + 0 * c, c)

    reference = vmap(jacrev(lambda c: fixed_point(f, zeros(), c, tol=1e-12, linear_solver=GMRES(rtol=1e-13)).value))(c)
    close(vmap(jacrev(lambda c: loop(zeros(), c).value))(c), reference)
    assert seen == [(N,)] * 3
    close(vmap(jacrev(lambda c: vectorized(zeros(), c).value))(c), reference)
    assert len(seen) == 4
    assert loop.__name__ == "run"


# --- every way to fail -----------------------------------------------------------------------------------------------


def test_failures_of_the_iteration_raise_or_are_flagged():
    M, c = contraction(0.9), randn(N, seed=1)

    def f(x, c):
        return M @ x + c

    with pytest.raises(IterationError, match=r"fixed_point did not converge \(max_iterations.*5 iterations.*max_iter,"):
        fixed_point(f, zeros(), c, max_iter=5)
    solution = fixed_point(f, zeros(), c, max_iter=5, throw=False)
    assert solution.result == Result.max_iterations
    close(solution.residual, (f(solution.value, c) - solution.value).norm(), 1e-14)
    assert fixed_point(lambda x, c: 1e3 * x * x + c, zeros(), c, throw=False).result == Result.non_finite
    assert root(lambda x, c: x * x + c * c, 1 + zeros(), c, throw=False).result != Result.converged  # has no real root
    assert argmin(lambda x, c: c @ x, zeros(), c, throw=False).result != Result.converged  # has no minimum
    assert (
        argmin(lambda x, c: x @ x, 1 + zeros(), c, solver=GradientDescent(2.0), throw=False).result != Result.converged
    )


def test_only_the_failed_tasks_are_named():
    radii, c = torch.tensor([0.5, 1.5, 0.5, 2.0], dtype=torch.float64), randn(N, seed=1)

    def solve(radius, throw):
        return fixed_point(lambda x, r: r * x + c, zeros(), radius, throw=throw, linear_solver=Neumann(check_every=1))

    with pytest.raises(IterationError, match="2 tasks, the first of them task 1") as caught:
        vmap(lambda r: solve(r, True))(radii)
    assert caught.value.tasks == (1, 3)
    assert vmap(lambda r: solve(r, False))(radii).result.tolist() == [0, 1, 0, 1]
    gradient = vmap(grad(lambda r: solve(r, False).value.sum()))(radii)
    assert gradient.isnan().tolist() == [False, True, False, True]  # Neumann does not converge for these
    close(gradient[0], 4 * c.sum(), 1e-5)


def test_a_failed_adjoint_raises_in_the_backward_or_gives_nan():
    """F = x^3 - t at t = 0: the root is 0, its derivative infinite."""
    t = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def solve(throw):
        return root(lambda x, t: x**3 - t, 1e-3 + zeros(2), t, tol=1e-6, throw=throw, linear_solver=Dense()).value

    close(solve(True).detach(), zeros(2), 1e-2)
    x = argmin(lambda x, t: -x @ x + x.pow(4).sum() / 2 - t @ x, zeros(2), t, tol=1e-9)  # a maximum
    with pytest.raises(SolverError, match="indefinite"):
        x.value.sum().backward()
    flagged = argmin(lambda x, t: -x @ x + x.pow(4).sum() / 2 - t @ x, zeros(2), t, tol=1e-9, throw=False)
    (gradient,) = torch.autograd.grad(flagged.value.sum(), t)
    assert gradient.isnan().all()
    saddle = argmin(
        lambda x, t: -x @ x + x.pow(4).sum() / 2 - t @ x, zeros(2), t, tol=1e-9, linear_solver=MINRES(rtol=1e-12)
    )
    close(torch.autograd.grad(saddle.value.sum(), t)[0], torch.full((2,), -0.5, dtype=torch.float64))


def test_a_custom_solver_is_not_believed():
    def guess(x0, a):
        return x0

    strict = custom_root(lambda x, a: x**2 - a, tol=1e-8)(guess)
    a = torch.tensor([4.0, 9.0], dtype=torch.float64)
    assert strict(torch.tensor([2.0, 3.0], dtype=torch.float64), a).result == Result.converged
    with pytest.raises(IterationError, match=r"guess did not converge.*residual"):
        strict(torch.tensor([2.0, 2.9], dtype=torch.float64), a)
    lenient = custom_root(lambda x, a: x**2 - a, tol=math.inf)(guess)
    assert lenient(torch.tensor([2.0, 2.9], dtype=torch.float64), a).residual > 0.5
    flagged = custom_root(lambda x, a: x**2 - a, throw=False)(guess)
    assert flagged(torch.tensor([2.0, 2.9], dtype=torch.float64), a).result == Result.breakdown


def test_inexact_takes_the_bound_of_iterations_and_nothing_else():
    A, b = spd(1, 10), randn(N, seed=1)
    inexact = linear_solve(lambda v, A: A @ v, b, A, solver=Inexact(CG(max_iterations=3)))
    assert inexact.result == Result.converged
    assert inexact.residual > 1e-3
    close(inexact.value, CG(max_iterations=3).solve(lambda v: A @ v, b, throw=False).value, 1e-14)
    with pytest.raises(SolverError, match="indefinite"):
        linear_solve(lambda v, A: -A @ v, b, A, solver=Inexact(CG(max_iterations=3)))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda c: fixed_point(lambda x, c: x[:2], zeros(), c), ValueError, r"fixed_point has shapes.*\(2,\).*\(6,\)"),
        (lambda c: root(lambda x, c: (x, x), zeros(), c), ValueError, "structure"),
        (lambda c: argmin(lambda x, c: x - c, zeros(), c), ValueError, "one floating-point number"),
        (lambda c: fixed_point(lambda x, c: x, zeros(), c, tol=-1.0), ValueError, "tol=-1.0"),
        (lambda c: fixed_point(lambda x, c: x, zeros(), c, max_iter=0), ValueError, "max_iter=0"),
        (lambda c: fixed_point(lambda x, c: x, torch.zeros(3, dtype=torch.int64), c), ValueError, "floating-point"),
        (lambda c: Picard(damping=1.5), ValueError, "damping=1.5"),
        (lambda c: Anderson(memory=0), ValueError, "memory=0"),
        (lambda c: GradientDescent(-1.0), ValueError, "lr=-1.0"),
    ],
)
def test_arguments_that_do_not_fit(call, error, words):
    with pytest.raises(error, match=words):
        call(randn(N))
