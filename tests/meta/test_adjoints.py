"""Five ways to one meta-gradient, at 1e-10 in float64: they differ only in the order of the sums."""

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.utils import _pytree as pytree

from theria.meta import MAML, SGD, FirstOrder, Higher, MixedMode, Unrolled
from theria.meta.optimisers import Adam, AdamW, Lion, RMSprop
from theria.meta.solvers import Neumann
from theria.meta.truncated import Truncated
from theria.nn import TransformerClassifier


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


EXACT_ADJOINTS = [Unrolled(checkpoint_every=2), MixedMode(), MixedMode(checkpoint_every=2), Truncated(4)]


@pytest.mark.parametrize(
    "sgd",
    [
        SGD(0.3, momentum=0.9, dampening=0.5, weight_decay=0.1),
        SGD([0.3, 0.1, 0.2, 0.4], learn_lr="tensor"),
        Adam(0.1, eps=0.1, weight_decay=0.1, learn_lr=True),
        Adam([0.1, 0.2], amsgrad=True, learn_lr="tensor"),
        AdamW(0.1),
        RMSprop(0.1, centered=True, momentum=0.9, learn_lr=True),
        Lion(0.1, weight_decay=0.1, learn_lr="tensor"),
    ],
    ids=lambda optimiser: type(optimiser).__name__,
)
def test_every_exact_adjoint_agrees_for_every_optimiser(problem, sgd, same):
    expected = problem.gradient(Unrolled())
    for adjoint in EXACT_ADJOINTS:
        same(problem.gradient(adjoint), expected)
    if isinstance(sgd, (SGD, Adam)):
        same(by_backward(problem, Higher()), expected)


@pytest.mark.parametrize("inner", [SGD(0.1), Adam(0.01, eps=0.1)], ids=lambda optimiser: type(optimiser).__name__)
def test_every_exact_adjoint_agrees_on_a_transformer(inner):
    """Through `theria.ops.sdpa`, two tasks, three inner steps."""
    torch.manual_seed(0)
    model = TransformerClassifier(3, image_size=14, d_model=16, n_heads=2, n_layers=2).double()
    x, y = torch.rand(2, 2, 6, 1, 14, 14, dtype=torch.float64), torch.arange(3).repeat(2, 2, 2)

    def gradient(adjoint):
        loss = MAML(model, torch.nn.functional.cross_entropy, inner, 3, adjoint)((x[0], y[0], x[1], y[1]))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    expected = gradient(Unrolled())
    assert (gradient(FirstOrder()) - expected).norm() > 1e-3 * expected.norm()
    for adjoint in (*EXACT_ADJOINTS, Higher()):
        assert (gradient(adjoint) - expected).norm() <= 1e-10 * expected.norm(), adjoint


@pytest.mark.parametrize("sgd", [SGD(0.3, momentum=0.9, learn_lr=True)], ids=["momentum"])
def test_truncated_lies_between_first_order_and_unrolled(problem, same):
    same(problem.gradient(Truncated(0)), problem.gradient(FirstOrder()), tol=1e-12)
    for enough in (problem.steps, problem.steps + 3):
        same(problem.gradient(Truncated(enough)), problem.gradient(Unrolled()), tol=1e-12)
    gradients = [pytree.tree_leaves(problem.gradient(Truncated(k))) for k in range(problem.steps + 1)]
    for before, after in itertools.pairwise(gradients):
        assert max((a - b).abs().max() for a, b in zip(before, after, strict=True)) > 1e-4


@pytest.mark.parametrize("sgd", [SGD(0.3)], ids=["plain"])
def test_truncated_differentiates_the_last_steps_from_where_they_start(problem, same):
    """By hand: the first two steps end in constants plus theta_0, the last two are those of `Unrolled`."""
    adapted, fixed, x, _ = problem.arguments
    context = {"fixed": fixed, "x": x, "y": problem.y, "power": 1}

    def final(adapted):
        return pytree.tree_leaves(Truncated(2).solve(problem.inner_loss, adapted, context, problem.sgd, {}, 4))[0].sum()

    middle = Unrolled().solve(problem.inner_loss, adapted, context, problem.sgd, {}, 2)
    shift = {name: (p - adapted[name]).detach() for name, p in middle.items()}

    def by_hand(adapted):
        start = {name: p + shift[name] for name, p in adapted.items()}
        return pytree.tree_leaves(Unrolled().solve(problem.inner_loss, start, context, problem.sgd, {}, 2))[0].sum()

    same(grad(final)(adapted), grad(by_hand)(adapted))


@pytest.mark.parametrize("terms", [0, 1, 5])
def test_truncated_at_a_fixed_point_is_the_neumann_series(terms):
    """L = theta A theta / 2 - theta (B c): d theta / d c = lr sum_{k <= K} (I - lr A)^k B with K + 1 steps."""
    root = torch.randn(4, 4, dtype=torch.float64)
    a, b, rate = root @ root.T + torch.eye(4, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64), 0.05
    c, cotangent = torch.randn(2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    solution = {"theta": torch.linalg.solve(a, b @ c)}

    def loss(params, c):
        return params["theta"] @ a @ params["theta"] / 2 - params["theta"] @ (b @ c)

    def outer(c, adjoint, steps):
        return adjoint.solve(loss, solution, c, SGD(rate), {}, steps)["theta"] @ cotangent

    actual = grad(outer)(c, Truncated(terms + 1), terms + 4)
    matrix, series = torch.eye(4, dtype=torch.float64) - rate * a, torch.zeros_like(a)
    for k in range(terms + 1):
        series += rate * torch.linalg.matrix_power(matrix, k)
    torch.testing.assert_close(actual, b.T @ (series @ cotangent), rtol=1e-10, atol=1e-10)
    solver = Neumann(scale=rate, max_iterations=terms + 1)
    solved = solver.solve(lambda v: a @ v, cotangent, throw=False).value
    torch.testing.assert_close(actual, b.T @ solved, rtol=1e-10, atol=1e-10)
    full = grad(outer)(c, Unrolled(), terms + 1)  # from the solution, the state stays there
    torch.testing.assert_close(actual, full, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [-1, 1.0, True])
def test_truncated_wants_a_number_of_steps(steps):
    with pytest.raises(ValueError, match=r"Truncated\(steps="):
        Truncated(steps)
