"""Each algorithm on problems whose outer gradient is known.

On L(theta, c) = theta' A theta / 2 - c' theta the steps of rate a are theta_t = theta* + M^t (theta_0 - theta*), with
M = I - a A and theta* = A^-1 c.
"""

import copy
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp
from torch.nn.functional import cross_entropy, mse_loss

from theria.meta import MAML, SGD, Adjoint, FirstOrder, Higher, MixedMode, Unrolled
from theria.meta.cavia import CAVIA
from theria.meta.implicit_adjoint import Identity, Implicit
from theria.meta.maml import MetaSGD
from theria.meta.maml_plus_plus import MAMLPlusPlus, multi_step_weights
from theria.meta.optimisers import Adam, InnerOptimiser
from theria.meta.protonet import ProtoNet
from theria.meta.r2d2 import R2D2, ridge_regression
from theria.meta.reptile import Reptile
from theria.meta.solvers import CG, MINRES
from theria.meta.trajectory import trajectory
from theria.meta.truncated import Truncated
from theria.nn import MLP

CLOSED = 1e-10  # float64, a closed form against a few steps
ADJOINTS = [Unrolled(), MixedMode(), FirstOrder()]
RATE, N = 0.1, 4

Quadratic = tuple[Tensor, Tensor, Tensor, Tensor]


def close(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=CLOSED, atol=CLOSED)


def named(value: Any) -> str:
    return type(value).__name__


@pytest.fixture
def quadratic() -> Quadratic:
    """A (SPD), theta, and for T = 3 tasks the support's c and the query's y."""
    root = torch.randn(N, N, dtype=torch.float64)
    A = root @ root.T + torch.eye(N, dtype=torch.float64)
    support, query = torch.randn(2, 3, N, dtype=torch.float64)
    return A, torch.randn(N, dtype=torch.float64), support, query


def episode(support: Tensor, query: Tensor) -> tuple[Tensor, ...]:
    """Tasks of one sample, whose target is the linear term of the loss."""
    nothing = torch.zeros(len(support), 1, 1)
    return nothing, support[:, None], nothing, query[:, None]


def loss_fn(A: Tensor):
    return lambda theta, target: theta @ A @ theta / 2 - target.mean(0) @ theta


def itself(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return params["theta"]


def descend(A: Tensor, theta: Tensor, c: Tensor, steps: int) -> list[Tensor]:
    """theta_0 .. theta_T."""
    path = [theta]
    for _ in range(steps):
        path.append(path[-1] - RATE * (A @ path[-1] - c))
    return path


# ------------------------------------------------------------------------------------------------------------ Meta-SGD
def test_meta_sgd(quadratic: Quadratic) -> None:
    """theta' = theta - r o g: d/d theta = (I - diag(r) A)' G and d/dr = -G o g, with G the query gradient."""
    A, theta, support, query = quadratic
    learner = MetaSGD(itself, loss_fn(A), RATE, params={"theta": theta})
    rates = torch.tensor([0.05, 0.1, 0.02, 0.08], dtype=A.dtype)
    with torch.no_grad():
        learner.rates["lr"]["theta"].copy_(rates)  # type: ignore[index]
    learner(episode(support, query)).backward()
    d_theta, d_rates = torch.zeros_like(theta), torch.zeros_like(theta)
    for c, y in zip(support, query, strict=True):
        g = A @ theta - c
        outer = A @ (theta - rates * g) - y
        d_theta += (torch.eye(N, dtype=A.dtype) - rates[:, None] * A).T @ outer / 3
        d_rates -= outer * g / 3
    gradient = {name: p.grad for name, p in learner.named_parameters()}
    close(gradient["params.theta"], d_theta)
    close(gradient["rates.lr.theta"], d_rates)


# -------------------------------------------------------------------------------------------------------------- MAML++
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=named)
def test_multi_step_loss(adjoint: Adjoint, quadratic: Quadratic) -> None:
    """Sum over t of v_t (M^t)' (A theta_t - y); first order: the powers are the identity."""
    A, theta, support, query = quadratic
    weights, inner = [0.2, 0.0, 0.5, 0.3], SGD(RATE)
    learner = MAMLPlusPlus(
        itself, loss_fn(A), inner, 4, adjoint, params={"theta": theta}, weights=weights, first_order_epochs=0
    )
    learner(episode(support, query)).backward()
    M, expected = torch.eye(N, dtype=A.dtype) - RATE * A, torch.zeros_like(theta)
    for c, y in zip(support, query, strict=True):
        for t, (v, point) in enumerate(zip(weights, descend(A, theta, c, 4)[1:], strict=True), start=1):
            carry = torch.eye(N, dtype=A.dtype) if adjoint == FirstOrder() else M.matrix_power(t)
            expected += v * carry.T @ (A @ point - y) / 3
    close(learner.params["theta"].grad, expected)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=named)
