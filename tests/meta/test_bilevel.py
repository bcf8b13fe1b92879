"""ITD and AID against the exact answers of `theria.testing.problems`, and everything they have to refuse."""

import pytest
import torch

from tests.meta.bilevel_methods import CLOSED, CONVERGED, TIGHT, aid, bilevel, close, itd
from theria.meta import SGD, MixedMode, Unrolled
from theria.meta.bilevel import AID, ITD
from theria.meta.implicit_adjoint import Implicit
from theria.meta.solvers import CG, GMRES, MINRES, BiCGSTAB, Dense, Neumann, Result
from theria.meta.truncated import Truncated
from theria.testing.problems import PROBLEMS, neumann, quadratic, ridge

SLOPE = 0.05  # relative error of a measured rate of convergence against that of theory
SOLVED = [name for name in PROBLEMS if PROBLEMS[name]().steps is None]


# ------------------------------------------------------------------------------------------------------ exact answers
@pytest.mark.parametrize("adjoint", [Unrolled(), MixedMode()], ids=["unrolled", "mixed_mode"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_itd_is_exact(name, adjoint):
    """Run to convergence where the problem is to be solved; after exactly so many steps where it is that of steps."""
    problem = PROBLEMS[name](1)
    method = itd(problem, adjoint)

    def value(x):
        evaluation = bilevel(problem).evaluate(x, problem.initial(x), method)
        return evaluation.value, evaluation

    gradient, evaluation = torch.func.grad(value, has_aux=True)(problem.outer0)
    close(gradient, problem.hypergradient(problem.outer0))
    close(evaluation.inner, problem.inner_solution(problem.outer0))
    close(evaluation.value, problem.outer_loss(evaluation.inner, problem.outer0))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SOLVED)
def test_aid_is_exact(name, seed):
    problem = PROBLEMS[name](seed)
    found = bilevel(problem).hypergradient(problem.outer0, problem.inner0, aid(problem))
    close(found.gradient, problem.hypergradient(problem.outer0))
    close(found.inner, problem.inner_solution(problem.outer0))
    close(found.value, problem.outer_loss(found.inner, problem.outer0))
    assert found.inner_residual < CLOSED
    H = torch.func.hessian(problem.inner_loss)(found.inner, problem.outer0).reshape(2 * (found.inner.numel(),))
    f_z = torch.func.grad(problem.outer_loss)(found.inner, problem.outer0)
    close((H @ found.linear.value.reshape(-1)).reshape(f_z.shape), -f_z)


SOLVERS = [
    TIGHT,
    MINRES(rtol=1e-13),
    GMRES(rtol=1e-13),
    BiCGSTAB(rtol=1e-12),
    Neumann(rtol=1e-13, scale=1.0, max_iterations=1000),
    Dense(),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_aid_with_every_solver(solver):
    problem = quadratic(3, condition=5.0)
    found = bilevel(problem).hypergradient(problem.outer0, problem.inner0, aid(problem, solver))
    close(found.gradient, problem.hypergradient(problem.outer0))


def test_aid_at_a_solution_that_someone_else_found():
    problem = ridge()
    method = AID(SGD(0.1), 0, TIGHT)
    inner = problem.inner_solution(problem.outer0)
    found = bilevel(problem).hypergradient(problem.outer0, inner, method)
    close(found.gradient, problem.hypergradient(problem.outer0))
    assert torch.equal(found.inner, inner)


@pytest.mark.parametrize("terms", [0, 1, 7])
def test_a_truncated_neumann_series_is_so_many_steps_from_the_solution(terms):
    """AID with K + 1 iterations of Neumann from 0 = ITD of K + 1 steps, both begun at z* = the closed form."""
    problem = neumann(2, terms=terms)
    x, rate = problem.outer0, problem.rate
    series = AID(SGD(rate), 0, Neumann(scale=rate, rtol=0.0, max_iterations=terms + 1), throw=False)
    found = bilevel(problem).hypergradient(x, problem.inner0, series)
    assert found.linear.result == Result.max_iterations
    close(found.gradient, problem.hypergradient(x))
    close(bilevel(problem).hypergradient(x, problem.inner0, itd(problem)).gradient, problem.hypergradient(x))


def test_a_truncated_adjoint_is_the_same_series():
    """Far more steps than are differentiated through, so that they end at z*: K + 1 of them are the series to K."""
    problem = quadratic(2, condition=4.0)
    x, rate, terms = problem.outer0, problem.rate, 6
    series = AID(SGD(rate), 0, Neumann(scale=rate, rtol=0.0, max_iterations=terms), throw=False)
    expected = bilevel(problem).hypergradient(x, problem.inner_solution(x), series).gradient
    truncated = ITD(SGD(rate), problem.steps_to(CONVERGED), Truncated(terms))
    close(bilevel(problem).hypergradient(x, problem.inner0, truncated).gradient, expected)
    assert torch.linalg.vector_norm(expected - problem.hypergradient(x)) > 1e-3


@pytest.mark.parametrize("name", ["quadratic", "hyper_cleaning", "imaml"])
def test_the_implicit_adjoint_is_aid(name):
    problem = PROBLEMS[name](1)
    method = itd(problem, Implicit(solver=TIGHT))
    found = bilevel(problem).hypergradient(problem.outer0, problem.inner0, method)
    close(found.gradient, problem.hypergradient(problem.outer0))


def test_the_implicit_adjoint_has_the_second_order_that_aid_refuses():
    problem = quadratic(9, inner_dim=4, outer_dim=2, condition=3.0)
    x, method = problem.outer0, itd(problem, Implicit(solver=TIGHT))
    hessian = torch.func.jacrev(torch.func.grad(lambda x: bilevel(problem).evaluate(x, problem.inner0, method).value))
    columns = [problem.hypergradient(x + e) - problem.hypergradient(x) for e in torch.eye(2).double()]
    close(hessian(x), torch.stack(columns))


@pytest.mark.parametrize("kind", ["itd", "aid"])
def test_the_error_falls_with_the_inner_steps_at_the_rate_of_theory(kind):
    """ITD: T c^T, AID with an exact linear solve: c^T, c the contraction of a step (Ji et al. 2021, section 3)."""
    problem = quadratic(4, condition=8.0)
    exact = problem.hypergradient(problem.outer0)

    def error(steps):
        method = ITD(SGD(problem.rate), steps) if kind == "itd" else AID(SGD(problem.rate), steps, TIGHT)
        gradient = bilevel(problem).hypergradient(problem.outer0, problem.inner0, method).gradient
        return torch.linalg.vector_norm(gradient - exact)

    few, many = 40, 70
    ratio = error(many) / error(few) / (many / few if kind == "itd" else 1)
    assert float(ratio) ** (1 / (many - few)) == pytest.approx(problem.contraction, rel=SLOPE)


# --------------------------------------------------------------------------------------------------------- warm starts
def test_warm_starts_save_the_work():
    """After a small move of x, v0 costs fewer iterations than 0, and inner0 leaves a smaller residual; the answer is
    the same."""
    problem = quadratic(5, inner_dim=40, condition=200.0)
    method = AID(SGD(problem.rate), 300, CG(rtol=1e-8))
    solve = bilevel(problem).hypergradient
    start = problem.inner_solution(problem.outer0)
    first = solve(problem.outer0, start, method)
    moved = problem.outer0 + 1e-6 * torch.randn_like(problem.outer0)
    warm = solve(moved, first.inner, method, first.linear.value)
    cold = solve(moved, torch.zeros_like(start), method)
    assert warm.linear.iterations < cold.linear.iterations / 2
    assert warm.inner_residual < 1e-3 * cold.inner_residual
    close(warm.gradient, problem.hypergradient(moved), 1e-5)


def test_inexact_aid_descends_with_few_steps_when_warm_started():
    """AID-BiO: 3 inner steps and 2 iterations of CG an outer step reach the optimum that they could not reach cold."""
    problem = quadratic(6, inner_dim=8, outer_dim=3, condition=5.0)
    assert problem.outer_solution is not None
    method = AID(SGD(problem.rate), 3, CG(rtol=1e-12, max_iterations=2), throw=False)
    distances = {}
    for warm in (True, False):
        x, inner, v = problem.outer0, problem.inner0, None
        for _ in range(60):
            found = bilevel(problem).hypergradient(x, inner, method, v)
            x = x - 0.5 * found.gradient
            if warm:
                inner, v = found.inner, found.linear.value
        distances[warm] = torch.linalg.vector_norm(x - problem.outer_solution)
    assert distances[True] < 1e-8
    assert distances[False] > 1e-2
