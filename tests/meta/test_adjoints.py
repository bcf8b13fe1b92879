"""Five ways to one meta-gradient, at 1e-10 in float64: they differ only in the order of the sums."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.utils import _pytree as pytree

from theria.meta import FirstOrder, Higher, MixedMode, Unrolled


def by_hand(problem):
    """The inner loop as one would write it with torch.autograd alone."""
    leaves = pytree.tree_map(lambda x: x.clone().requires_grad_(), problem.arguments)
    adapted, fixed, x, hyper = leaves
    params, buffers, sgd = dict(adapted), dict.fromkeys(adapted, torch.zeros(())), problem.sgd
    for _ in range(problem.steps):
        loss = (functional_call(problem.model, {**fixed, **params}, (x,)) - problem.y).square().mean()
        gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        for (name, p), g in zip(list(params.items()), gradients, strict=True):
            buffers[name] = sgd.momentum * buffers[name] + g
            direction = g + sgd.momentum * buffers[name] if sgd.nesterov else buffers[name]
            params[name] = p - (hyper["lr"][name] if sgd.learn_lr else sgd.lr) * direction
    outer = functional_call(problem.model, {**fixed, **params}, (x.sin(),)).pow(3).sum()
    return torch.autograd.grad(outer, pytree.tree_leaves(leaves))


def by_backward(problem, adjoint):
    leaves = pytree.tree_map(lambda x: x.clone().requires_grad_(), problem.arguments)
    return torch.autograd.grad(problem.outer(adjoint)(*leaves), pytree.tree_leaves(leaves))


@pytest.mark.parametrize("adjoint", [Unrolled(), MixedMode()], ids=lambda a: type(a).__name__)
def test_functional_style_equals_the_loop_by_hand(adjoint, problem, same):
    same(problem.gradient(adjoint), by_hand(problem))


@pytest.mark.parametrize("adjoint", [Unrolled(), MixedMode(), Higher()], ids=lambda a: type(a).__name__)
def test_backward_style_equals_the_loop_by_hand(adjoint, problem, same):
    same(by_backward(problem, adjoint), by_hand(problem))


def test_forward_mode_hypergradient_agrees(problem):
    direction = pytree.tree_map(torch.randn_like, problem.arguments)
    forward = jvp(problem.outer(Unrolled()), problem.arguments, direction)[1]
    products = pytree.tree_map(lambda g, d: (g * d).sum(), problem.gradient(MixedMode()), direction)
    torch.testing.assert_close(forward, sum(pytree.tree_leaves(products)), rtol=1e-10, atol=1e-10)


def test_first_order_is_one_function_in_both_modes(problem):
    """Its derivative is not that of the true function, but forward and reverse have to agree on what it is."""
    direction = pytree.tree_map(torch.randn_like, problem.arguments)
    forward = jvp(problem.outer(FirstOrder()), problem.arguments, direction)[1]

    def product(gradient):
        return sum(pytree.tree_leaves(pytree.tree_map(lambda g, d: (g * d).sum(), gradient, direction)))

    torch.testing.assert_close(forward, product(problem.gradient(FirstOrder())), rtol=1e-10, atol=1e-10)
    assert abs(forward - product(problem.gradient(Unrolled()))) > 1e-2


def test_every_adjoint_runs_the_same_inner_loop(problem, same):
    values = [
        problem.outer(adjoint)(*problem.arguments) for adjoint in (Unrolled(), MixedMode(), FirstOrder(), Higher())
    ]
    for value in values[1:]:
        same(value, values[0], tol=1e-12)


def test_no_steps_return_the_initial_parameters(problem, same):
    start = problem.arguments[0]
    for adjoint in (Unrolled(), MixedMode(), FirstOrder(), Higher()):
        same(adjoint.solve(problem.inner_loss, start, {}, problem.sgd, problem.arguments[3], 0), start, tol=0)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_vmap_over_tasks_equals_the_loop(problem, chunk_size, same):
    adapted, fixed, _, hyper = problem.arguments
    tasks = torch.randn(5, 5, 3, dtype=torch.float64)

    def mean(adjoint):
        def one(adapted, fixed, hyper, x):
            return problem.outer(adjoint)(adapted, fixed, x, hyper)

        mapped = vmap(one, in_dims=(None, None, None, 0), chunk_size=chunk_size)
        return lambda *arguments: mapped(*arguments).mean()

    arguments = (adapted, fixed, hyper, tasks)
    actual = grad(mean(MixedMode()), (0, 1, 2, 3))(*arguments)

    def loop(adapted, fixed, hyper, tasks):
        return torch.stack([problem.outer(Unrolled())(adapted, fixed, x, hyper) for x in tasks]).mean()

    expected = grad(loop, (0, 1, 2, 3))(*arguments)
    same(actual, expected)
    leaves = pytree.tree_map(lambda x: x.clone().requires_grad_(), arguments)
    same(torch.autograd.grad(mean(MixedMode())(*leaves), pytree.tree_leaves(leaves)), expected)


def test_vmap_of_grad_equals_grad_of_each(problem, same):
    adapted, fixed, x, hyper = problem.arguments
    tasks = torch.stack([x, x.cos()])
    starts = pytree.tree_map(lambda p: torch.stack([p, 2 * p]), adapted)
    gradient = grad(problem.outer(MixedMode()), (0, 1, 2, 3))
    batched = vmap(gradient, in_dims=(0, None, 0, None))(starts, fixed, tasks, hyper)
    for i in range(2):
        start = pytree.tree_map(lambda p, i=i: p[i], starts)
        expected = grad(problem.outer(Unrolled()), (0, 1, 2, 3))(start, fixed, tasks[i], hyper)
        same(pytree.tree_map(lambda g, i=i: g[i], batched), expected)


@dataclass(frozen=True)
class Normalised:
    """A step along g / sqrt(1 + g^2), with a decaying mean: not linear in the gradient, state differentiated."""

    linear_in_gradient: ClassVar[bool] = False

    def hyper(self, params):
        return {"lr": {name: torch.full_like(p, 0.1) for name, p in params.items()}}

    def init(self, params):
        return {name: torch.zeros_like(p) for name, p in params.items()}

    def update(self, grads, state, params, hyper):
        state = {name: 0.5 * state[name] + g.square() for name, g in grads.items()}
        steps = {name: g * (1 + state[name]).rsqrt() for name, g in grads.items()}
        return {name: p - hyper["lr"][name] * steps[name] for name, p in params.items()}, state


@pytest.mark.parametrize("sgd", [Normalised()], ids=["nonlinear"])
def test_optimisers_that_are_not_linear_in_the_gradient(problem, same):
    same(problem.gradient(MixedMode()), problem.gradient(Unrolled()))


def test_parameters_that_the_loss_does_not_use(problem, same):
    extra = {**problem.arguments[0], "unused": torch.ones(2, dtype=torch.float64)}
    unused = replace(problem, arguments=(extra, *problem.arguments[1:3], problem.sgd.hyper(extra)))
    unused = replace(unused, model=_Ignoring(problem.model))
    a, b = unused.gradient(MixedMode()), unused.gradient(Unrolled())
    same(a, b)
    assert (a[0]["unused"] == 0).all()


class _Ignoring(torch.nn.Module):
    """A model with one parameter more than its forward reads."""

    def __init__(self, model):
        super().__init__()
        self.body, self.head = model.body, model.head
        self.unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x):
        return self.head(self.body(x))
