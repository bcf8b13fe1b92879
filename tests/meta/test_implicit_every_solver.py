"""Every linear solver behind every implicit rule: first and second derivatives against closed forms, in float64.

z(c) solves A z + z^3 = c (entry by entry the cube), so that dz/dc = J^-1 with J = A + 3 diag(z^2), and along d and e
d2z = -J^-1 (6 z dz_d dz_e).
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

from theria.meta import AID, SGD, BilevelProblem, Implicit, argmin, certify, fixed_point, root
from theria.meta.implicit import Inexact, NewtonCG
from theria.meta.solvers import CG, GMRES, MINRES, BiCGSTAB, Dense, LinearSolver, Neumann, NormalCG, Nystrom

N = 4
EXACT = 1e-8  # solves to 1e-11 of systems with condition numbers below 10, twice one after another


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


BASIS = torch.linalg.qr(randn(N, N, seed=1))[0]
A = BASIS @ torch.diag(torch.linspace(1, 2, N, dtype=torch.float64)) @ BASIS.mT
W = randn(N, seed=2)
C = 0.5 * randn(N, seed=3)

RTOL: Any = {"rtol": 1e-12}
SOLVERS: dict[str, LinearSolver] = {
    "CG": CG(**RTOL),
    "NormalCG": NormalCG(**RTOL),
    "NormalCG, least squares": NormalCG(**RTOL, least_squares=True),
    "Inexact(NormalCG)": Inexact(NormalCG(**RTOL)),
    "MINRES": MINRES(**RTOL),
    "GMRES": GMRES(**RTOL),
    "BiCGSTAB": BiCGSTAB(**RTOL),
    "Dense": Dense(**RTOL),
    "Neumann": Neumann(scale=0.5, max_iterations=100, **RTOL),
    "Nystrom": Nystrom(rank=N, damping=0.5, **RTOL),
}


def gradient_of(z: Tensor, c: Tensor) -> Tensor:
    return A @ z + z**3 - c


def loss(z: Tensor, c: Tensor) -> Tensor:
    return z @ A @ z / 2 + (z**4).sum() / 4 - c @ z


def solution(c: Tensor) -> Tensor:
    z = torch.zeros_like(c)
    for _ in range(60):
        z = z - torch.linalg.solve(A + torch.diag(3 * z**2), gradient_of(z, c))
    return z


START = solution(C)  # what is tested is the derivative

RULES = {
    "argmin": lambda c, solver: argmin(loss, START, c, linear_solver=solver, tol=1e-11).value,
    "root": lambda c, solver: root(gradient_of, START, c, linear_solver=solver, tol=1e-11).value,
    "fixed_point": lambda c, solver: (
        fixed_point(lambda z, c: z - 0.5 * gradient_of(z, c), START, c, linear_solver=solver, tol=1e-11).value
    ),
    "Implicit": lambda c, solver: Implicit(solver).solve(
        lambda p, c: loss(p["z"], c), {"z": START}, c, SGD(0.5), {}, 1
    )["z"],
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SOLVERS)
def test_first_and_second_derivatives(rule: str, name: str):
    solver = SOLVERS[name]
    if rule == "fixed_point" and name in ("Neumann", "Nystrom"):  # I - df/dz = 0.5 J here
        solver = Neumann(max_iterations=100, **RTOL) if name == "Neumann" else Nystrom(rank=N, damping=0.25, **RTOL)

    def value(c: Tensor) -> Tensor:
        return W @ RULES[rule](c, solver)

    z = solution(C)
    inverse = torch.linalg.inv(A + torch.diag(3 * z**2))
    first, d = inverse @ W, randn(N, seed=4)
    second = -torch.einsum("i,ij,ik->jk", 6 * z * (inverse @ W), inverse, inverse)
    for actual, expected in (
        (grad(value)(C), first),
        (jvp(value, (C,), (d,))[1], first @ d),
        (vmap(grad(value))(torch.stack([C, C]))[1], first),
        (hessian(value)(C), second),
    ):
        torch.testing.assert_close(actual, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", SOLVERS)
def test_where_a_solver_is_an_argument_elsewhere(name: str):
    """Newton's steps, AID and the certificate."""
    solver, z = SOLVERS[name], solution(C)
    found = argmin(loss, START + 0.1, C, solver=NewtonCG(solver), tol=1e-11).value
    torch.testing.assert_close(found, z, rtol=EXACT, atol=EXACT)

    expected = torch.linalg.solve(A + torch.diag(3 * z**2), W)
    problem = BilevelProblem(loss, lambda z, c: W @ z)
    result = problem.hypergradient(C, z, AID(SGD(0.5), steps=0, solver=solver))
    torch.testing.assert_close(result.gradient, expected, rtol=EXACT, atol=EXACT)
    assert certify(loss, lambda z, c: W @ z, z, C, solver=solver, directions=0).ok


def test_a_solver_of_ones_own_may_transpose_what_it_is_given():
    """A product of constants, transposed by reverse mode as `NormalCG` does it for other operators."""

    class Transposing(LinearSolver):
        def solve(self, matvec: Any, b: Any, x0: Any = None, *, throw: bool = True) -> Any:
            pull = torch.func.vjp(lambda v: matvec(v), b)[1]
            return NormalCG(**RTOL).solve(matvec, b, rmatvec=lambda u: pull(u)[0], throw=throw)

    z = solution(C)
    actual = grad(lambda c: W @ RULES["Implicit"](c, Transposing()))(C)
    torch.testing.assert_close(actual, torch.linalg.solve(A + torch.diag(3 * z**2), W), rtol=EXACT, atol=EXACT)
