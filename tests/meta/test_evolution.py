"""PES is unbiased and truncated ES is not: means over many particles against exact gradients, within their own error.

The computation is linear in its state and theta and its losses are quadratic, so that the smoothed gradient is the
gradient: noise adds a constant to a quadratic.
"""

import math

import pytest
import torch

from theria.meta.evolution import PES, TruncatedES

PARTICLES, SIGMA, TRUNCATIONS, STEPS = 100_000, 0.3, 3, 2
DEVIATIONS = 4.5  # standard errors; of 12 checks of 2 entries one fails by chance in 10^4 seeds, and the seed is fixed
CLOSED = 1e-12  # the estimator written out as a loop: the same sums in another order

A = torch.tensor([[0.9, 0.3], [-0.2, 0.8]], dtype=torch.float64)
TARGET = torch.tensor([1.0, -2.0], dtype=torch.float64)


def unroll(state, theta):
    """Two steps of s <- A s + theta, the sum of |s - target|^2."""
    loss = torch.zeros((), dtype=torch.float64)
    for _ in range(STEPS):
        state = A @ state + theta
        loss = loss + (state - TARGET).square().sum()
    return state, loss


def start():
    return torch.tensor([0.5, -0.3], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)


def exact(theta, state, *, cut: bool):
    """The gradient of each truncation's loss in theta; with `cut`, through that truncation alone."""
    gradients = []
    for k in range(TRUNCATIONS):

        def loss(theta, k=k):
            s = state
            for _ in range(k):
                s, _ = unroll(s, theta.detach() if cut else theta)
            return unroll(s, theta)[1]

        gradients.append(torch.func.grad(loss)(theta))
    return torch.stack(gradients)


def estimates(method, seed=0):
    """The estimate of every truncation and its standard error, (truncations, 2) each."""
    theta, inner = start()
    state, generator = method.init(theta, inner), torch.Generator().manual_seed(seed)
    means, errors = [], []
    for _ in range(TRUNCATIONS):
        state, info = method.step(unroll, theta, state, generator)
        means.append(info.gradient)
        half = method.particles // 2
        each = info.losses[:, None] * state.perturbation / method.sigma**2
        pairs = (each[:half] + each[half:]) / 2  # antithetic: the pairs are independent, their halves are not
        torch.testing.assert_close(pairs.mean(0), info.gradient, rtol=1e-9, atol=1e-9)
        errors.append(pairs.std(0) / math.sqrt(half))
    return torch.stack(means), torch.stack(errors)


@pytest.mark.parametrize("seed", [0, 1])
def test_pes_is_unbiased(seed):
    """Every truncation's estimate is the gradient through the whole past, and so is their sum that of the sum."""
    theta, inner = start()
    mean, error = estimates(PES(SIGMA, PARTICLES), seed)
    expected = exact(theta, inner, cut=False)
    assert ((mean - expected).abs() < DEVIATIONS * error).all()
    assert (error < 0.05 * expected.norm(dim=1, keepdim=True)).all()  # so that the test says something


def test_truncated_es_is_biased_to_the_truncation():
    """It is the gradient of each truncation from the state that it found, which is not the wanted one."""
    theta, inner = start()
    mean, error = estimates(TruncatedES(SIGMA, PARTICLES))
    assert ((mean - exact(theta, inner, cut=True)).abs() < DEVIATIONS * error).all()
    assert ((mean - exact(theta, inner, cut=False))[1:].abs() > 20 * error[1:]).any(1).all()


def test_the_variance_of_pes_grows_with_the_truncations():
    """Loss c'theta in truncation k (from 1): a pair's estimate xi (c'eps_k) / sigma^2 has the variance k |c|^2 + c_a^2.

    That of truncated ES is the one of k = 1.
    """
    c, theta, pairs = torch.tensor([1.0, -3.0], dtype=torch.float64), start()[1], PARTICLES // 2
    for method in (PES(SIGMA, PARTICLES), TruncatedES(SIGMA, PARTICLES)):
        state, generator = method.init(theta, theta), torch.Generator().manual_seed(1)
        for k in range(1, 5):
            state, info = method.step(lambda s, theta: (s, c @ theta), theta, state, generator)
            each = info.losses[:, None] * state.perturbation / SIGMA**2
            variance = ((each[:pairs] + each[pairs:]) / 2).var(0)
            expected = (k if method.persistent else 1) * c.square().sum() + c.square()
            torch.testing.assert_close(variance, expected, rtol=0.1, atol=0)  # 50,000 pairs: 3 % is four deviations


