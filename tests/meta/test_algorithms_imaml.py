"""iMAML: the implicit derivative of the proximal problem, and what says that it is not one.

On L(theta, c) = theta' A theta / 2 - c' theta: phi* = (A + s I)^-1 (c + s theta), d phi*/d theta = s (A + s I)^-1.
"""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad
from torch.nn.functional import cross_entropy

from theria.meta import MAML, SGD, Adjoint, FirstOrder, MixedMode, Unrolled
from theria.meta.imaml import IMAML
from theria.meta.implicit_adjoint import Implicit
from theria.meta.solvers import CG, MINRES, Result, SolverError
from theria.nn import MLP

CLOSED = 1e-10  # float64; the inner problems are run to 1e-14, the linear solves to 1e-13
EXACT = 1e-10  # the same derivative in another order of sums
STRENGTH, N = 1.5, 5
TIGHT = CG(rtol=1e-13)


def close(actual: Tensor | None, expected: Tensor, tol: float = CLOSED) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def quadratic_learner(A: Tensor, params: dict[str, Tensor], adjoint: Adjoint, **options: Any) -> IMAML:
    """The loss of theta = the parameters in a row; the target is the linear term."""

    def loss_fn(theta: Tensor, target: Tensor) -> Tensor:
        return theta @ A @ theta / 2 - target[0] @ theta

    settings: dict[str, Any] = {"strength": STRENGTH, "steps": 40, "tol": 1e-12, **options}
    eigenvalues = torch.linalg.eigvalsh(A) + settings["strength"]
    rate = 2 / float(eigenvalues[0].abs() + eigenvalues[-1])  # the fastest
    names = list(params)
    return IMAML(
        lambda p, x: torch.cat([p[name] for name in names]),
        loss_fn,
        SGD(rate),
        adjoint=adjoint,
        params=params,
        **settings,
    )


@pytest.fixture
def A() -> Tensor:
    """Eigenvalues 0.5 to 3: the inner problem contracts by 0.4 in each step."""
    axes = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64))[0]
    return axes @ torch.diag(torch.linspace(0.5, 3, N, dtype=torch.float64)) @ axes.T


@pytest.fixture
def quadratics() -> tuple[Tensor, ...]:
    """Three tasks: the linear terms of support and query."""
    support, query = torch.randn(2, 3, 1, N, dtype=torch.float64)
    return torch.zeros(3, 1, 1), support, torch.zeros(3, 1, 1), query


EXACT_ADJOINTS = [Implicit(TIGHT), Implicit(MINRES(rtol=1e-13)), Unrolled(), MixedMode()]


@pytest.mark.parametrize("adjoint", EXACT_ADJOINTS, ids=["cg", "minres", "unrolled", "mixed"])
def test_quadratic_tasks(adjoint: Adjoint, A: Tensor, quadratics: tuple[Tensor, ...]) -> None:
    theta = torch.randn(N, dtype=torch.float64)
    learner = quadratic_learner(A, {"theta": theta}, adjoint)
    loss = learner(quadratics)
    loss.backward()
    regularised = A + STRENGTH * torch.eye(N, dtype=A.dtype)
    value, expected = torch.zeros((), dtype=A.dtype), torch.zeros_like(theta)
    for c, y in zip(quadratics[1][:, 0], quadratics[3][:, 0], strict=True):
        phi = torch.linalg.solve(regularised, c + STRENGTH * theta)
        value += (phi @ A @ phi / 2 - y @ phi) / 3
        expected += STRENGTH * torch.linalg.solve(regularised, A @ phi - y) / 3
    close(loss.detach(), value)
    close(learner.params["theta"].grad, expected)
    assert learner.stationarity(quadratics).shape == (3,)
    assert learner.stationarity(quadratics).max() < 1e-12


