"""SOBA, SABA and F2SA on problems whose optimum is known: where they converge to, and how fast."""

import math
from itertools import pairwise

import pytest
import torch
from torch.utils import _pytree as pytree

from theria.meta.bilevel import F2SA, SABA, SOBA, BilevelProblem
from theria.testing.problems import benchmark_quadratic, hyper_cleaning, quadratic

CLOSED = 1e-10  # float64, a closed form or a converged deterministic iteration
SUMS = 1e-12  # the same sums in another order
SLOPE = 0.05  # absolute error of a measured exponent

N_INNER, N_OUTER = 8, 6


def close(actual, expected, tolerance=CLOSED):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def finite_sum(seed=0, make=benchmark_quadratic):
    """The problem, its sampled form, and its full form."""
    sizes = {"inner_dim": 6, "outer_dim": 3, "n_inner": N_INNER, "n_outer": N_OUTER}
    problem = make(seed, **(sizes if make is benchmark_quadratic else {}))
    assert problem.samples is not None
    sampled = BilevelProblem(problem.samples.inner, problem.samples.outer)
    return problem, sampled, BilevelProblem(problem.inner_loss, problem.outer_loss)


def linear_system(problem, z, x):
    """v = -H^-1 df/dz by a dense Hessian."""
    H = torch.func.hessian(problem.inner_loss)(z, x).reshape(z.numel(), z.numel())
    f_z = torch.func.grad(problem.outer_loss)(z, x)
    return -torch.linalg.solve(H, f_z.reshape(-1)).reshape(z.shape)


def distance(state, problem):
    return torch.linalg.vector_norm(state.outer - problem.outer_solution, dim=-1)


# --------------------------------------------------------------------------------------------------------- directions
@pytest.mark.parametrize("make", [benchmark_quadratic, hyper_cleaning])
def test_the_directions_at_the_solution_are_zero_and_the_hypergradient(make):
    problem, _, full = finite_sum(1, make)
    x = problem.outer0
    z = problem.inner_solution(x)
    method = SOBA(0.1, 0.1)
    state, directions = method.step(full, method.init(x, z, linear_system(problem, z, x)))
    close(directions.inner, torch.zeros_like(z))
    close(directions.v, torch.zeros_like(z))
    close(directions.outer, problem.hypergradient(x))
    close(state.outer, x - 0.1 * problem.hypergradient(x))
    close(state.inner, z)
    assert state.step == 1


@pytest.mark.parametrize("make", [benchmark_quadratic, hyper_cleaning])
def test_the_directions_elsewhere_and_their_mean_over_the_samples(make):
    """By dense derivatives at a random point; the mean over all pairs of samples is the full direction: unbiased."""
    problem, sampled, full = finite_sum(2, make)
    z, v, x = torch.randn_like(problem.inner0), torch.randn_like(problem.inner0), problem.outer0
    g_z = torch.func.grad(problem.inner_loss)(z, x)
    H = torch.func.hessian(problem.inner_loss)(z, x)
    cross = torch.func.jacrev(torch.func.grad(problem.inner_loss, 1))(z, x)
    f_z, f_x = torch.func.grad(problem.outer_loss, (0, 1))(z, x)
    method, n = SOBA(0.1, 0.1), z.ndim
    _, directions = method.step(full, method.init(x, z, v))
    close(directions.inner, g_z, SUMS)
    close(directions.v, torch.tensordot(H, v, n) + f_z, SUMS)
    close(directions.outer, torch.tensordot(cross, v, n) + f_x, SUMS)

    i, j = torch.cartesian_prod(*(torch.arange(k) for k in (problem.samples.n_inner, problem.samples.n_outer))).T
    each = torch.func.vmap(lambda i, j: method.step(sampled.on(i, j), method.init(x, z, v))[1])(i, j)
    pytree.tree_map(lambda rows, whole: close(rows.mean(0), whole, SUMS), tuple(each), tuple(directions))


# --------------------------------------------------------------------------------------------------------------- SOBA
def test_soba_on_full_batches_converges_to_the_optimum():
    problem, _, full = finite_sum()
    method = SOBA(1.0, 0.15)
    state = method.init(problem.outer0, problem.inner0)
    for _ in range(400):
        state, _ = method.step(full, state)
    close(state.outer, problem.outer_solution)
    close(state.inner, problem.inner_solution(state.outer))
    close(state.v, linear_system(problem, state.inner, state.outer))


def run_soba(method, steps, replicates=64):
    """The mean squared distance over replicates after the steps, all replicates under one vmap."""
    problem, sampled, _ = finite_sum()
    generator = torch.Generator().manual_seed(0)
    step = torch.func.vmap(lambda state, i, j: method.step(sampled.on(i, j), state)[0])
    start = method.init(problem.outer0, problem.inner0)
    state = pytree.tree_map(lambda x: x.expand(replicates, *x.shape).clone(), start)
    for _ in range(steps):
        i = torch.randint(N_INNER, (replicates,), generator=generator)
        j = torch.randint(N_OUTER, (replicates,), generator=generator)
        state = step(state, i, j)
    return float(distance(state, problem).square().mean())


