"""Meta-gradients whose value is known: quadratic tasks, ridge regression, quadratic bilevel problems.

On L(theta, c) = theta' A theta / 2 - c' theta a step is linear in (theta, buffer), so the derivative of T steps is a
power of a matrix Z.
"""

import pytest
import torch

from theria.meta import FOMAML, MAML, SGD, FirstOrder, Higher, MixedMode, Unrolled

CLOSED = 1e-10  # float64, a closed form against at most some hundred steps
EXACT_ADJOINTS = [Unrolled(), MixedMode()]
OPTIMISERS = [SGD(0.1), SGD(0.1, momentum=0.7), SGD(0.1, momentum=0.7, nesterov=True)]


@pytest.fixture
def quadratic():
    """A (SPD), c, start, cotangent; n = 4."""
    root = torch.randn(4, 4, dtype=torch.float64)
    return (root @ root.T + torch.eye(4, dtype=torch.float64), *torch.randn(3, 4, dtype=torch.float64))


def transition(A, sgd):
    """Z of (theta, buffer), and the offset that c adds in each step, as a matrix."""
    I, mu, lr = torch.eye(len(A), dtype=A.dtype), sgd.momentum, sgd.lr
    ahead = 1 + mu if sgd.nesterov else 1.0
    carried = mu * mu if sgd.nesterov else mu
    Z = torch.cat([torch.cat([I - lr * ahead * A, -lr * carried * I], 1), torch.cat([A, mu * I], 1)])
    return Z, torch.cat([lr * ahead * I, -I])


def inner_loss(params, context):
    theta = params["theta"]
    return theta @ context["A"] @ theta / 2 - context["c"] @ theta


def solve(adjoint, sgd, steps, A, c, theta, hyper=None):
    params = {"theta": theta}
    hyper = sgd.hyper(params) if hyper is None else hyper
    return adjoint.solve(inner_loss, params, {"A": A, "c": c}, sgd, hyper, steps)["theta"]


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("sgd", OPTIMISERS, ids=["plain", "momentum", "nesterov"])
@pytest.mark.parametrize("adjoint", [*EXACT_ADJOINTS, FirstOrder()], ids=lambda a: type(a).__name__)
def test_quadratic(adjoint, sgd, steps, quadratic):
    A, c, theta, cotangent = quadratic
    final, pull = torch.func.vjp(lambda theta, c: solve(adjoint, sgd, steps, A, c, theta), theta, c)[:2]
    d_theta, d_c = pull(cotangent)

    Z, offset = transition(A, sgd)
    power, pushed, total = torch.eye(8, dtype=A.dtype), torch.cat([theta, torch.zeros_like(theta)]), 0 * offset
    for _ in range(steps):
        total = Z @ total + offset
        pushed = Z @ pushed + offset @ c
        power = Z @ power
    torch.testing.assert_close(final, pushed[:4], rtol=CLOSED, atol=CLOSED)
    if adjoint == FirstOrder():  # drops the power of Z, and everything through the data
        torch.testing.assert_close(d_theta, cotangent, rtol=CLOSED, atol=CLOSED)
        assert (d_c == 0).all()
    else:
        torch.testing.assert_close(d_theta, power[:4, :4].T @ cotangent, rtol=CLOSED, atol=CLOSED)
        torch.testing.assert_close(d_c, total[:4].T @ cotangent, rtol=CLOSED, atol=CLOSED)


@pytest.mark.parametrize("adjoint", [*EXACT_ADJOINTS, FirstOrder()], ids=lambda a: type(a).__name__)
def test_learned_rates_on_a_quadratic(adjoint, quadratic):
    """d theta_T / d r_j = - sum_t M^(T-1-t) e_j g_t[j] with M = I - diag(r) A; first order: M is the identity."""
    A, c, theta, cotangent = quadratic
    rates, steps = torch.tensor([0.05, 0.1, 0.02, 0.08], dtype=A.dtype), 5

    def outer(rates):
        return solve(adjoint, SGD(0.1, learn_lr=True), steps, A, c, theta, {"lr": {"theta": rates}}) @ cotangent

    M, g, expected = torch.eye(4, dtype=A.dtype) - rates[:, None] * A, [], torch.zeros_like(rates)
    for _ in range(steps):
        g.append(A @ theta - c)
        theta = theta - rates * g[-1]
    for t in range(steps):
        carry = torch.eye(4, dtype=A.dtype) if adjoint == FirstOrder() else M.matrix_power(steps - 1 - t)
        expected -= (carry.T @ cotangent) * g[t]
    theta = quadratic[2]
    torch.testing.assert_close(torch.func.grad(outer)(rates), expected, rtol=CLOSED, atol=CLOSED)


