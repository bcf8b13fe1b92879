"""Convergence of the linear solvers measured against theory: spectra on which the bounds are attained. Float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.meta.solver_cases import F64, N, close, randn, symmetric, times
from theria.meta.solvers import CG, GMRES, MINRES, Neumann, NormalCG, Nystrom

KAPPAS = [10.0, 100.0, 1000.0]


def rate(kappa: float) -> float:
    """(sqrt kappa - 1) / (sqrt kappa + 1), an iteration's share of the bound."""
    return (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)


def chebyshev(kappa: float, k: int) -> float:
    """1 / T_k((kappa + 1) / (kappa - 1)) = 2 rate^k / (1 + rate^2k): the least maximum over [1, kappa], p(0) = 1."""
    return 2 * rate(kappa) ** k / (1 + rate(kappa) ** (2 * k))


def worst_case(kappa: float, k: int) -> tuple[Tensor, Tensor]:
    """k + 1 eigenvalues in [1, kappa] and squared weights for which k steps of a method that minimises
    sum w_j p(lambda_j)^2 over polynomials with p(0) = 1 gain exactly Chebyshev's factor.

    At the extreme points lambda_j of T_k on [1, kappa] the Chebyshev polynomial p has p(lambda_j) = (-1)^j delta. It is
    the minimiser if sum_j w_j p(lambda_j) lambda_j q(lambda_j) = 0 for all q of degree below k: so w_j lambda_j are the
    absolute values of the coefficients of a divided difference, prod_{i != j} 1 / (lambda_j - lambda_i), whose signs
    alternate (Greenbaum, Linear Algebra Appl. 28 (1979) 107).
    """
    j = torch.arange(k + 1, **F64)
    nodes = (kappa + 1) / 2 + (kappa - 1) / 2 * torch.cos(j * math.pi / k)
    gaps = (nodes[:, None] - nodes) / (kappa - 1) * 4 + torch.eye(k + 1, **F64)
    weights = 1 / gaps.prod(1).abs() / nodes
    return nodes, weights / weights.sum()


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("k", [1, 3, 8, 15])
def test_cg_attains_its_bound(kappa: float, k: int) -> None:
    """|e_k|_A / |e_0|_A = 2 rate^k / (1 + rate^2k) where |e_0|_A^2 has those weights."""
    nodes, weights = worst_case(kappa, k)
    A, Q = symmetric(nodes)
    exact = Q @ (weights / nodes).sqrt()  # e_0 = exact: its squared A-norm is the weights
    value = CG(rtol=0, max_iterations=k).solve(times(A), A @ exact, throw=False).value
    error = value - exact
    assert (error @ A @ error).sqrt().item() == pytest.approx(chebyshev(kappa, k), rel=1e-8)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_the_slope_of_cg_is_the_contraction(kappa: float) -> None:
    """From one worst case to the next an iteration gains (sqrt kappa - 1) / (sqrt kappa + 1), as k grows."""
    k = max(10, round(2 * math.sqrt(kappa)))
    errors = []
    for steps in (k, k + 1):
        nodes, weights = worst_case(kappa, steps)
        exact = (weights / nodes).sqrt()
        value = CG(rtol=0, max_iterations=steps).solve(lambda v, d=nodes: d * v, nodes * exact, throw=False).value
        errors.append(((value - exact).square() * nodes).sum().sqrt().item())
    assert errors[1] / errors[0] == pytest.approx(rate(kappa), rel=1e-3 if kappa < 1000 else 2e-3)


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("k", [3, 8])
def test_normal_cg_attains_the_bound_of_the_squared_condition(kappa: float, k: int) -> None:
    """It minimises |b - A x|: the same polynomials of A'A, whose condition is kappa = cond(A)^2."""
    nodes, weights = worst_case(kappa, k)
    left, right = (symmetric(nodes, seed)[1] for seed in (1, 2))
    A = (left * nodes.sqrt()) @ right.mT
    b = left @ weights.sqrt()
    solution = NormalCG(rtol=0, max_iterations=k).solve(times(A), b, throw=False)
    assert solution.residual.item() == pytest.approx(chebyshev(kappa, k), rel=1e-8)


@pytest.mark.parametrize("solver", [MINRES, GMRES])
@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("k", [3, 8])
def test_residual_minimisers_attain_the_bound(solver: Any, kappa: float, k: int) -> None:
    nodes, weights = worst_case(kappa, k)
    A, Q = symmetric(nodes)
    solution = solver(rtol=0, max_iterations=k).solve(times(A), Q @ weights.sqrt(), throw=False)
    assert solution.residual.item() == pytest.approx(chebyshev(kappa, k), rel=1e-8)


