"""`Unrolled(checkpoint_every=)`: every derivative of `Unrolled`, from a few kept states."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils import _pytree as pytree

from theria.meta import MAML, SGD, MixedMode, Unrolled
from theria.meta.optimisers import Adam
from theria.meta.recompute import recompute

EXACT = 1e-12  # float64: the same operations on the same numbers
CHECKPOINTED = [Unrolled(checkpoint_every=k) for k in (1, 3, 4, 9)]  # of 4 steps: each, uneven, all, more than all


@pytest.fixture
def sgd():
    return Adam(0.1, eps=0.1, learn_lr=True)


def total(tree) -> torch.Tensor:
    return torch.stack([leaf.square().sum() for leaf in pytree.tree_leaves(tree)]).sum()


@pytest.mark.parametrize("adjoint", CHECKPOINTED, ids=str)
def test_gradients_in_the_functional_style(adjoint, problem, same):
    same(problem.gradient(adjoint), problem.gradient(Unrolled()), tol=EXACT)


@pytest.mark.parametrize("adjoint", CHECKPOINTED, ids=str)
def test_gradients_by_backward(adjoint, problem, same):
    leaves = pytree.tree_map(lambda x: x.clone().requires_grad_(), problem.arguments)
    flat = pytree.tree_leaves(leaves)
    gradient = torch.autograd.grad(problem.outer(adjoint)(*leaves), flat)
    same(gradient, problem.gradient(Unrolled()), tol=EXACT)
    gradient = torch.autograd.grad(problem.outer(adjoint)(*leaves), flat[1:2])  # of one input alone
    same(gradient, pytree.tree_leaves(problem.gradient(Unrolled()))[1:2], tol=EXACT)


def backward_twice(f, i, arguments):
    leaves = pytree.tree_map(lambda x: x.clone().requires_grad_(), arguments)
    first = torch.autograd.grad(f(*leaves), pytree.tree_leaves(leaves[0]), create_graph=True)
    return torch.autograd.grad(total(first), pytree.tree_leaves(leaves[i]))


SECOND = {
    "jvp": lambda f, i, a: jvp(f, a, a)[1],
    "jacfwd": lambda f, i, a: jacfwd(f, i)(*a),
    "grad_of_grad": lambda f, i, a: grad(lambda *a: total(grad(f)(*a)), i)(*a),
    "jvp_of_grad": lambda f, i, a: jvp(grad(f), a, a)[1],
    "grad_of_jvp": lambda f, i, a: grad(lambda *b: jvp(f, b, a)[1], i)(*a),
    "jvp_of_jvp": lambda f, i, a: jvp(lambda *b: jvp(f, b, a)[1], a, a)[1],
    "backward_twice": backward_twice,
}


@pytest.mark.parametrize("argument", range(4), ids=["adapted", "fixed", "data", "rates"])
@pytest.mark.parametrize("differentiate", SECOND.values(), ids=SECOND)
def test_forward_mode_and_second_order(differentiate, argument, problem, same):
    actual = differentiate(problem.outer(Unrolled(checkpoint_every=3)), argument, problem.arguments)
    same(actual, differentiate(problem.outer(Unrolled()), argument, problem.arguments), tol=1e-10)


def test_hessians_and_third_order(problem, same):
    adapted, *rest = problem.arguments

    def third(adjoint):
        outer = problem.outer(adjoint)

        def of_bias(bias):
            return outer({**adapted, "head.bias": bias}, *rest)

        bias = adapted["head.bias"]
        return hessian(of_bias)(bias), jacrev(jacrev(of_bias))(bias), grad(lambda b: total(hessian(of_bias)(b)))(bias)

    same(third(Unrolled(checkpoint_every=2)), third(Unrolled()))


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_tasks_under_vmap(problem, chunk_size, same):
    adapted, fixed, _, hyper = problem.arguments
    tasks = torch.randn(3, 5, 3, dtype=torch.float64)

    def mean(adjoint):
        def one(adapted, fixed, hyper, x):
            return problem.outer(adjoint)(adapted, fixed, x, hyper)

        mapped = vmap(one, in_dims=(None, None, None, 0), chunk_size=chunk_size)
        return lambda *arguments: mapped(*arguments).mean()

    arguments, adjoint = (adapted, fixed, hyper, tasks), Unrolled(checkpoint_every=3)
    expected = grad(mean(Unrolled()), (0, 1, 2, 3))(*arguments)
    same(grad(mean(adjoint), (0, 1, 2, 3))(*arguments), expected)
    leaves = pytree.tree_map(lambda x: x.clone().requires_grad_(), arguments)
    same(torch.autograd.grad(mean(adjoint)(*leaves), pytree.tree_leaves(leaves)), expected)
    for second in (SECOND["grad_of_grad"], SECOND["backward_twice"], SECOND["jvp_of_grad"]):
        same(second(mean(adjoint), 0, arguments), second(mean(Unrolled()), 0, arguments))
    per_task = vmap(grad(problem.outer(adjoint)), in_dims=(None, None, 0, None))(adapted, fixed, tasks, hyper)
    same(per_task, vmap(grad(problem.outer(Unrolled())), in_dims=(None, None, 0, None))(adapted, fixed, tasks, hyper))


@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize("adjoint", [Unrolled(checkpoint_every=2), MixedMode(), MixedMode(checkpoint_every=2)], ids=str)
def test_dropout_masks_are_drawn_again(adjoint, randomness):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 2)).double()
    x, y = torch.randn(2, 3, 8, 3, dtype=torch.float64), torch.randn(2, 3, 8, 2, dtype=torch.float64)

    def meta_gradient(adjoint):
        torch.manual_seed(7)
        learner = MAML(model, torch.nn.functional.mse_loss, SGD(0.3), 5, adjoint, randomness=randomness)
        gradient = torch.autograd.grad(learner((x[0], y[0], x[1], y[1])), list(model.parameters()))
        return gradient, torch.rand(1)  # and the generator goes on from the same place

    for a, b in zip(*(pytree.tree_leaves(meta_gradient(a)) for a in (adjoint, Unrolled())), strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("adjoint", [Unrolled(checkpoint_every=2), MixedMode(), MixedMode(checkpoint_every=2)], ids=str)
def test_the_way_back_has_the_precision_of_the_way_there(adjoint):
    """`backward` runs after the block of autocast was left; what it computes again has to round as it did inside."""
    seen = []

    def support_loss(params, context):
        hidden = context @ params["w"]
        seen.append(hidden.dtype)
        return hidden.float().square().mean()

    def gradient(enabled):
        seen.clear()
        params, x = {"w": torch.randn(3, 2, requires_grad=True)}, torch.randn(5, 3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            final = adjoint.solve(support_loss, params, x, SGD(0.1), {}, 4)
        before = len(seen)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not enabled):  # whatever is on at the time
            final["w"].sum().backward()
        assert len(seen) > before
        return set(seen)

    assert gradient(enabled=True) == {torch.bfloat16}
    assert gradient(enabled=False) == {torch.float32}


def test_closed_over_derivatives_raise(problem):
    adapted, fixed, x, hyper = problem.arguments
    context = {"fixed": fixed, "x": x, "y": problem.y, "power": 1}

    def outer(w):
        def loss(params, context):
            return problem.inner_loss(params, context) + w * params["head.bias"].sum()

        return total(Unrolled(checkpoint_every=2).solve(loss, adapted, context, problem.sgd, hyper, 2))

    for differentiate in (grad(outer), lambda w: outer(w.requires_grad_()), lambda w: jvp(outer, (w,), (w,))):
        with pytest.raises(
            ValueError, match=r"Unrolled\(checkpoint_every=2\): the inner loss.*Pass it through context"
        ):
            differentiate(torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("adjoint", [Unrolled(checkpoint_every=2), MixedMode()], ids=str)
def test_a_closed_over_tensor_that_is_mapped_over_raises(adjoint):
    params = {"w": torch.ones(2, dtype=torch.float64)}

    def outer(u, v):
        def loss(p, _):
            return (p["w"] * v).square().sum()

        return u * total(adjoint.solve(loss, params, {}, SGD(0.1), {}, 2))

    u, v = torch.ones((), dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"vmap maps over.*context"):
        jvp(lambda u: vmap(lambda v: outer(u, v))(v).sum(), (u,), (u,))


@pytest.mark.parametrize("adjoint", [Unrolled(checkpoint_every=2), MixedMode()], ids=str)
def test_a_schedule_that_closes_over_a_derivative_raises(adjoint, problem):
    adapted, fixed, x, _ = problem.arguments
    context = {"fixed": fixed, "x": x, "y": problem.y, "power": 1}

    def outer(w):
        optimiser = SGD(lambda count: w * 0.5**count)
        return total(adjoint.solve(problem.inner_loss, adapted, context, optimiser, {}, 2))

    with pytest.raises(ValueError, match="an update of the inner optimiser"):
        grad(outer)(torch.ones((), dtype=torch.float64))
    assert torch.isfinite(outer(torch.ones((), dtype=torch.float64)))


@pytest.mark.parametrize("every", [0, -1, 2.0])
@pytest.mark.parametrize("adjoint", [Unrolled, MixedMode])
def test_impossible_distances_are_named(adjoint, every):
    with pytest.raises(ValueError, match="checkpoint_every"):
        adjoint(checkpoint_every=every)


def test_recompute_runs_again_once_for_each_derivative():
    calls = []

    def function(x, y):
        calls.append(1)
        return x.sin() * y, y.exp()

    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, dtype=torch.float64)  # needs no gradient, and gets none
    first, second = recompute(function, x, y)
    assert len(calls) == 1
    (gradient,) = torch.autograd.grad(first.sum() + second.sum(), x, create_graph=True)
    assert len(calls) == 2
    torch.testing.assert_close(gradient, x.cos() * y, rtol=EXACT, atol=EXACT)
    (again,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(again, -x.sin() * y, rtol=EXACT, atol=EXACT)
    assert torch.autograd.gradgradcheck(lambda x: recompute(function, x, y), (x,))
    tangent = jvp(lambda x: recompute(function, x, y)[0], (x,), (y,))[1]
    torch.testing.assert_close(tangent, x.cos() * y * y, rtol=EXACT, atol=EXACT)
    (mixed,) = torch.autograd.grad(tangent.sum(), x)
    torch.testing.assert_close(mixed, -x.sin() * y * y, rtol=EXACT, atol=EXACT)


def test_dual_levels_raise_where_torch_does_not_nest_them():
    x = torch.ones(2, dtype=torch.float64)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="Nested forward mode"):
        recompute(lambda x: (x.sin(),), forward_ad.make_dual(x, x))