def test_rates_of_each_step(adjoint: Adjoint, quadratic: Quadratic) -> None:
    """d/d r_s = - sum over t > s of v_t (A theta_t - y)' M_{t-1} .. M_{s+1} g_s; first order: no M."""
    A, theta, support, query = quadratic
    weights, rates = [0.3, 0.3, 0.4], torch.tensor([0.1, 0.05, 0.08], dtype=A.dtype)
    learner = MAMLPlusPlus(itself, loss_fn(A), None, 3, adjoint, params={"theta": theta}, weights=weights)
    learner.epoch = learner.first_order_epochs
    with torch.no_grad():
        learner.rates["lr"]["theta"].copy_(rates)  # type: ignore[index]
    learner(episode(support, query)).backward()
    eye, expected = torch.eye(N, dtype=A.dtype), torch.zeros(3, dtype=A.dtype)
    for c, y in zip(support, query, strict=True):
        path, gradients = [theta], []
        for rate in rates:
            gradients.append(A @ path[-1] - c)
            path.append(path[-1] - rate * gradients[-1])
        for s in range(3):
            carry = gradients[s]
            for t in range(s + 1, 4):
                expected[s] -= weights[t - 1] * (A @ path[t] - y) @ carry / 3
                if t < 3 and adjoint != FirstOrder():
                    carry = (eye - rates[t] * A) @ carry
    close(learner.rates["lr"]["theta"].grad, expected)  # type: ignore[index]


OPTIMISERS: list[InnerOptimiser] = [
    SGD(0.3),
    SGD(0.3, momentum=0.9, nesterov=True, learn_lr=True),
    SGD([0.3, 0.2, 0.1], momentum=0.5, learn_lr="tensor"),
    Adam(0.1, learn_lr=True),
]


@pytest.fixture
def classes() -> tuple[Tensor, ...]:
    x, y = torch.randn(3, 11, 2, dtype=torch.float64), torch.randint(3, (3, 11))
    return x[:, :6], y[:, :6], x[:, 6:], y[:, 6:]


def gradients(learner: nn.Module, data: tuple[Tensor, ...]) -> dict[str, Tensor]:
    learner.zero_grad()
    learner(data).backward()
    return {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("inner", OPTIMISERS, ids=["sgd", "nesterov", "per step", "adam"])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=named)
def test_maml_plus_plus_with_all_weight_on_the_last_step_is_maml(adjoint, inner, classes) -> None:
    model = MLP([2, 5, 3], activation=nn.Tanh).double()
    expected = gradients(MAML(model, cross_entropy, inner, 3, adjoint), classes)
    options: dict[str, Any] = {"first_order_epochs": 0}
    last = MAMLPlusPlus(model, cross_entropy, inner, 3, adjoint, weights=[0, 0, 1], **options)
    # The same step by step: a vanishing weight makes the learner walk the path.
    path = MAMLPlusPlus(model, cross_entropy, inner, 3, adjoint, weights=[1e-300, 0, 1], **options)
    annealed = MAMLPlusPlus(model, cross_entropy, inner, 3, adjoint, multi_step_epochs=4, **options)
    annealed.epoch = 4
    for learner in (last, path, annealed):
        actual = gradients(learner, classes)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            close(actual[name], value)