@pytest.mark.parametrize("solver", [MINRES, GMRES])
@pytest.mark.parametrize("kappa", [3.0, 10.0])
@pytest.mark.parametrize("k", [2, 5])
def test_residual_minimisers_need_twice_as_many_on_symmetric_intervals(solver: Any, kappa: float, k: int) -> None:
    """Spectrum in [-kappa, -1] and [1, kappa], evenly: polynomials of A^2, so 2k steps gain what kappa^2 gives in k."""
    nodes, weights = worst_case(kappa**2, k)
    A, Q = symmetric(torch.cat([nodes.sqrt(), -nodes.sqrt()]))
    b = Q @ torch.cat([weights, weights]).div(2).sqrt()
    for steps in (2 * k, 2 * k + 1):
        found = solver(rtol=0, max_iterations=steps).solve(times(A), b, throw=False).residual.item()
        assert found == pytest.approx(chebyshev(kappa**2, k), rel=1e-8)


def test_neumann_falls_by_the_spectral_radius() -> None:
    """From any start, by max |1 - alpha lambda| an iteration in the end; here also of a non-symmetric operator."""
    alpha, steps = 0.3, (60, 90)
    A, _ = symmetric(torch.linspace(0.4, 3.0, N))
    T = torch.eye(N, **F64) + 0.2 * randn(N, N, seed=3)  # A's similar: the same spectrum, other norms
    for matrix in (A, torch.linalg.solve(T, A @ T)):
        radius = torch.linalg.eigvals(torch.eye(N, **F64) - alpha * matrix).abs().max().item()
        residuals = [
            Neumann(rtol=0, scale=alpha, max_iterations=k).solve(times(matrix), randn(N), throw=False).residual.item()
            for k in steps
        ]
        slope = (math.log(residuals[1]) - math.log(residuals[0])) / (steps[1] - steps[0])
        assert slope == pytest.approx(math.log(radius), rel=0.02)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_neumann_converges_just_inside_and_diverges_just_outside_its_radius(sign: float) -> None:
    """The ends of 0 < alpha lambda < 2."""
    b = randn(N)
    for margin, expected in ((0.05, 0), (-0.05, 2)):
        eigenvalue = 1 - sign * (1 - margin)  # 1 - lambda = ±(1 - margin)
        solution = Neumann(rtol=1e-6, max_iterations=1000).solve(lambda v, c=eigenvalue: c * v, b, throw=False)
        assert solution.result.item() == expected
        if expected == 0:  # |1 - lambda|^k <= rtol / 2
            assert solution.iterations == math.ceil(math.log(0.5e-6) / math.log(1 - margin))


def test_nystrom_preconditioning_follows_its_theory() -> None:
    """Proposition 5.3 of Frangella, Tropp and Udell: kappa(P^-1/2 A P^-1/2) <= (l_r + mu + |E|) / mu with
    E = H - H_hat, and CG's bound for that condition number."""
    n, mu, rank = 80, 1e-2, 20
    H, _ = symmetric(torch.logspace(3, -5, n, **F64))
    A, b = H + mu * torch.eye(n, **F64), randn(n)
    precondition = Nystrom(rank, damping=mu).preconditioner(times(A), b)
    P_inverse = torch.stack([precondition(e) for e in torch.eye(n, **F64)])
    close(P_inverse, P_inverse.mT, 1e-9)
    # P^-1 = (l_r + mu) U (l + mu)^-1 U' + I - U U': its eigenvalues below 1 give l + mu in units of l_r + mu.
    gains, U = torch.linalg.eigh(P_inverse)
    U, gains = U[:, :rank], gains[:rank]
    root = torch.linalg.cholesky(P_inverse)
    values = torch.linalg.eigvalsh(root.mT @ A @ root)
    kappa = (values[-1] / values[0]).item()
    kept = (U.mT @ H @ U).diagonal().min().item()  # of the smallest direction kept: at least l_r
    best = torch.linalg.matrix_norm(H - U @ (U.mT @ H @ U) @ U.mT, 2).item()
    assert kappa <= (kept + mu + 2 * best) / mu
    assert kappa < 0.1 * (torch.linalg.cond(A)).item()

    exact = torch.linalg.solve(A, b)
    start = (exact @ A @ exact).sqrt().item()
    for k in (2, 5, 10):
        value = CG(rtol=0, max_iterations=k, preconditioner=precondition).solve(times(A), b, throw=False).value
        error = ((value - exact) @ A @ (value - exact)).sqrt().item()
        assert error <= 2 * rate(kappa) ** k * start
    plain, fewer = (CG(rtol=1e-8, preconditioner=m).solve(times(A), b).iterations for m in (None, precondition))
    most = math.ceil(math.log(2 * math.sqrt(torch.linalg.cond(A).item()) / 0.5e-8) / -math.log(rate(kappa)))
    assert fewer <= most
    assert fewer < plain / 2


def test_more_rank_needs_fewer_iterations() -> None:
    n, mu = 80, 1e-3
    H, _ = symmetric(torch.logspace(2, -6, n, **F64))
    A, b = H + mu * torch.eye(n, **F64), randn(n)
    made: list[Callable[[Tensor], Tensor] | None] = [None]
    made += [Nystrom(rank, damping=mu).preconditioner(times(A), b) for rank in (10, 25, 50)]
    counts = [CG(rtol=1e-8, check_every=1, preconditioner=m).solve(times(A), b).iterations.item() for m in made]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 4
