"""MixedMode has first derivatives in reverse mode. Everything else raises; nothing is dropped in silence."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jvp, vmap
from torch.utils import _pytree as pytree

from theria.meta import SGD, Higher, MixedMode, RMSprop, Unrolled


@pytest.fixture
def sgd():
    return SGD(0.3, momentum=0.9, learn_lr=True)


def total(tree) -> torch.Tensor:
    return torch.stack([leaf.square().sum() for leaf in pytree.tree_leaves(tree)]).sum()


# Each differentiates f(adapted, fixed, x, hyper) in a way that MixedMode does not have, through argument `i`.
def grad_of_grad(f, i, arguments):
    return grad(lambda *a: total(grad(f)(*a)), i)(*arguments)


def grad_of_grad_same(f, i, arguments):
    return grad(lambda *a: total(grad(f, i)(*a)), i)(*arguments)


def grad_of_vmapped_grad(f, i, arguments):
    *rest, x, hyper = arguments
    batch = (*rest, torch.stack([x, x]), hyper)
    return grad(lambda *a: total(vmap(grad(f), in_dims=(None, None, 0, None))(*a)), i)(*batch)


def jvp_of_grad(f, i, arguments):
    def gradient(moving):
        return grad(f)(*arguments[:i], moving, *arguments[i + 1 :])

    return jvp(gradient, (arguments[i],), (arguments[i],))


def forward(f, i, arguments):
    return jacfwd(f, i)(*arguments)


def second(f, i, arguments):
    return hessian(f, i)(*arguments)


def backward_twice(f, i, arguments):
    leaves = pytree.tree_map(lambda x: x.clone().requires_grad_(), arguments)
    first = torch.autograd.grad(f(*leaves), pytree.tree_leaves(leaves[0]), create_graph=True)
    return torch.autograd.grad(total(first), pytree.tree_leaves(leaves[i]))


def backward_twice_with_inputs(f, i, arguments):
    """Where `once_differentiable` drops terms: only some inputs are asked for."""
    leaves = pytree.tree_map(lambda x: x.clone().requires_grad_(), arguments)
    first = torch.autograd.grad(f(*leaves), leaves[2], create_graph=True)
    return torch.autograd.grad(total(first) + f(*leaves), pytree.tree_leaves(leaves[i])[:1])


SECOND = [
    grad_of_grad,
    grad_of_grad_same,
    grad_of_vmapped_grad,
    jvp_of_grad,
    forward,
    second,
    backward_twice,
    backward_twice_with_inputs,
]


@pytest.mark.parametrize("argument", range(4), ids=["adapted", "fixed", "data", "rates"])
@pytest.mark.parametrize("differentiate", SECOND, ids=lambda f: f.__name__)
def test_second_and_forward_derivatives_raise_and_name_unrolled(differentiate, argument, problem):
    with pytest.raises(NotImplementedError, match=r"MixedMode.*Unrolled"):
        differentiate(problem.outer(MixedMode()), argument, problem.arguments)


@pytest.mark.parametrize("checkpoint_every", [None, 1])
@pytest.mark.parametrize("argument", range(4), ids=["adapted", "fixed", "data", "rates"])
@pytest.mark.parametrize("through", [jvp, lambda f, x, v: jvp(grad(f), x, v), lambda f, x, v: jacfwd(f)(*x)])
def test_forward_mode_over_a_batch_of_tasks_raises_and_names_unrolled(through, argument, checkpoint_every, problem):
    adjoint = MixedMode(checkpoint_every)
    arguments = problem.arguments

    def over_tasks(moving):
        given = [*arguments[:argument], moving, *arguments[argument + 1 :]]
        return vmap(lambda s: problem.outer(adjoint)(given[0], given[1], s * given[2], given[3]))(torch.ones(3)).sum()

    given = (arguments[argument],)
    with pytest.raises(NotImplementedError, match=r"MixedMode has no forward mode.*Unrolled"):
        through(over_tasks, given, given)


def test_unrolled_has_them(problem):
    for differentiate in SECOND:
        result = pytree.tree_leaves(differentiate(problem.outer(Unrolled()), 3, problem.arguments))
        assert all(torch.isfinite(leaf).all() for leaf in result)


def test_create_graph_alone_is_allowed(problem, same):
    leaves = pytree.tree_map(lambda x: x.clone().requires_grad_(), problem.arguments)
    flat = pytree.tree_leaves(leaves)
    gradient = torch.autograd.grad(problem.outer(MixedMode())(*leaves), flat, create_graph=True)
    same([g.detach() for g in gradient], problem.gradient(Unrolled()))


@pytest.fixture
def closed(problem):
    """The outer value as a function of a tensor that the inner loss reads without being given it."""
    adapted, fixed, x, hyper = problem.arguments

    def function(w, adjoint=None):
        def loss(params, context):
            return problem.inner_loss(params, context) + w.square().sum() * params["head.bias"].sum()

        context = {"fixed": fixed, "x": x, "y": problem.y, "power": 1}
        return total((adjoint or MixedMode()).solve(loss, adapted, context, problem.sgd, hyper, 2))

    return function


def dual(f, w):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(w, w))


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f, w: f(w.requires_grad_()),
        lambda f, w: grad(f)(w),
        lambda f, w: vmap(grad(f))(torch.stack([w, w])),
        lambda f, w: grad(lambda w: vmap(lambda s: f(w * s))(torch.ones(2)).sum())(w),
        lambda f, w: grad(lambda w: grad(lambda u: f(w) * u)(w.new_ones(())))(w),
        lambda f, w: jvp(f, (w,), (w,)),
        lambda f, w: vmap(lambda w: jvp(f, (w,), (w,)))(torch.stack([w, w])),
        lambda f, w: jvp(lambda w: vmap(lambda s: f(w * s))(torch.ones(2)).sum(), (w,), (w,)),
        lambda f, w: jvp(lambda w: grad(lambda u: f(w) * u)(w.new_ones(())), (w,), (w,)),
        lambda f, w: jvp(lambda w: vmap(grad(lambda u: f(w) * u))(torch.ones(2)), (w,), (w,)),
        dual,
    ],
    ids=[
        "backward",
        "grad",
        "vmap_grad",
        "grad_vmap",
        "grad_grad",
        "jvp",
        "vmap_jvp",
        "jvp_vmap",
        "jvp_grad",
        "jvp_vmap_grad",
        "dual",
    ],
)
def test_a_derivative_through_a_closed_over_tensor_raises(differentiate, closed):
    with pytest.raises(ValueError, match="neither in params nor in context"):
        differentiate(closed, torch.randn(3, dtype=torch.float64))


def test_closed_over_constants_are_fine(closed):
    w = torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(closed(w), closed(w, Unrolled()), rtol=1e-12, atol=1e-12)
    # Inside another transform that has nothing to do with the loop.
    assert torch.isfinite(jvp(lambda u: u * closed(w), (w.sum(),), (w.sum(),))[1])


def test_a_closed_over_tensor_that_is_mapped_over_raises(closed):
    w = torch.randn(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"vmap maps over.*context"):
        jvp(lambda u: vmap(lambda v: u * closed(w * v))(w).sum(), (w.sum(),), (w.sum(),))


def test_higher_says_what_it_cannot_do(problem):
    with pytest.raises(NotImplementedError, match=r"inside torch\.func"):
        problem.gradient(Higher())
    with pytest.raises(TypeError, match="runs SGD and Adam only"):
        Higher().solve(problem.inner_loss, problem.arguments[0], {}, RMSprop(0.1), {}, 1)


def test_higher_missing_names_the_extra(problem, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "higher", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e"):
        problem.outer(Higher())(*problem.arguments)
