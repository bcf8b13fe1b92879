"""Where the inner steps start: none at all, and tensors whose entries share memory. In float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn.functional import mse_loss

from theria.meta import AID, IMAML, ITD, SGD, BilevelProblem, Identity, Implicit, MixedMode, Truncated, Unrolled
from theria.meta.adjoint import Adjoint, FirstOrder
from theria.meta.solvers import CG, SolverError
from theria.nn import MLP

EXACT = 1e-10  # solves to 1e-12 of systems with condition numbers below 10
A = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
X = torch.tensor([1.0, 1.0], dtype=torch.float64)
STAR = torch.linalg.solve(A, X)  # (1, 0.25), where the hypergradient is (0, -0.1875)
EXPECTED = torch.tensor([0.0, -0.1875], dtype=torch.float64)


def inner_loss(z: Tensor, x: Tensor) -> Tensor:
    return z @ A @ z / 2 - x @ z


def outer_loss(z: Tensor, x: Tensor) -> Tensor:
    return (z - 1).square().sum() / 2


def close(actual: Any, expected: Any, tol: float = EXACT) -> None:
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


# --- no steps ----------------------------------------------------------------------------------------------------


def solved(adjoint: Adjoint, start: Tensor, x: Tensor) -> Tensor:
    return adjoint.solve(lambda p, c: inner_loss(p["z"], c), {"z": start}, x, SGD(0.1), {}, 0)["z"]


def test_without_steps_the_start_is_the_implicit_solution():
    adjoint = Implicit(CG(rtol=1e-12))
    close(solved(adjoint, STAR, X), STAR)
    close(jacrev(lambda x: solved(adjoint, STAR, x))(X), torch.linalg.inv(A))
    close(jacrev(lambda z: solved(adjoint, z, X))(STAR), torch.zeros_like(A))
    batch = vmap(grad(lambda x: outer_loss(solved(adjoint, STAR, x), x)))(torch.stack([X, X]))
    close(batch, torch.stack([EXPECTED, EXPECTED]))
    close(hessian(lambda x: outer_loss(solved(adjoint, STAR, x), x))(X), torch.linalg.inv(A) @ torch.linalg.inv(A))
    close(jacrev(lambda x: solved(Identity(0.3), STAR, x))(X), 0.3 * torch.eye(2, dtype=torch.float64))


def test_itd_without_steps_is_aid_without_steps():
    problem, solver = BilevelProblem(inner_loss, outer_loss), CG(rtol=1e-12)
    implicit = problem.hypergradient(X, STAR, ITD(SGD(0.1), steps=0, adjoint=Implicit(solver)))
    approximate = problem.hypergradient(X, STAR, AID(SGD(0.1), steps=0, solver=solver))
    close(implicit.gradient, EXPECTED)
    close(approximate.gradient, EXPECTED)


def test_without_steps_the_tolerance_looks_at_the_start():
    with pytest.raises(SolverError, match=r"the inner problem .*residual 1\.4"):
        solved(Implicit(tolerance=1e-3), torch.zeros_like(X), X)
    close(solved(Implicit(tolerance=1e-3), STAR, X), STAR)


@pytest.mark.parametrize("adjoint", [Unrolled(), Unrolled(2), MixedMode(), FirstOrder(), Truncated(1)], ids=repr)
def test_without_steps_the_start_of_the_others_is_itself(adjoint: Adjoint):
    close(jacrev(lambda z: solved(adjoint, z, X))(STAR), torch.eye(2, dtype=torch.float64))
    close(jacrev(lambda x: solved(adjoint, STAR, x))(X), torch.zeros_like(A))


def test_an_unadapted_model_is_not_taken_for_adapted():
    """iMAML without steps predicts with theta, and differentiates that."""
    torch.manual_seed(0)
    learner = IMAML(MLP((1, 3, 1)).double(), mse_loss, tol=None)
    x = torch.randn(4, 1, dtype=torch.float64)
    params: dict[str, Tensor] = dict(learner.model.named_parameters())
    adapted = learner.adapt(x, x, steps=0)
    for name, p in params.items():
        (gradient,) = torch.autograd.grad(adapted[name].sum(), p)
        close(gradient, torch.ones_like(p))
    close(learner.predict((x, x, x, x), steps=0, batched=False), functional_call(learner.model, params, (x,)))


# --- shared memory -----------------------------------------------------------------------------------------------

EVERY = [Unrolled(), Unrolled(2), MixedMode(), MixedMode(2), Truncated(2), Implicit(), Identity(0.1)]


@pytest.mark.parametrize("adjoint", EVERY, ids=repr)
@pytest.mark.parametrize("steps", [0, 3])
def test_an_expanded_start(adjoint: Adjoint, steps: int):
    """The same as its copy, in value and gradient; forward mode refuses tensors whose entries share memory."""

    def objective(start: Tensor, x: Tensor, copy: bool) -> Tensor:
        z, c = start.expand(2), x.expand(2)
        z, c = (z.clone(), c.clone()) if copy else (z, c)
        return outer_loss(
            adjoint.solve(lambda p, c: inner_loss(p["z"], c).exp(), {"z": z}, c, SGD(0.1), {}, steps)["z"], x
        )

    start, x = torch.tensor([[0.3], [0.2]], dtype=torch.float64)
    shared, copied = (grad(objective, (0, 1))(start, x, copy) for copy in (False, True))
    close(shared, copied)
    tasks = torch.stack([start, 2 * start]), torch.stack([x, x])
    shared, copied = (vmap(grad(objective, (0, 1)), (0, 0, None))(*tasks, copy) for copy in (False, True))
    close(shared, copied)
    if not isinstance(adjoint, MixedMode):
        shared, copied = (jvp(lambda x, c=copy: objective(start, x, c), (x,), (x,))[1] for copy in (False, True))
        close(shared, copied)