@pytest.mark.parametrize("adjoint", [*EXACT_ADJOINTS, FirstOrder(), Higher()], ids=lambda a: type(a).__name__)
def test_maml_on_quadratic_tasks(adjoint, quadratic):
    """Three tasks through the learner: the mean of (I - lr A)^T (A theta_T - y); first order drops the power."""
    A, _, theta, _ = quadratic
    support, query = torch.randn(2, 3, 1, 4, dtype=A.dtype)

    def loss_fn(prediction, target):
        return prediction @ A @ prediction / 2 - target[0] @ prediction

    learner = MAML(lambda params, x: params["theta"], loss_fn, SGD(0.1), 4, adjoint, params={"theta": theta})
    learner((torch.zeros(3, 1, 1), support, torch.zeros(3, 1, 1), query)).backward()

    M, expected = torch.eye(4, dtype=A.dtype) - 0.1 * A, torch.zeros(4, dtype=A.dtype)
    for c, y in zip(support[:, 0], query[:, 0], strict=True):
        adapted = theta
        for _ in range(4):
            adapted = adapted - 0.1 * (A @ adapted - c)
        outer = A @ adapted - y
        expected += (outer if adjoint == FirstOrder() else M.matrix_power(4).T @ outer) / 3
    gradient = learner.params["theta"].grad
    torch.testing.assert_close(gradient, expected, rtol=CLOSED, atol=CLOSED)
    if adjoint == FirstOrder():
        assert FOMAML(lambda params, x: params["theta"], loss_fn, params={"theta": theta}).adjoint == adjoint


@pytest.mark.parametrize("adjoint", EXACT_ADJOINTS, ids=lambda a: type(a).__name__)
def test_quadratic_bilevel_run_to_convergence(adjoint):
    """Inner z' diag(1, 4) z / 2 - x' z, outer |z - 1|^2 / 2, x = (1, 1): z* = (1, 1/4), gradient (0, -3/16)."""
    A, x = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)), torch.ones(2, dtype=torch.float64)

    def outer(x):
        z = solve(adjoint, SGD(0.4), 80, A, x, torch.zeros(2, dtype=torch.float64))
        return (z - 1).square().sum() / 2, z

    gradient, z = torch.func.grad(outer, has_aux=True)(x)
    torch.testing.assert_close(z, torch.tensor([1, 0.25], dtype=torch.float64), rtol=CLOSED, atol=CLOSED)
    torch.testing.assert_close(gradient, torch.tensor([0, -0.1875], dtype=torch.float64), rtol=CLOSED, atol=CLOSED)


@pytest.mark.parametrize("adjoint", EXACT_ADJOINTS, ids=lambda a: type(a).__name__)
def test_ridge_regression_run_to_convergence(adjoint):
    """mean r^2 / 2 + lam |w|^2 / 2: w = (X'X + n lam)^-1 X'y, dw/dlam = -n (X'X + n lam)^-1 w."""
    n, X, lam = 30, torch.randn(30, 3, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    y, cotangent = torch.randn(30, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def loss(params, context):
        return (X @ params["w"] - y).square().mean() / 2 + context * params["w"].square().sum() / 2

    def outer(lam):
        w = adjoint.solve(loss, {"w": torch.zeros(3, dtype=torch.float64)}, lam, SGD(0.5), {}, 150)["w"]
        return w @ cotangent, w

    gradient, w = torch.func.grad(outer, has_aux=True)(lam)
    normal = X.T @ X + n * lam * torch.eye(3, dtype=torch.float64)
    expected = torch.linalg.solve(normal, X.T @ y)
    torch.testing.assert_close(w, expected, rtol=CLOSED, atol=CLOSED)
    expected = -n * torch.linalg.solve(normal, expected) @ cotangent
    torch.testing.assert_close(gradient, expected, rtol=CLOSED, atol=CLOSED)
