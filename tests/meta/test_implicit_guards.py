"""No derivative is lost in silence: what an implicit rule cannot see raises, in every nesting of transforms."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jvp, vmap

from theria.meta import SGD
from theria.meta.implicit import argmin, custom_fixed_point, fixed_point, linear_solve, root
from theria.meta.implicit.frozen import each_task
from theria.meta.implicit_adjoint import Identity, Implicit
from theria.meta.levels import carries_derivative, freeze

N = 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def zeros() -> Tensor:
    return torch.zeros(N, dtype=torch.float64)


# Each reads w without being given it, beside an argument t that it is given.
def by_linear_solve(w: Tensor, t: Tensor) -> Tensor:
    return linear_solve(lambda v, t: (3 + w.square()) * t.cosh() * v, torch.ones_like(t), t).value


def by_root(w: Tensor, t: Tensor) -> Tensor:
    return root(lambda x, t: x**3 + x - w * t, zeros(), t).value


def by_fixed_point(w: Tensor, t: Tensor) -> Tensor:
    return fixed_point(lambda x, t: (0.3 * x + w * t).sin(), zeros(), t).value


def by_custom(w: Tensor, t: Tensor) -> Tensor:
    @custom_fixed_point(lambda x, t: (0.3 * x + w * t).sin(), vectorized=True)
    def solver(x0, t):
        assert not carries_derivative(t)
        x = x0
        for _ in range(60):
            x = (0.3 * x + freeze(w) * t).sin()
        return x

    return solver(zeros(), t).value


def by_argmin(w: Tensor, t: Tensor) -> Tensor:
    return argmin(lambda x, t: (x - w).square().sum() + (x * t).square().sum(), zeros(), t).value


def by_adjoint(w: Tensor, t: Tensor, adjoint=None) -> Tensor:
    def loss(params, t):
        return (params["x"] - w).square().sum() + (params["x"] * t).square().sum()

    return (adjoint or Implicit()).solve(loss, {"x": zeros()}, t, SGD(0.1), {}, 5)["x"]


def by_identity(w: Tensor, t: Tensor) -> Tensor:
    return by_adjoint(w, t, Identity(0.1))


FUNCTIONS = [by_linear_solve, by_root, by_fixed_point, by_custom, by_argmin, by_adjoint, by_identity]


def dual(f, w):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(w, w))


DERIVATIVES = {
    "backward": lambda f, w: f(w.clone().requires_grad_()),
    "grad": lambda f, w: grad(lambda w: f(w).sum())(w),
    "vmap_grad": lambda f, w: vmap(grad(lambda w: f(w).sum()))(torch.stack([w, w])),
    "grad_vmap": lambda f, w: grad(lambda w: vmap(lambda s: f(w * s))(torch.ones(2).double()).sum())(w),
    "grad_grad": lambda f, w: grad(lambda w: grad(lambda u: (f(w) * u).sum())(w).sum())(w),
    "jvp": lambda f, w: jvp(f, (w,), (w,)),
    "vmap_jvp": lambda f, w: vmap(lambda w: jvp(f, (w,), (w,)))(torch.stack([w, w])),
    "jvp_vmap": lambda f, w: jvp(lambda w: vmap(lambda s: f(w * s))(torch.ones(2).double()).sum(), (w,), (w,)),
    "jacfwd": lambda f, w: jacfwd(f)(w),
    "hessian": lambda f, w: hessian(lambda w: f(w).sum())(w),
    "dual": dual,
}


@pytest.mark.parametrize("differentiate", DERIVATIVES.values(), ids=list(DERIVATIVES))
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_derivative_through_a_closed_over_tensor_raises(function, differentiate):
    t = randn(N, seed=1)
    with pytest.raises(ValueError, match="not among its arguments"):
        differentiate(lambda w: function(w, t), randn(N))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_closed_over_tensor_that_is_mapped_raises_where_a_derivative_is_taken(function):
    """Under another vmap its backward would read the wrong tensor."""
    w, t = randn(4, N), randn(4, N, seed=1).requires_grad_()
    with pytest.raises(ValueError, match=r"vmap maps over.*not among its arguments"):
        vmap(function)(w, t)
    with pytest.raises(ValueError, match=r"vmap maps over.*not among its arguments"):
        vmap(grad(lambda t, w: function(w, t).sum()))(t.detach(), w)
    together = vmap(function)(w, t.detach())  # a value alone may
    alone = torch.stack([function(*task) for task in zip(w, t.detach(), strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_closed_over_constants_are_fine(function):
    w, t = randn(N), randn(N, seed=1)
    expected = grad(lambda t: function(w, t).sum())(t)
    assert expected.abs().max() > 1e-6
    actual = grad(lambda t: grad(lambda s: s * function(w * t.detach() / t.detach(), t).sum())(t.sum()))(t)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        function(w.requires_grad_(), t)  # nothing is differentiated, so nothing can be lost


def test_parameters_of_a_module_are_looked_for_too():
    module = nn.Linear(N, N).double()
    with pytest.raises(ValueError, match="functional_call"):
        fixed_point(lambda x, c: torch.tanh(0.1 * module(x) + c), zeros(), randn(N))
    with pytest.raises(ValueError, match="functional_call"):
        fixed_point(lambda x, m: torch.tanh(0.1 * m(x)), zeros(), module)


def test_functions_that_draw_random_numbers_raise():
    with pytest.raises(ValueError, match="draws random numbers"):
        fixed_point(lambda x, c: nn.functional.dropout(0.1 * x + c), zeros(), randn(N))
    with pytest.raises(ValueError, match="draws random numbers"):
        Implicit().solve(
            lambda p, c: nn.functional.dropout(p["x"] - c).square().sum(), {"x": zeros()}, randn(N), SGD(0.1), {}, 3
        )


def test_complex_tensors_that_are_differentiated_raise():
    z = torch.ones((), dtype=torch.complex128)

    def solve(z):
        return fixed_point(lambda x, z: 0.5 * x + z.abs(), zeros(), z, max_iter=200).value

    torch.testing.assert_close(solve(z), torch.full((N,), 2.0).double(), rtol=1e-5, atol=0.0)
    with pytest.raises(ValueError, match="view_as_real"):
        solve(z.requires_grad_())


def test_frozen_tensors_carry_nothing_in_any_nesting():
    seen = []

    def f(x):
        y = freeze(x.sin())
        assert not carries_derivative(y)
        assert carries_derivative(x.sin())
        seen.append(1)
        return (x * y).sum()

    x = randn(2, N)
    for differentiate in DERIVATIVES.values():
        differentiate(f, x)
    assert len(seen) >= len(DERIVATIVES)
    torch.testing.assert_close(grad(f)(x), x.sin())  # the sine is a constant


def test_each_task_sees_plain_tensors():
    def outer(a, b):
        assert a.data_ptr()
        return {"c": torch.from_numpy(a.numpy()[:, None] * b.numpy())}

    a, b = randn(3, 2, 4), randn(5, 3, seed=1)

    def one(a, b):
        return each_task(outer, freeze(a), freeze(b))["c"]

    nested = vmap(lambda a, b: vmap(lambda a: one(a, b), in_dims=1)(a), in_dims=(0, 1))
    torch.testing.assert_close(nested(a, b), torch.einsum("tij,kt->tjik", a, b))
    torch.testing.assert_close(grad(lambda a: (a * nested(a, b).sum()).sum())(a), nested(a, b).sum() + 0 * a)
