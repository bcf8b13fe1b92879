"""One inner problem for all: a network with adapted and fixed parameters, learned rates, differentiable data."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.func import functional_call
from torch.utils import _pytree as pytree

from theria.meta import SGD, Adjoint
from theria.nn import MLP


@dataclass(frozen=True)
class Problem:
    """outer(adjoint)(adapted, fixed, x, hyper): a scalar after `steps` inner steps."""

    model: MLP
    sgd: SGD
    arguments: tuple[Any, ...]
    y: torch.Tensor
    steps: int = 4

    def inner_loss(self, params, context):
        prediction = functional_call(self.model, {**context["fixed"], **params}, (context["x"],))
        return context["power"] * (prediction - context["y"]).square().mean()

    def outer(self, adjoint: Adjoint):
        def function(adapted, fixed, x, hyper):
            # None, numbers and integer tensors may sit in a context.
            context = {"fixed": fixed, "x": x, "y": self.y, "power": 1, "none": None, "labels": torch.arange(3)}
            final = adjoint.solve(self.inner_loss, adapted, context, self.sgd, hyper, self.steps)
            return functional_call(self.model, {**fixed, **final}, (x.sin(),)).pow(3).sum()

        return function

    def gradient(self, adjoint: Adjoint):
        return torch.func.grad(self.outer(adjoint), (0, 1, 2, 3))(*self.arguments)

    def with_sgd(self, sgd: SGD) -> "Problem":
        return replace(self, sgd=sgd, arguments=(*self.arguments[:3], sgd.hyper(self.arguments[0])))


OPTIMISERS = {
    "plain": SGD(0.3),
    "momentum": SGD(0.3, momentum=0.9),
    "nesterov": SGD(0.3, momentum=0.9, nesterov=True),
    "learned": SGD(0.3, learn_lr=True),
    "learned_nesterov": SGD(0.3, momentum=0.9, nesterov=True, learn_lr=True),
}


@pytest.fixture(params=OPTIMISERS.values(), ids=list(OPTIMISERS))
def sgd(request) -> SGD:
    return request.param


@pytest.fixture
def problem(sgd) -> Problem:
    torch.manual_seed(0)
    model = MLP([3, 8, 2], activation=torch.nn.Tanh).double()
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = {name: params.pop(name) for name in ("body.0.bias", "head.weight", "head.bias")}
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    return Problem(model, sgd, (adapted, params, x, sgd.hyper(adapted)), y)


@pytest.fixture
def same():
    """Equality of two pytrees of tensors within a tolerance."""

    def check(actual, expected, tol=1e-10):
        actual, expected = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=tol, atol=tol)

    return check
