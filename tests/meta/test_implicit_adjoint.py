"""The adjoints Implicit and Identity: closed forms of bilevel problems, tasks, orders, failures, memory."""

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils import _pytree as pytree

from theria.meta import MAML, SGD, Unrolled
from theria.meta.implicit import Inexact, IterationError
from theria.meta.implicit_adjoint import Identity, Implicit
from theria.meta.solvers import CG, Neumann, SolverError
from theria.nn import MLP
from theria.testing.memory import PeakMemory

EXACT = 1e-10  # float64, inner problems solved to rounding, linear systems to 1e-13 with condition numbers below 1e2
TIGHT = Implicit(CG(rtol=1e-13), tolerance=1e-11)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(actual, expected, tol=EXACT):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def spd(n: int, low: float, high: float, seed: int = 0) -> Tensor:
    Q = torch.linalg.qr(randn(n, n, seed=seed))[0]
    return (Q * torch.linspace(low, high, n, dtype=torch.float64)) @ Q.mT


# --- closed forms ------------------------------------------------------------------------------------------------


def test_quadratic_bilevel_problem():
    """Outer 1/2 |z* - 1|^2, inner 1/2 z'diag(1, 4)z - x'z, x = (1, 1): z* = (1, 1/4), gradient (0, -3/16)."""
    H = torch.tensor([1.0, 4.0], dtype=torch.float64)

    def outer(x: Tensor) -> tuple[Tensor, Tensor]:
        z = TIGHT.solve(
            lambda p, x: 0.5 * (H * p["z"].square()).sum() - x @ p["z"],
            {"z": torch.zeros(2, dtype=torch.float64)}, x, SGD(0.4), {}, 60,
        )["z"]  # fmt: skip
        return 0.5 * (z - 1).square().sum(), z

    x = torch.ones(2, dtype=torch.float64)
    gradient, z = grad(outer, has_aux=True)(x)
    close(z, torch.tensor([1.0, 0.25], dtype=torch.float64))
    close(gradient, torch.tensor([0.0, -0.1875], dtype=torch.float64))
    close(hessian(lambda x: outer(x)[0])(x), torch.diag(1 / H**2))


X, Y = randn(20, 4), randn(20, seed=1)


def ridge_loss(params, context):
    """1/2 mean r^2 + 1/2 lambda |w|^2."""
    X, lam = context
    return 0.5 * (X @ params["w"] - Y).square().mean() + 0.5 * lam * params["w"].square().sum()


def ridge(adjoint, steps: int = 250):
    start = {"w": torch.zeros(4, dtype=torch.float64)}
    return lambda X, lam: adjoint.solve(ridge_loss, start, (X, lam), SGD(0.5), {}, steps)["w"]


def ridge_in_closed_form(X: Tensor, lam: Tensor) -> Tensor:
    return torch.linalg.inv(X.mT @ X + 20 * lam * torch.eye(4, dtype=torch.float64)) @ (X.mT @ Y)


LAM = torch.tensor(0.3, dtype=torch.float64)


@pytest.mark.parametrize(
    "differentiate",
    [
        jacrev,
        jacfwd,
        hessian,
        lambda f, i: jacrev(jacrev(f, i), i),
        lambda f, i: jacrev(jacfwd(f, i), i),
        lambda f, i: jacfwd(jacfwd(f, i), i),
    ],
    ids=["jacrev", "jacfwd", "hessian", "reverse_reverse", "reverse_forward", "forward_forward"],
)
def test_ridge_regression_to_second_order(differentiate):
    actual = differentiate(ridge(TIGHT), (0, 1))(X, LAM)
    expected = differentiate(ridge_in_closed_form, (0, 1))(X, LAM)
    for a, b in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        close(a, b)


def test_ridge_derivative_in_lambda():
    """dw/dlambda = -n (X'X + n lambda I)^-1 w."""
    w = ridge(TIGHT)(X, LAM)
    A = X.mT @ X + 20 * LAM * torch.eye(4, dtype=torch.float64)
    close(jvp(lambda lam: ridge(TIGHT)(X, lam), (LAM,), (torch.ones_like(LAM),))[1], -20 * torch.linalg.inv(A) @ w)


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_imaml_operator(strength):
    """d phi* / d theta = lambda (H + lambda I)^-1 for a quadratic loss with a proximal term around theta."""
    H, b, theta = spd(5, 0.5, 3), randn(5, seed=1), randn(5, seed=2)

    def loss(phi, context):
        theta, strength = context
        quadratic = 0.5 * phi["p"] @ H @ phi["p"] - b @ phi["p"]
        return quadratic + 0.5 * strength * (phi["p"] - theta).square().sum()

    def solve(theta: Tensor) -> Tensor:
        return TIGHT.solve(loss, {"p": theta}, (theta, strength), SGD(0.3), {}, 150)["p"]

    expected = strength * torch.linalg.inv(H + strength * torch.eye(5, dtype=torch.float64))
    close(jacrev(solve)(theta), expected)
    close(jacfwd(solve)(theta), expected)