@pytest.mark.parametrize("inner", OPTIMISERS, ids=["sgd", "nesterov", "per step", "adam"])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=named)
def test_a_trajectory_is_a_solve_of_each_length(adjoint, inner) -> None:
    params = {"w": torch.randn(3, 2, dtype=torch.float64), "b": torch.randn(2, dtype=torch.float64)}
    x = torch.randn(5, 3, dtype=torch.float64)

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ p["w"] + p["b"]).sin().square().sum()

    def outer(walk):
        def function(params, x, hyper):
            return torch.stack([p["w"].pow(3).sum() + p["b"].sum() for p in walk(params, x, hyper)]).prod()

        return grad(function, (0, 1, 2))(params, x, inner.hyper(params))

    walked = outer(lambda p, x, h: trajectory(adjoint, loss, p, x, inner, h, 3))
    solved = outer(lambda p, x, h: [adjoint.solve(loss, p, x, inner, h, t) for t in (1, 2, 3)])
    torch.testing.assert_close(walked, solved, rtol=CLOSED, atol=CLOSED)


@pytest.mark.parametrize("adjoint", [Truncated(1), Implicit(MINRES()), Identity(0.1)], ids=named)
def test_a_trajectory_is_differentiated_as_its_adjoint_says_under_no_grad_too(adjoint) -> None:
    """`torch.func` differentiates inside of it; only without a derivative are the steps taken one by one."""
    p, x = {"w": torch.randn(3, dtype=torch.float64)}, torch.randn(5, 3, dtype=torch.float64)

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ p["w"] - 1).square().sum()

    def outer(walk):
        return lambda x: torch.stack([q["w"].pow(3).sum() for q in walk(x)]).sum()

    walked = outer(lambda x: trajectory(adjoint, loss, p, x, SGD(0.02), {}, 3))
    solved = outer(lambda x: [adjoint.solve(loss, p, x, SGD(0.02), {}, t) for t in (1, 2, 3)])
    with torch.no_grad():
        assert torch.equal(walked(x), solved(x))
        assert grad(walked)(x).abs().max() > 0
        assert torch.equal(grad(walked)(x), grad(solved)(x))
        assert torch.equal(jvp(walked, (x,), (x.sin(),))[1], jvp(solved, (x,), (x.sin(),))[1])


@pytest.mark.parametrize(
    ("adjoint", "same"),
    [(Truncated(9), Unrolled()), (Truncated(0), FirstOrder()), (Higher(), Unrolled()), (Unrolled(2), Unrolled())],
    ids=["truncated", "none", "higher", "checkpoints"],
)
def test_adjoints_that_must_agree_agree_on_the_path(adjoint, same, classes) -> None:
    model = MLP([2, 5, 3], activation=nn.Tanh).double()
    actual, expected = (
        gradients(MAMLPlusPlus(model, cross_entropy, SGD(0.3, learn_lr=True), 3, a, first_order_epochs=0), classes)
        for a in (adjoint, same)
    )
    for name, value in expected.items():
        close(actual[name], value)


def test_annealing_follows_the_epoch(quadratic: Quadratic, classes: tuple[Tensor, ...]) -> None:
    assert multi_step_weights(4, 0, 10) == [0.25] * 4
    assert multi_step_weights(4, 5, 10) == pytest.approx([0.125, 0.125, 0.125, 0.625])
    assert multi_step_weights(4, 10, 10) == multi_step_weights(4, 99, 10) == multi_step_weights(4, 0, 0) == [0, 0, 0, 1]
    assert multi_step_weights(1, 0, 10) == [1]
    model = MLP([2, 5, 3], activation=nn.Tanh).double()
    learner = MAMLPlusPlus(model, cross_entropy, SGD(0.5), 2, MixedMode(), multi_step_epochs=3, first_order_epochs=2)
    for epoch, adjoint in ((0, FirstOrder()), (1, FirstOrder()), (2, MixedMode()), (3, MixedMode())):
        learner.epoch = epoch
        fixed = MAMLPlusPlus(
            model, cross_entropy, SGD(0.5), 2, adjoint, weights=multi_step_weights(2, epoch, 3), first_order_epochs=0
        )
        expected = gradients(fixed, classes)
        for name, value in gradients(learner, classes).items():
            close(value, expected[name])
        opposite = Unrolled() if adjoint == FirstOrder() else FirstOrder()
        other = gradients(
            MAMLPlusPlus(model, cross_entropy, SGD(0.5), 2, opposite, weights=fixed.weights, first_order_epochs=0),
            classes,
        )
        difference = [(g - other[name]).abs().max() for name, g in expected.items()]
        assert max(difference) > 1e-4  # first and second order are told apart
    twin = copy.deepcopy(learner)
    twin.epoch = 0
    twin.load_state_dict(learner.state_dict())
    assert twin.epoch == 3


