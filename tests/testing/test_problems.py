"""The problems' exact answers against derivations that share nothing with them: autograd, unrolling, finite sums."""

import pytest
import torch

from theria.testing.problems import PROBLEMS, benchmark_quadratic, neumann, quadratic, textbook

CLOSED = 1e-10  # float64: a closed form against autograd of the losses, inner Hessians of condition 20 at most
FINITE_SAMPLES = 1e-12  # a mean of losses against the loss of the mean: the same sums in another order
DIFFERENCE = 1e-7  # central differences, step 1e-5: (1e-5)^2 times third derivatives of order 1 to 100
ROUNDED = 1e-4  # float32 autograd at the exact solution against the exact answer; condition 20

SOLVED = [name for name in PROBLEMS if PROBLEMS[name]().steps is None]
STEPPED = [name for name in PROBLEMS if name not in SOLVED]
SEEDS = [0, 1]


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SOLVED)
def test_the_solution_is_stationary_and_the_curvature_is_bounded(name, seed):
    problem = PROBLEMS[name](seed)
    x = problem.outer0
    z = problem.inner_solution(x)
    close(torch.func.grad(problem.inner_loss)(z, x), torch.zeros_like(z), CLOSED)
    H = torch.func.hessian(problem.inner_loss)(z, x).reshape(z.numel(), z.numel())
    eigenvalues = torch.linalg.eigvalsh(H)
    assert problem.least * (1 - CLOSED) <= eigenvalues[0]
    assert eigenvalues[-1] <= problem.largest * (1 + CLOSED)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SOLVED)
def test_the_hypergradient_is_the_implicit_function_theorem_by_autograd(name, seed):
    """df/dx - (d2g/dx dz) H^-1 df/dz, every factor a dense matrix of autograd."""
    problem = PROBLEMS[name](seed)
    x = problem.outer0
    z = problem.inner_solution(x)
    H = torch.func.hessian(problem.inner_loss)(z, x).reshape(z.numel(), z.numel())
    cross = torch.func.jacrev(torch.func.grad(problem.inner_loss), 1)(z, x).reshape(z.numel(), x.numel())
    d_z, d_x = torch.func.grad(problem.outer_loss, (0, 1))(z, x)
    expected = d_x.reshape(-1) - cross.T @ torch.linalg.solve(H, d_z.reshape(-1))
    close(problem.hypergradient(x).reshape(-1), expected, CLOSED)


@pytest.mark.parametrize("name", SOLVED)
def test_the_hypergradient_is_the_slope_of_the_value(name):
    problem = PROBLEMS[name](2)
    x = problem.outer0
    direction = torch.randn_like(x)
    ends = [x + sign * 1e-5 * direction for sign in (1, -1)]
    values = [problem.outer_loss(problem.inner_solution(end), end) for end in ends]
    close((problem.hypergradient(x) * direction).sum(), (values[0] - values[1]) / 2e-5, DIFFERENCE)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_after_a_number_of_steps(name, seed, elsewhere):
    problem = PROBLEMS[name](seed)

    def value(x):
        z = problem.initial(x)
        for _ in range(problem.steps_to(1e-3)):
            z = z - problem.rate * torch.func.grad(problem.inner_loss)(z, x)
        return problem.outer_loss(z, x), z

    x = problem.outer0 + elsewhere * torch.randn_like(problem.outer0)
    gradient, z = torch.func.grad(value, has_aux=True)(x)
    close(z, problem.inner_solution(x), CLOSED)
    close(gradient, problem.hypergradient(x), CLOSED)


@pytest.mark.parametrize("name", SOLVED)
def test_the_number_of_steps_suffices(name):
    problem = PROBLEMS[name]()
    z, x = problem.inner0, problem.outer0
    for _ in range(problem.steps_to(1e-10)):
        z = z - problem.rate * torch.func.grad(problem.inner_loss)(z, x)
    close(z, problem.inner_solution(x), 1e-8)


def test_the_textbook_numbers():
    problem = textbook()
    close(problem.inner_solution(problem.outer0), torch.tensor([1, 0.25], dtype=torch.float64), CLOSED)
    close(problem.hypergradient(problem.outer0), torch.tensor([0, -0.1875], dtype=torch.float64), CLOSED)


def test_the_neumann_series_tends_to_the_hypergradient_at_the_rate_of_the_contraction():
    def error(terms):
        problem = neumann(terms=terms)
        g, f, x = problem.inner_loss, problem.outer_loss, problem.outer0
        z = problem.inner0
        H = torch.func.hessian(g)(z, x)
        cross = torch.func.jacrev(torch.func.grad(g), 1)(z, x)
        exact = torch.func.grad(f, 1)(z, x) - cross.T @ torch.linalg.solve(H, torch.func.grad(f)(z, x))
        return torch.linalg.vector_norm(problem.hypergradient(x) - exact), problem.contraction

    (few, contraction), (many, _) = error(40), error(60)
    assert many < few
    assert (many / few) ** (1 / 20) == pytest.approx(contraction, rel=0.05)


@pytest.mark.parametrize("make", [quadratic, benchmark_quadratic, textbook])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_outer_solution(make, seed):
    problem = make(seed)
    close(problem.hypergradient(problem.outer_solution), torch.zeros_like(problem.outer0), CLOSED)
    hessian = [problem.hypergradient(e) - problem.hypergradient(0 * e) for e in torch.eye(len(problem.outer0)).double()]
    assert torch.linalg.eigvalsh(torch.stack(hessian))[0] > 0.01


@pytest.mark.parametrize("name", ["benchmark_quadratic", "hyper_cleaning"])
def test_the_losses_are_means_over_their_samples(name):
    problem = PROBLEMS[name](3)
    samples, z, x = problem.samples, torch.randn_like(problem.inner0), problem.outer0
    assert samples is not None
    for sample_loss, loss, n in (
        (samples.inner, problem.inner_loss, samples.n_inner),
        (samples.outer, problem.outer_loss, samples.n_outer),
    ):
        each = torch.func.vmap(lambda i, sample_loss=sample_loss: sample_loss(z, x, i))(torch.arange(n))
        close(each.mean(), loss(z, x), FINITE_SAMPLES)
        assert each.std() > 0.01
        some = torch.tensor([0, 2, 5])
        close(sample_loss(z, x, some), each[some].mean(), FINITE_SAMPLES)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_answers_are_those_of_the_rounded_data(name):
    """In float32 the exact answers belong to the float32 numbers, and losses, answers and variables keep the dtype."""
    problem = PROBLEMS[name](0, torch.float32, "cpu")
    x = problem.outer0
    z = problem.inner_solution(x)
    assert {t.dtype for t in (x, z, problem.inner0, problem.hypergradient(x), problem.inner_loss(z, x))} == {
        torch.float32
    }
    assert z.shape == problem.inner0.shape
    if problem.steps is None:
        close(torch.func.grad(problem.inner_loss)(z, x), torch.zeros_like(z), ROUNDED)


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "textbook"])
def test_the_seed_decides(name):
    first, again, other = PROBLEMS[name](4), PROBLEMS[name](4), PROBLEMS[name](5)
    assert torch.equal(first.hypergradient(first.outer0), again.hypergradient(again.outer0))
    assert not torch.equal(first.hypergradient(first.outer0), other.hypergradient(other.outer0))