@pytest.mark.parametrize("method", [PES, TruncatedES])
def test_the_estimate_written_out(method):
    """Equations 1 and 2 as loops over particles, on pytrees, with theta updated between the truncations."""
    n, sigma = 6, 0.2
    theta = {"a": torch.randn(2, dtype=torch.float64), "b": [torch.randn((), dtype=torch.float64)]}
    inner = (torch.randn(2, dtype=torch.float64), torch.zeros((), dtype=torch.int64))

    def run(inner, theta):
        x, count = inner
        x = torch.tanh(A @ x + theta["a"] * theta["b"][0])
        return (x, count + 1), (x - TARGET).abs().sum()

    strategy, generator, again = method(sigma, n), torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    state = strategy.init(theta, inner)
    particles = [inner] * n
    xi = [{"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}] * n
    for k in range(3):
        state, info = strategy.step(run, theta, state, generator)
        halves = {
            "a": sigma * torch.randn(n // 2, 2, generator=again, dtype=torch.float64),
            "b": sigma * torch.randn(n // 2, generator=again, dtype=torch.float64),
        }
        gradient = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
        for i in range(n):
            sign, row = (1, i) if i < n // 2 else (-1, i - n // 2)
            noise = {name: sign * half[row] for name, half in halves.items()}
            particles[i], loss = run(particles[i], {"a": theta["a"] + noise["a"], "b": [theta["b"][0] + noise["b"]]})
            xi[i] = {name: noise[name] + (xi[i][name] if method is PES else 0) for name in noise}
            for name in gradient:
                gradient[name] = gradient[name] + xi[i][name] * loss / (n * sigma**2)
            torch.testing.assert_close(state.inner[0][i], particles[i][0], rtol=CLOSED, atol=CLOSED)
            torch.testing.assert_close(info.losses[i], loss, rtol=CLOSED, atol=CLOSED)
        torch.testing.assert_close(info.gradient["a"], gradient["a"], rtol=CLOSED, atol=CLOSED)
        torch.testing.assert_close(info.gradient["b"][0], gradient["b"], rtol=CLOSED, atol=CLOSED)
        assert (state.inner[1] == k + 1).all()
        theta = {"a": theta["a"] - 0.01 * info.gradient["a"], "b": theta["b"]}


def test_pes_finds_the_optimum_that_truncated_es_misses():
    """theta* of the whole computation, by steps after every truncation; the short horizon has another optimum."""
    _, inner = start()

    def total(theta):
        s, loss = inner, torch.zeros((), dtype=torch.float64)
        for _ in range(TRUNCATIONS):
            s, part = unroll(s, theta)
            loss = loss + part
        return loss

    zero = torch.zeros(2, dtype=torch.float64)
    best = -torch.linalg.solve(torch.func.hessian(total)(zero), torch.func.grad(total)(zero))
    distance = {}
    for method in (PES(SIGMA, 2_000), TruncatedES(SIGMA, 2_000)):
        theta, generator = zero, torch.Generator().manual_seed(0)
        for _ in range(300):
            state = method.init(theta, inner)
            gradients = []
            for _ in range(TRUNCATIONS):  # theta is held for one computation, as the theory of unbiasedness has it
                state, info = method.step(unroll, theta, state, generator)
                gradients.append(info.gradient)
            theta = theta - 0.005 * torch.stack(gradients).sum(0)
        distance[type(method)] = torch.linalg.vector_norm(theta - best)
    assert distance[PES] < 0.03
    assert distance[TruncatedES] > 5 * distance[PES]


def test_constants_and_generators():
    theta, inner = start()
    theta = theta.requires_grad_()
    method = PES(0.1, 4)
    state = method.init(theta, inner)
    results = [method.step(unroll, theta, state, torch.Generator().manual_seed(5))[1].gradient for _ in range(2)]
    assert torch.equal(*results)
    assert not results[0].requires_grad
    other = method.step(unroll, theta, state, torch.Generator().manual_seed(6))[1].gradient
    assert not torch.equal(results[0], other)
    chunked = method.step(unroll, theta, state, torch.Generator().manual_seed(5), chunk_size=3)[1].gradient
    torch.testing.assert_close(chunked, results[0], rtol=CLOSED, atol=CLOSED)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PES(0.0, 4), "sigma=0.0"),
        (lambda: PES(float("nan"), 4), "sigma=nan"),
        (lambda: PES(0.1, 5), "give 6"),
        (lambda: TruncatedES(0.1, 0), "at least 2"),
        (lambda: PES(0.1, 4).step(lambda s, t: (s, t), start()[1], PES(0.1, 4).init(start()[1], start()[0])), "scalar"),
    ],
)
def test_arguments_that_do_not_fit(make, words):
    with pytest.raises(ValueError, match=words):
        make()