def test_tasks_under_vmap_equal_the_loop_and_unrolling():
    Xs, lams = torch.stack([X, 1.2 * X, X.cos()]), torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)

    def outer(adjoint):
        return lambda X, lam: ridge(adjoint)(X, lam).sin().sum()

    together = vmap(grad(outer(TIGHT), (0, 1)))(Xs, lams)
    for i in range(3):
        alone = grad(outer(TIGHT), (0, 1))(Xs[i], lams[i])
        for a, b in zip(together, alone, strict=True):
            close(a[i], b)
    total = grad(lambda X, lam: vmap(outer(TIGHT))(X, lam).sum(), (0, 1))(Xs, lams)
    unrolled = grad(lambda X, lam: vmap(outer(Unrolled()))(X, lam).sum(), (0, 1))(Xs, lams)
    for a, b, c in zip(total, together, unrolled, strict=True):
        close(a, b)
        close(a, c)  # the steps have converged to rounding, and so has their derivative
    leaves = Xs.clone().requires_grad_(), lams.clone().requires_grad_()
    for a, b in zip(torch.autograd.grad(vmap(outer(TIGHT))(*leaves).sum(), leaves), total, strict=True):
        close(a, b)


# --- what has no derivative, and what an approximation is ----------------------------------------------------------


def test_initial_parameters_and_rates_have_no_derivative():
    sgd = SGD(0.3, learn_lr=True)

    def solve(start, rates, lam):
        return Implicit().solve(ridge_loss, {"w": start}, (X, lam), sgd, {"lr": {"w": rates}}, 100)["w"].sum()

    start = torch.ones(4, dtype=torch.float64)
    gradients = grad(solve, (0, 1, 2))(start, 0.3 * start, LAM)
    assert (gradients[0] == 0).all()
    assert (gradients[1] == 0).all()
    assert gradients[2].abs() > 1e-3


def test_identity_is_the_last_step_at_the_minimum():
    star = {"w": ridge_in_closed_form(X, LAM)}

    def step(X, lam):
        return Unrolled().solve(ridge_loss, star, (X, lam), SGD(0.25), {}, 1)["w"].sin().sum()

    def identity(X, lam):
        return Identity(0.25, tolerance=1e-11).solve(ridge_loss, star, (X, lam), SGD(0.25), {}, 1)["w"].sin().sum()

    for a, b in zip(grad(identity, (0, 1))(X, LAM), grad(step, (0, 1))(X, LAM), strict=True):
        close(a, b)
    close(jvp(lambda lam: identity(X, lam), (LAM,), (LAM,))[1], grad(step, 1)(X, LAM) * LAM)


def test_neumann_with_k_terms_is_k_plus_1_unrolled_steps_at_the_minimum():
    """(I - eta H)^j summed up to j = K, times eta: the reverse of the last K + 1 steps of rate eta."""
    star, eta = {"w": ridge_in_closed_form(X, LAM)}, 0.25
    for K in range(4):
        adjoint = Implicit(Inexact(Neumann(scale=eta, rtol=0.0, max_iterations=K + 1, check_every=None)))

        def outer(lam, adjoint=adjoint, steps=1):
            return adjoint.solve(ridge_loss, star, (X, lam), SGD(eta), {}, steps)["w"].sin().sum()

        close(grad(outer)(LAM), grad(lambda lam, s=K + 1, f=outer: f(lam, Unrolled(), s))(LAM))