def test_soba_ends_in_a_ball_whose_size_is_the_rate_and_falling_rates_leave_it():
    """Constant rates: the squared distance is of the order of the rate. Rates that fall: it goes on falling."""
    large, small = run_soba(SOBA(0.2, 0.04), 200), run_soba(SOBA(0.05, 0.01), 500)
    assert 2.5 < large / small < 6.5  # the rates' ratio is 4
    falling = SOBA(lambda t: 0.2 / (1 + t / 30) ** 0.8, lambda t: 0.08 / (1 + t / 30) ** 0.8)
    fallen = run_soba(falling, 600)
    assert fallen < large / 4


# --------------------------------------------------------------------------------------------------------------- SABA
def test_saba_converges_linearly_to_1e_8_where_soba_stays_in_its_ball():
    problem, sampled, _ = finite_sum()
    generator = torch.Generator().manual_seed(0)
    saba, soba = SABA(0.3, 0.1), SOBA(0.3, 0.1)
    state = saba.init(sampled, problem.outer0, problem.inner0, N_INNER, N_OUTER)
    without = soba.init(problem.outer0, problem.inner0)
    logs = []
    for _ in range(8):
        for _ in range(100):
            i = torch.randint(N_INNER, (), generator=generator)
            j = torch.randint(N_OUTER, (), generator=generator)
            state, _ = saba.step(sampled, state, i, j)
            without, _ = soba.step(sampled.on(i, j), without)
        logs.append(math.log10(distance(state, problem)))
    assert logs[-1] < -8
    assert distance(without, problem) > 1e-2
    close(state.inner, problem.inner_solution(state.outer), 1e-7)
    # Linear: the logarithm falls by as much in the second half as in the first, to the noise of one run.
    first, second = logs[0] - logs[3], logs[3] - logs[7]
    assert 0.5 < second / first * 3 / 4 < 2


def test_sabas_memory_is_what_it_says():
    """After steps on batches: each row is that of the last visit, the mean is the mean, and an estimate on all samples
    is the full direction."""
    problem, sampled, full = finite_sum(3)
    method = SABA(0.1, 0.05)
    state = method.init(sampled, problem.outer0, problem.inner0, N_INNER, N_OUTER, chunk_size=3)
    visits = [(torch.tensor([0, 3]), torch.tensor([1])), (torch.tensor([3, 5]), torch.tensor([0, 1]))]
    points = []
    for i, j in visits:
        points.append(state)
        state, _ = method.step(sampled, state, i, j)
    at_first = method.init(sampled, points[0].outer, points[0].inner, N_INNER, N_OUTER, points[0].v)
    at_second = method.init(sampled, points[1].outer, points[1].inner, N_INNER, N_OUTER, points[1].v)
    for table, first, second, (last_first, last_second) in (
        (state.inner_memory, at_first.inner_memory, at_second.inner_memory, ([0], [3, 5])),
        (state.outer_memory, at_first.outer_memory, at_second.outer_memory, ([], [0, 1])),
    ):
        expected = pytree.tree_map(torch.clone, first.values)
        for rows, source in ((last_first, first), (last_second, second)):
            pytree.tree_map(
                lambda e, s, rows=rows: e.index_copy_(0, torch.tensor(rows).long(), s[rows]), expected, source.values
            )
        pytree.tree_map(lambda a, b: close(a, b, SUMS), table.values, expected)
        pytree.tree_map(lambda mean, values: close(mean, values.mean(0), SUMS), table.mean, expected)

    _, directions = method.step(sampled, state, torch.arange(N_INNER), torch.arange(N_OUTER))
    soba = SOBA(0.1, 0.05)
    _, expected = soba.step(full, soba.init(state.outer, state.inner, state.v))
    pytree.tree_map(lambda a, b: close(a, b, SUMS), tuple(directions), tuple(expected))


def test_steps_are_pure_and_leave_constants():
    problem, sampled, full = finite_sum()
    outer = problem.outer0.clone().requires_grad_()
    soba, f2sa, saba = SOBA(0.1, 0.1), F2SA(0.1, 0.1), SABA(0.1, 0.1)
    i = torch.tensor(2)
    for step, state in (
        (lambda s: soba.step(full, s), soba.init(outer, problem.inner0.expand(6))),
        (lambda s: f2sa.step(full, s), f2sa.init(outer, problem.inner0)),
        (lambda s: saba.step(sampled, s, i, i), saba.init(sampled, outer, problem.inner0, N_INNER, N_OUTER)),
    ):
        before = pytree.tree_map(torch.clone, state)
        first, again = step(state), step(state)
        pytree.tree_map(lambda a, b: close(a, b, 0), before, state)
        pytree.tree_map(lambda a, b: close(a, b, 0), first, again)
        assert not any(t.requires_grad for t in pytree.tree_leaves(first))
        assert not torch.equal(first[0].outer, state.outer)