# ------------------------------------------------------------------------------------------------------------- Reptile
@pytest.mark.parametrize("steps", [1, 5])
def test_reptile(steps: int, quadratic: Quadratic) -> None:
    """(theta_0 - theta_T) / a = (I - M^T)(theta_0 - theta*) / a, the mean over tasks; then Algorithm 2 by SGD."""
    A, theta, support, query = quadratic
    M = torch.eye(N, dtype=A.dtype) - RATE * A
    for use_queries in (False, True):
        # The loss is linear in its targets: of support and query together it is that of their mean.
        targets = (support + query) / 2 if use_queries else support
        centres = torch.linalg.solve(A, targets.T).T
        moved = torch.stack([centre + M.matrix_power(steps) @ (theta - centre) for centre in centres])
        learner = Reptile(
            itself, loss_fn(A), SGD(RATE), steps, params={"theta": theta.clone()}, use_queries=use_queries
        )
        loss = learner(episode(support, query))
        loss.backward()
        close(loss.detach(), (theta - moved).square().sum(1).mean() / (2 * RATE))
        close(learner.params["theta"].grad, (theta - moved).mean(0) / RATE)
        torch.optim.SGD(learner.parameters(), lr=0.5 * RATE).step()
        close(learner.params["theta"].detach(), theta + 0.5 * (moved - theta).mean(0))


def test_reptile_with_another_optimiser_and_alpha(classes: tuple[Tensor, ...]) -> None:
    model = MLP([2, 5, 3], activation=nn.Tanh).double()
    learner = Reptile(model, cross_entropy, Adam(0.05), 3, alpha=0.2, use_queries=False)
    actual = gradients(learner, classes)
    for name, p in model.named_parameters():
        final = [learner.adapt(sx, sy)[name] for sx, sy in zip(*classes[:2], strict=True)]
        close(actual[f"model.{name}"], (p - torch.stack(final)).detach().mean(0) / 0.2)