def test_implicit_approaches_unrolling_as_the_steps_do():
    """Logistic regression: the error is that of the inner solution, and vanishes with it, linearly in the steps."""
    labels = (Y > 0).double()

    def loss(params, context):
        weights, strength = context
        z = X @ params["w"]
        fit = torch.nn.functional.softplus(z) - labels * z
        return fit @ weights + strength * params["w"].square().sum()

    def outer(adjoint, steps):
        def function(weights, strength):
            start = {"w": torch.zeros(4, dtype=torch.float64)}
            return adjoint.solve(loss, start, (weights, strength), SGD(1.0), {}, steps)["w"].sin().sum()

        return function

    arguments = torch.full((20,), 0.05, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    exact = torch.cat([g.reshape(-1) for g in grad(outer(Unrolled(), 150), (0, 1))(*arguments)])
    errors = []
    for steps in (10, 20, 40, 150):
        gradient = grad(outer(Implicit(CG(rtol=1e-13)), steps), (0, 1))(*arguments)
        errors.append((torch.cat([g.reshape(-1) for g in gradient]) - exact).norm().item())
    assert exact.norm() > 0.1
    assert 1e-3 < errors[0] < 1
    assert errors[2] / errors[1] < 2 * (errors[1] / errors[0]) ** 2
    assert errors[3] < EXACT


def test_maml_with_an_implicit_adjoint():
    """A learner whose adapted part is fitted to the minimum: the gradient of the rest is that of long unrolling."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()

    def loss_fn(prediction, target):  # its Hessian in the last bias is 2, so that one step of rate 1/2 is the minimum
        return (prediction - target).square().mean()

    episode = randn(3, 12, 2), randn(3, 12, 1, seed=1), randn(3, 8, 2, seed=2), randn(3, 8, 1, seed=3)
    gradients = []
    for adjoint in (Implicit(CG(rtol=1e-12)), Unrolled()):
        learner = MAML(model, loss_fn, inner=SGD(0.5), steps=2, adjoint=adjoint, adapt="2.bias")
        loss = learner(episode)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())[:2]))
    for a, b in zip(*gradients, strict=True):
        assert b.abs().max() > 1e-3
        close(a, b)


def test_memory_does_not_depend_on_the_steps():
    """Nor on more activations than those of one Hessian product; unrolling keeps those of every step."""
    torch.manual_seed(0)
    model = MLP([4, 16, 16, 2]).double()
    x, y = randn(400, 4), randn(400, 2, seed=1)

    def peak(adjoint, steps: int) -> int:
        learner = MAML(model, lambda p, t: (p - t).square().mean(), SGD(0.01), steps, adjoint, adapt="head")
        with PeakMemory() as memory:
            learner((x, y, x[:5], y[:5])).backward()
        return memory.peak

    approximate = Implicit(Inexact(CG(max_iterations=5)))
    few, many = peak(approximate, 2), peak(approximate, 20)
    assert abs(many - few) < 2000  # bytes: no step leaves anything behind
    assert peak(Unrolled(), 20) > 3 * many


# --- failures --------------------------------------------------------------------------------------------------------


def test_negative_curvature_surfaces():
    """theta = 0 is a stationary point of -theta^2 + theta^4 / 2, a maximum."""

    def loss(params, c):
        return (-params["p"].square() + params["p"].pow(4) / 2 - 0 * c).sum() - c @ params["p"] * 1e-3

    def solve(adjoint, c):
        return adjoint.solve(loss, {"p": torch.zeros(2, dtype=torch.float64)}, c, SGD(1e-6), {}, 1)["p"].sum()

    c = torch.ones(2, dtype=torch.float64, requires_grad=True)
    value = solve(Implicit(), c)  # without a tolerance the forward pass does not look
    with pytest.raises(SolverError, match="indefinite"):
        value.backward()
    assert torch.autograd.grad(solve(Implicit(throw=False), c), c)[0].isnan().all()
    with pytest.raises(SolverError, match="indefinite"):
        jvp(lambda c: solve(Implicit(), c), (c.detach(),), (c.detach(),))


def test_the_tolerance_looks_at_the_inner_gradient():
    message = r"the inner problem did not converge.*residual \d\.\d+e-03 after 5 iterations"
    with pytest.raises(IterationError, match=message):
        ridge(Implicit(tolerance=1e-6), steps=5)(X, LAM)
    close(ridge(Implicit(tolerance=1.0), steps=5)(X, LAM), ridge(Unrolled(), steps=5)(X, LAM))
    Xs = torch.stack([X, 0.1 * X])  # the second converges slowly
    values = vmap(ridge(Implicit(tolerance=1e-6, throw=False), steps=60), in_dims=(0, None))(Xs, torch.tensor(0.02))
    assert values.isnan().all(1).tolist() == [False, True]
    with pytest.raises(IterationError, match="1 of 2 tasks, the first of them task 1"):
        vmap(ridge(Implicit(tolerance=1e-6), steps=60), in_dims=(0, None))(Xs, torch.tensor(0.02))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Implicit(tolerance=-1.0), "tolerance=-1.0"),
        (lambda: Identity(0.0), "scale=0.0"),
        (lambda: Identity(tolerance=float("nan")), "tolerance=nan"),
    ],
)
def test_arguments_that_do_not_fit(make, words):
    with pytest.raises(ValueError, match=words):
        make()