def test_pytrees_of_variables():
    """Split in two, each method takes the same step."""
    problem, _, full = finite_sum()

    def join(tree):
        return torch.cat([tree["a"], tree["b"][0]])

    def split(vector):
        return {"a": vector[:1], "b": [vector[1:]]}

    nested = BilevelProblem(
        lambda z, x: problem.inner_loss(join(z), join(x)), lambda z, x: problem.outer_loss(join(z), join(x))
    )
    for method in (SOBA(0.3, 0.1), F2SA(0.3, 0.1)):
        whole, parts = (
            method.init(*variables)
            for variables in ((problem.outer0, problem.inner0), (split(problem.outer0), split(problem.inner0)))
        )
        for _ in range(3):
            whole, parts = method.step(full, whole)[0], method.step(nested, parts)[0]  # type: ignore[arg-type]
        close(join(parts.outer), whole.outer, SUMS)
        close(join(parts.inner), whole.inner, SUMS)


# --------------------------------------------------------------------------------------------------------------- F2SA
def penalised_gradient(problem, penalty):
    """Equation 3 with exact minimisers: both losses are quadratics, so one Newton step finds each."""
    x = problem.outer0
    z = problem.inner_solution(x)

    def penalised(y):
        return problem.outer_loss(y, x) / penalty + problem.inner_loss(y, x)

    y = z - torch.linalg.solve(torch.func.hessian(penalised)(z), torch.func.grad(penalised)(z))
    g_x = torch.func.grad(problem.inner_loss, 1)
    return torch.func.grad(problem.outer_loss, 1)(y, x) + penalty * (g_x(y, x) - g_x(z, x))


def settled(problem, penalty, steps=150):
    """F2SA's direction at a fixed outer variable after the inner variables have settled."""
    method = F2SA(problem.rate * 0.7, 0.0, penalty, inner_steps=steps)
    state = method.init(problem.outer0, problem.inner0)
    return method.step(BilevelProblem(problem.inner_loss, problem.outer_loss), state)[1].outer


def test_f2sas_direction_is_the_gradient_of_the_penalised_problem():
    problem = quadratic(0, condition=4.0)
    for penalty in (10.0, 1000.0):
        close(settled(problem, penalty), penalised_gradient(problem, penalty))


def test_the_bias_of_the_penalty_falls_as_its_inverse():
    """|direction - hypergradient| = O(1 / penalty): the slope between decades, and that it is a bias at all."""
    problem = quadratic(1, condition=4.0)
    exact = problem.hypergradient(problem.outer0)
    penalties = [30.0, 300.0, 3000.0, 30000.0]
    errors = [float(torch.linalg.vector_norm(settled(problem, penalty) - exact)) for penalty in penalties]
    assert errors[0] > 1e-3
    slopes = [math.log10(b / a) for a, b in pairwise(errors)]
    assert slopes[1:] == pytest.approx([-1, -1], abs=SLOPE)


def test_f2sa_finds_the_optimum_to_its_bias_and_a_growing_penalty_removes_it():
    problem = quadratic(2, inner_dim=6, outer_dim=3, condition=3.0)
    full = BilevelProblem(problem.inner_loss, problem.outer_loss)
    errors = {}
    for increase in (0.0, 5.0):
        method = F2SA(0.9, 0.3, 10.0, increase, inner_steps=4)
        state = method.init(problem.outer0, problem.inner0)
        for _ in range(120):
            state, _ = method.step(full, state)
        errors[increase] = float(distance(state, problem))
        assert float(state.penalty) == pytest.approx(10 + 120 * increase)
    assert errors[5.0] < errors[0.0] / 30
    assert 1e-3 < errors[0.0] < 0.5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SOBA(-0.1, 0.1), "inner_rate=-0.1"),
        (lambda: SOBA(0.1, float("nan")), "outer_rate=nan"),
        (lambda: SABA(0.1, 0.1, float("inf")), "linear_rate=inf"),
        (lambda: F2SA(0.1, 0.1, penalty=0.0), "penalty=0"),
        (lambda: F2SA(0.1, 0.1, increase=-1.0), "increase=-1"),
        (lambda: F2SA(0.1, 0.1, inner_steps=0), "at least 1"),
    ],
)
def test_arguments_that_do_not_fit(make, words):
    with pytest.raises(ValueError, match=words):
        make()
