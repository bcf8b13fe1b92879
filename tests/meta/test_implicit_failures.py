"""Solvers of the user's, and every way to fail: raised or flagged, never a silent wrong gradient. All in float64."""

import math

import pytest
import scipy.linalg
import scipy.optimize
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap

from tests.meta.implicit_cases import N, close, contraction, randn, zeros
from theria.meta.implicit import (
    Anderson,
    GradientDescent,
    Inexact,
    IterationError,
    Picard,
    argmin,
    custom_fixed_point,
    custom_root,
    fixed_point,
    linear_solve,
    root,
)
from theria.meta.solvers import CG, GMRES, MINRES, Dense, Neumann, Result, SolverError


def spd(low: float, high: float, n: int = N, seed: int = 0) -> Tensor:
    Q = torch.linalg.qr(randn(n, n, seed=seed))[0]
    return (Q * torch.linspace(low, high, n, dtype=torch.float64)) @ Q.mT


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

    with pytest.raises(IterationError, match="2 of 4 tasks, the first of them task 1") as caught:
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


def test_inexact_takes_what_coarse_products_allow():
    """Products of 11 bits, as TF32 has: the recursion reaches the tolerance, the residual stays at their rounding."""
    A, b = spd(1, 2), randn(N, seed=1)

    def coarse(v: Tensor) -> Tensor:
        return A @ (v * 2.0**11 / v.abs().max()).round() * v.abs().max() / 2.0**11

    solver = CG(rtol=1e-6, max_iterations=20)
    with pytest.raises(SolverError, match="breakdown"):
        solver.solve(coarse, b)
    for x0 in (None, randn(N, seed=2)):
        solution = Inexact(solver).solve(coarse, b, x0)
        assert 1e-6 * b.norm() < solution.residual < 1e-2 * b.norm()
        close(solution.value, torch.linalg.solve(A, b), 1e-2)


def test_inexact_does_not_take_what_diverges():
    A, b = spd(1, 10), randn(N, seed=1)
    with pytest.raises(SolverError, match="breakdown"):
        Inexact(Neumann(scale=1.0, max_iterations=100)).solve(lambda v: A @ v, b)


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