# --------------------------------------------------------------------------------------------------------------- CAVIA
@pytest.mark.parametrize(
    ("adjoint", "steps"),
    [*product(ADJOINTS, (1, 6)), (Implicit(CG(rtol=1e-13)), 120)],
    ids=lambda value: named(value) if isinstance(value, Adjoint) else str(value),
)
def test_cavia_with_a_context_that_is_a_bias(adjoint: Adjoint, steps: int) -> None:
    """f = x.w + phi with the mean squared error: phi_T = k mean(y - x.w), k = 1 - (1 - 2a)^T, over the support.

    The outer gradient is 2 mean over the queries of r (x - k mean(x_support)); first order: k = 0 in the bracket.
    """
    w = torch.randn(3, dtype=torch.float64)
    x, y = torch.randn(4, 9, 3, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    sx, sy, qx, qy = x[:, :5], y[:, :5], x[:, 5:], y[:, 5:]

    learner = CAVIA(lambda p, x, c: x @ p["w"] + c, mse_loss, 1, SGD(RATE), steps, adjoint, params={"w": w})
    learner((sx, sy, qx, qy), batched=True).backward()
    k = 1 - (1 - 2 * RATE) ** steps
    phi = k * (sy - sx @ w).mean(1, keepdim=True)
    residual = qx @ w + phi - qy
    carried = 0.0 if adjoint == FirstOrder() else k
    expected = 2 * (residual[..., None] * (qx - carried * sx.mean(1, keepdim=True))).mean(1)
    close(learner.params["w"].grad, expected.mean(0))
    for t in range(4):
        close(learner.adapt(sx[t], sy[t])["context"].detach(), phi[t])


# ------------------------------------------------------------------------------------------------------------ ProtoNet
def test_protonet_is_a_linear_classifier(classes: tuple[Tensor, ...]) -> None:
    """Weights 2 c_k, biases -|c_k|^2 (section 2.4): the same softmax, loss and gradient in the embedding."""
    sx, _, qx, qy = classes
    sy = torch.tensor([[0, 1, 2, 2, 1, 2]] * 3)
    model = MLP([2, 5, 4], activation=nn.Tanh).double()
    learner = ProtoNet(model, ways=3)
    actual = gradients(learner, (sx, sy, qx, qy))
    model.zero_grad()
    losses = []
    for t in range(3):
        h = model(sx[t])
        c = torch.stack([h[sy[t] == k].mean(0) for k in range(3)])
        close(learner.adapt(sx[t], sy[t])["prototypes"], c)
        logits = model(qx[t]) @ (2 * c).T - c.square().sum(1)
        close(learner.predict((sx[t], sy[t], qx[t], qy[t])).log_softmax(-1), logits.log_softmax(-1))
        distances = torch.cdist(model(qx[t]), c, compute_mode="donot_use_mm_for_euclid_dist")
        close(learner.predict((sx[t], sy[t], qx[t], qy[t])), -distances.square())
        losses.append(cross_entropy(logits, qy[t]))
    torch.stack(losses).mean().backward()
    for name, p in model.named_parameters():
        close(actual[f"model.{name}"], p.grad if p.grad is not None else torch.zeros_like(p))


# ---------------------------------------------------------------------------------------------------------------- R2D2
@pytest.mark.parametrize(("samples", "width"), [(5, 12), (12, 5), (6, 6)])
def test_ridge_regression_is_least_squares_with_more_rows(samples: int, width: int) -> None:
    """numpy's least squares of [X; sqrt(lambda) I] W = [Y; 0]; and d W / d lambda = -(X'X + lambda I)^-1 W."""
    x, y = torch.randn(samples, width, dtype=torch.float64), torch.randn(samples, 3, dtype=torch.float64)
    strength = torch.tensor(0.7, dtype=torch.float64)
    rows = np.concatenate([x.numpy(), np.sqrt(0.7) * np.eye(width)])
    expected = np.linalg.lstsq(rows, np.concatenate([y.numpy(), np.zeros((width, 3))]), rcond=None)[0]
    close(ridge_regression(x, y, strength), torch.from_numpy(expected))
    tangent = torch.func.jacrev(ridge_regression, 2)(x, y, strength)
    normal = x.T @ x + 0.7 * torch.eye(width, dtype=torch.float64)
    close(tangent, -torch.linalg.solve(normal, torch.from_numpy(expected)))
    arguments = (x.requires_grad_(), y.requires_grad_(), strength.requires_grad_())
    assert torch.autograd.gradcheck(ridge_regression, arguments)
    assert torch.autograd.gradgradcheck(ridge_regression, arguments)


def test_r2d2_by_hand(classes: tuple[Tensor, ...]) -> None:
    model = MLP([2, 5, 8], activation=nn.Tanh).double()
    learner = R2D2(model, cross_entropy, ways=3, ridge=0.3)
    with torch.no_grad():
        learner.alpha.fill_(1.7)
        learner.beta.fill_(-0.4)
    for sx, sy, qx, qy in zip(*classes, strict=True):
        x, y = model(sx).detach().numpy(), np.eye(3)[sy.numpy()]
        w = np.linalg.solve(x.T @ x + 0.3 * np.eye(8), x.T @ y)
        expected = 1.7 * model(qx).detach().numpy() @ w - 0.4
        close(learner.predict((sx, sy, qx, qy)).detach(), torch.from_numpy(expected))
        close(learner.adapt(sx, sy)["weight"].detach(), torch.from_numpy(w))