@pytest.mark.parametrize("adjoint", [Implicit(TIGHT), Unrolled()], ids=["cg", "unrolled"])
def test_parameters_that_are_not_adapted(adjoint: Adjoint, A: Tensor, quadratics: tuple[Tensor, ...]) -> None:
    """With theta = (p, f) and only p adapted: d phi_p / d f = -(A_pp + s I)^-1 A_pf, and f has its direct gradient."""
    p, f = torch.randn(3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    learner = quadratic_learner(A, {"p": p, "f": f}, adjoint, adapt="p")
    learner(quadratics).backward()
    regularised = A[:3, :3] + STRENGTH * torch.eye(3, dtype=A.dtype)
    d_p, d_f = torch.zeros_like(p), torch.zeros_like(f)
    for c, y in zip(quadratics[1][:, 0], quadratics[3][:, 0], strict=True):
        phi = torch.linalg.solve(regularised, c[:3] - A[:3, 3:] @ f + STRENGTH * p)
        outer = A @ torch.cat([phi, f]) - y
        v = torch.linalg.solve(regularised, outer[:3])
        d_p += STRENGTH * v / 3
        d_f += (outer[3:] - A[3:, :3] @ v) / 3
    close(learner.params["p"].grad, d_p)
    close(learner.params["f"].grad, d_f)


def test_a_strong_pull_leaves_the_first_order_gradient_at_theta(A: Tensor, quadratics: tuple[Tensor, ...]) -> None:
    """s -> infinity: phi* -> theta and the derivative the identity, off by O(|A| / s)."""
    theta, strength = torch.randn(N, dtype=torch.float64), 1e7
    learner = quadratic_learner(A, {"theta": theta}, Implicit(TIGHT), strength=strength, tol=1e-9)
    learner(quadratics).backward()
    expected = A @ theta - quadratics[3][:, 0].mean(0)
    close(learner.params["theta"].grad, expected, tol=1e-4)


def test_maml_takes_an_implicit_adjoint_for_what_is_not_adapted(A: Tensor, quadratics: tuple[Tensor, ...]) -> None:
    """p at its minimum given f: d p / d f = -A_pp^-1 A_pf; the start of p has the derivative 0."""
    params = {"p": torch.randn(3, dtype=torch.float64), "f": torch.randn(2, dtype=torch.float64)}

    def loss_fn(theta: Tensor, target: Tensor) -> Tensor:
        return theta @ A @ theta / 2 - target[0] @ theta

    learner = MAML(
        lambda p, x: torch.cat([p["p"], p["f"]]), loss_fn, SGD(0.5), 150, Implicit(TIGHT), adapt="p", params=params
    )
    learner(quadratics).backward()
    expected = torch.zeros(2, dtype=A.dtype)
    for c, y in zip(quadratics[1][:, 0], quadratics[3][:, 0], strict=True):
        phi = torch.linalg.solve(A[:3, :3], c[:3] - A[:3, 3:] @ params["f"])
        outer = A @ torch.cat([phi, params["f"]]) - y
        expected += (outer[3:] - A[3:, :3] @ torch.linalg.solve(A[:3, :3], outer[:3])) / 3
    close(learner.params["f"].grad, expected)
    start = learner.params["p"].grad
    assert start is None or (start == 0).all()


# ------------------------------------------------------------------------------------------------------------ networks
def network() -> MLP:
    return MLP([2, 5, 3], activation=nn.Tanh).double()


def learner_of(model: nn.Module, adjoint: Adjoint | None = None, **options: Any) -> IMAML:
    return IMAML(model, cross_entropy, SGD(0.4), 60, adjoint or Implicit(TIGHT), **{"strength": 2.0, **options})


@pytest.fixture
def classes() -> tuple[Tensor, ...]:
    x, y = torch.randn(3, 11, 2, dtype=torch.float64), torch.randint(3, (3, 11))
    return x[:, :6], y[:, :6], x[:, 6:], y[:, 6:]


def test_a_network_agrees_with_unrolling_to_convergence_and_with_the_loop(classes: tuple[Tensor, ...]) -> None:
    model = network()

    def gradient(learner: IMAML) -> dict[str, Tensor]:
        learner.zero_grad()
        learner(classes).backward()
        return {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}

    learner = learner_of(model)
    expected = gradient(learner)
    for other in (learner_of(model, Unrolled()), learner_of(model, chunk_size=2)):
        for name, g in gradient(other).items():
            close(g, expected[name])
    meta: dict[str, Tensor] = dict(learner.named_parameters())

    def loop(meta: dict[str, Tensor]) -> Tensor:
        return torch.stack([learner.outer_loss(meta, task) for task in zip(*classes, strict=True)]).mean()

    for derivative in (grad(loop)(meta), grad(learner.outer_loss)(meta, classes)):
        for name, g in derivative.items():
            close(g.detach(), expected[name], EXACT)
    first = gradient(learner_of(model, FirstOrder()))
    assert max((first[name] - g).abs().max() for name, g in expected.items()) > 1e-3
    copied = gradient(copy.deepcopy(learner))
    assert all(torch.equal(copied[name], g) for name, g in expected.items())


def test_predictions_are_at_the_minimum(classes: tuple[Tensor, ...]) -> None:
    learner = learner_of(network())
    assert learner.predict(classes).shape == (3, 5, 3)
    adapted = learner.adapt(classes[0][0], classes[1][0])
    theta = dict(learner.model.named_parameters())

    def proximal(phi: dict[str, Tensor]) -> Tensor:
        loss = cross_entropy(torch.func.functional_call(learner.model, phi, (classes[0][0],)), classes[1][0])
        return loss + torch.stack([(phi[name] - p).square().sum() for name, p in theta.items()]).sum()

    residual = grad(proximal)({name: p.detach() for name, p in adapted.items()})
    assert max(g.abs().max() for g in residual.values()) < CLOSED
    close(learner.predict(classes, steps=0), learner.model(classes[2]))


# ------------------------------------------------------------------------------------------------- what is no solution
def test_an_inner_problem_that_is_not_solved_is_an_error(classes: tuple[Tensor, ...]) -> None:
    learner = IMAML(network(), cross_entropy, SGD(0.01), 2)
    ratios = learner.stationarity(classes)
    assert ratios.shape == (3,)
    assert ratios.min() > 0.5
    with pytest.raises(RuntimeError, match=r"after 2 inner steps .* is 0\.\d+ of what it was .* larger strength"):
        learner(classes)
    with pytest.raises(RuntimeError, match="after 2 inner steps"):
        grad(learner.outer_loss)(dict(learner.named_parameters()), classes)
    learner.tol = None
    learner(classes).backward()
    diverging = IMAML(network(), cross_entropy, SGD(50.0), 300, strength=2.0)
    with pytest.raises(RuntimeError, match=r"is (nan|inf|\d)"):
        diverging(classes)


def test_without_throw_a_task_that_is_not_solved_is_nan_and_no_other(A: Tensor, quadratics: tuple[Tensor, ...]) -> None:
    """One step of gradient descent leaves I - rate (A + s I) of a gradient: here too much of one task's, not of all."""
    theta = torch.randn(N, dtype=torch.float64)
    silent = quadratic_learner(A, {"theta": theta}, Implicit(TIGHT, throw=False), steps=1, tol=None)
    ratios = silent.stationarity(quadratics)
    silent.tol = float(ratios.sort().values[1:].mean())  # between the worst and the others
    for index in range(3):
        task = tuple(field[index : index + 1] for field in quadratics)
        silent.zero_grad()
        loss = silent(task)
        loss.backward()
        exact = quadratic_learner(A, {"theta": theta}, Implicit(TIGHT), steps=1, tol=None)
        expected = exact(task)
        expected.backward()
        solved = bool(ratios[index] <= silent.tol)
        assert solved == (index != int(ratios.argmax()))
        factor = 1.0 if solved else math.nan
        torch.testing.assert_close(loss, factor * expected, equal_nan=True)
        gradients = silent.params["theta"].grad, exact.params["theta"].grad
        torch.testing.assert_close(gradients[0], factor * gradients[1], equal_nan=True)
    loud = quadratic_learner(A, {"theta": theta}, Implicit(TIGHT), steps=1, tol=silent.tol)
    with pytest.raises(SolverError, match="after 1 inner steps") as caught:
        loud(quadratics)
    assert caught.value.residual == pytest.approx(float(ratios.max()))


def test_negative_curvature_is_a_solver_error_with_advice() -> None:
    """A has the eigenvalue -4 and the strength is 1: no minimum, and one task of three would do to say so."""
    A = torch.diag(torch.tensor([3.0, 1.0, -4.0], dtype=torch.float64))
    episode = (torch.zeros(3, 1, 1), torch.randn(3, 1, 3).double(), torch.zeros(3, 1, 1), torch.randn(3, 1, 3).double())
    params = {"theta": torch.ones(3, dtype=torch.float64)}
    learner = quadratic_learner(A, params, Implicit(TIGHT), strength=1.0, steps=3, tol=None)
    with pytest.raises(SolverError, match=r"negative or zero curvature.*add damping") as caught:
        learner(episode).backward()
    assert caught.value.result is Result.indefinite
    strong = quadratic_learner(A, params, Implicit(TIGHT), strength=5.0, steps=400, tol=1e-8)
    strong(episode).backward()
    regularised = A + 5 * torch.eye(3, dtype=A.dtype)
    phi = torch.linalg.solve(regularised, (episode[1][:, 0] + 5 * params["theta"]).T).T
    close(strong.params["theta"].grad, 5 * torch.linalg.solve(regularised, (phi @ A - episode[3][:, 0]).mean(0)))


def test_no_gradient_at_the_start_counts_as_solved() -> None:
    """theta is the minimum of the support loss up to rounding: there is no progress to be made."""
    A = torch.eye(N, dtype=torch.float64)
    theta = torch.randn(N, dtype=torch.float64)
    learner = quadratic_learner(A, {"theta": theta + 1e-15}, Implicit(TIGHT), tol=0.1, steps=1)
    task = (torch.zeros(1, 1), theta[None], torch.zeros(1, 1), theta[None])
    assert learner(task, batched=False).isfinite()
    assert learner.stationarity(task, batched=False) < 1e-6


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"strength": -1.0}, {"tol": 0.0}, {"steps": 0}])
def test_bad_arguments(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}="):
        IMAML(network(), cross_entropy, **options)


def test_the_defaults_train() -> None:
    """The default settings solve a small network's inner problem to their own tolerance."""
    torch.manual_seed(1)
    x, y = torch.randn(4, 11, 2), torch.arange(11).repeat(4, 1) % 3
    episode = (x[:, :6], y[:, :6], x[:, 6:], y[:, 6:])
    learner = IMAML(MLP([2, 16, 3], activation=nn.Tanh), cross_entropy)
    optimiser = torch.optim.Adam(learner.parameters(), 0.01)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = learner(episode)
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    assert losses[-1] < 0.95 * losses[0]
