"""Every order and composition of derivatives of the implicit functions, against closed forms and long iterations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree

from theria.meta.implicit import Newton, argmin, custom_root, fixed_point, linear_solve, root
from theria.meta.solvers import CG, GMRES, Dense

EXACT = 1e-10  # float64; solves to 1e-13, condition numbers below 20, up to three derivatives
N = 3
TIGHT = GMRES(rtol=1e-13)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def matrix(seed: int = 1) -> Tensor:
    """Far from symmetric: a missing transpose shows."""
    return 4 * torch.eye(N, dtype=torch.float64) + randn(N, N, seed=seed)


@dataclass(frozen=True)
class Case:
    """Two formulas for one function of (A (N, N), b (N,)), with values (N,)."""

    implicit: Callable[[Tensor, Tensor], Tensor]
    truth: Callable[[Tensor, Tensor], Tensor]


def inverse(A: Tensor, b: Tensor) -> Tensor:
    """Not torch.linalg.solve, whose reverse over forward drops d/dA of the tangent of b (PyTorch 2.13)."""
    return torch.linalg.inv(A) @ b


def cubic_by_newton(A: Tensor, b: Tensor) -> Tensor:
    """A x + x^3 = b by steps that autograd follows."""
    x = torch.zeros_like(b)
    for _ in range(12):
        x = x - torch.linalg.inv(A + torch.diag_embed(3 * x * x)) @ (A @ x + x**3 - b)
    return x


def iterated(A: Tensor, b: Tensor) -> Tensor:
    x = torch.zeros_like(b)
    for _ in range(60):
        x = torch.tanh(0.1 * A @ x + b)
    return x


def cubic(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return A @ x + x**3 - b


def energy(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """Its gradient is the cubic of the symmetric A'A."""
    return 0.5 * (A @ x).square().sum() + 0.25 * x.pow(4).sum() - b @ x


def start(b: Tensor) -> Tensor:
    return torch.zeros(N, dtype=b.dtype)


@custom_root(cubic, linear_solver=TIGHT, tol=1e-12)
def on_the_host(x0: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """Newton in numpy, in place: nothing that autograd or vmap could follow."""
    import numpy as np

    x, A_, b_ = x0.numpy().copy(), A.numpy(), b.numpy()
    for _ in range(20):
        x -= np.linalg.solve(A_ + np.diag(3 * x * x), A_ @ x + x**3 - b_)
    return torch.from_numpy(x)


TIGHT_ROOT: dict[str, Any] = {"tol": 1e-12, "linear_solver": TIGHT, "solver": Newton(Dense(rtol=1e-12))}
CASES = {
    "linear_solve": Case(lambda A, b: linear_solve(lambda v, A: A @ v, b, A, solver=TIGHT).value, inverse),
    "symmetric": Case(
        lambda A, b: linear_solve(lambda v, A: A.mT @ (A @ v), b, A, solver=CG(rtol=1e-12), symmetric=True).value,
        lambda A, b: inverse(A.mT @ A, b),
    ),
    "root": Case(lambda A, b: root(cubic, start(b), A, b, **TIGHT_ROOT).value, cubic_by_newton),
    "custom_root": Case(lambda A, b: on_the_host(start(b), A, b).value, cubic_by_newton),
    "fixed_point": Case(
        lambda A, b: (
            fixed_point(
                lambda x, A, b: torch.tanh(0.1 * A @ x + b), start(b), A, b, tol=1e-13, linear_solver=TIGHT
            ).value
        ),
        iterated,
    ),
    "argmin": Case(
        lambda A, b: argmin(energy, start(b), A, b, tol=1e-11, linear_solver=CG(rtol=1e-13)).value,
        lambda A, b: cubic_by_newton(A.mT @ A, b),
    ),
}


def total(tree: Any) -> Tensor:
    return torch.stack([leaf.square().sum() for leaf in pytree.tree_leaves(tree)]).sum()


Function = Callable[[Tensor, Tensor], Tensor]
POINT, DIRECTION = (matrix(), randn(N, seed=2)), (randn(N, N, seed=3), randn(N, seed=4))
TASKS = torch.stack([matrix(), matrix(5), matrix(6)]), randn(3, N, seed=7)


def scalar(f: Function) -> Function:
    return lambda A, b: (f(A, b) * torch.arange(1.0, N + 1, dtype=b.dtype)).sin().sum()


def dual_tangent(f: Function) -> Any:
    with forward_ad.dual_level():
        A, b = map(forward_ad.make_dual, POINT, DIRECTION)
        return forward_ad.unpack_dual(f(A, b)).tangent


def backward_twice(f: Function) -> Any:
    leaves = [x.clone().requires_grad_() for x in POINT]
    first = torch.autograd.grad(scalar(f)(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(total(first), leaves)


def backward_of_dual(f: Function) -> Any:
    A, b = (x.clone().requires_grad_() for x in POINT)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(scalar(f)(forward_ad.make_dual(A, DIRECTION[0]), b)).tangent
        assert tangent is not None
    return torch.autograd.grad(tangent, (A, b))


def dual_of_backward(f: Function) -> Any:
    with forward_ad.dual_level():
        A = forward_ad.make_dual(POINT[0].clone().requires_grad_(), DIRECTION[0])
        (gradient,) = torch.autograd.grad(scalar(f)(A, POINT[1]), A, create_graph=True)
        return forward_ad.unpack_dual(gradient).tangent


def backward_of_vmap(f: Function) -> Any:
    leaves = [x.clone().requires_grad_() for x in TASKS]
    return torch.autograd.grad(vmap(scalar(f))(*leaves).sum(), leaves)


def backward_of_vmap_under_vmap(f: Function) -> Any:
    """The levels of the second vmap are not those of the first."""
    leaves = [x.clone().requires_grad_() for x in TASKS]
    values = vmap(scalar(f))(*leaves)
    return vmap(lambda g: torch.autograd.grad(values, leaves, g, retain_graph=True))(randn(4, 3))


BOTH = (0, 1)
COMPOSITIONS: dict[str, Callable[[Function], Any]] = {
    "value": lambda f: f(*POINT),
    "grad": lambda f: grad(scalar(f), BOTH)(*POINT),
    "jvp": lambda f: jvp(f, POINT, DIRECTION)[1],
    "jvp_A": lambda f: jvp(lambda A: f(A, POINT[1]), POINT[:1], DIRECTION[:1])[1],
    "jacrev": lambda f: jacrev(f, BOTH)(*POINT),
    "jacfwd": lambda f: jacfwd(f, BOTH)(*POINT),
    "dual": dual_tangent,
    "grad_grad": lambda f: grad(lambda A, b: total(grad(scalar(f), BOTH)(A, b)), BOTH)(*POINT),
    "hessian": lambda f: hessian(f, BOTH)(*POINT),
    "jacrev_jacrev": lambda f: jacrev(jacrev(f, BOTH), BOTH)(*POINT),
    "jacrev_jacfwd": lambda f: jacrev(jacfwd(f, BOTH), BOTH)(*POINT),
    "jacfwd_jacfwd": lambda f: jacfwd(jacfwd(f, BOTH), BOTH)(*POINT),
    "grad_A_of_jvp_b": lambda f: grad(lambda A: jvp(lambda b: scalar(f)(A, b), POINT[1:], DIRECTION[1:])[1])(POINT[0]),
    "backward_twice": backward_twice,
    "backward_of_dual": backward_of_dual,
    "dual_of_backward": dual_of_backward,
    "vmap": lambda f: vmap(f)(*TASKS),
    "vmap_grad": lambda f: vmap(grad(scalar(f), BOTH))(*TASKS),
    "vmap_grad_shared": lambda f: vmap(grad(scalar(f), BOTH), in_dims=(None, 0))(POINT[0], TASKS[1]),
    "grad_vmap": lambda f: grad(lambda A, b: vmap(f)(A, b).pow(3).sum(), BOTH)(*TASKS),
    "grad_vmap_shared": lambda f: grad(lambda A, b: vmap(f, (None, 0))(A, b).pow(3).sum(), BOTH)(POINT[0], TASKS[1]),
    "jvp_vmap_grad": lambda f: jvp(
        lambda A, b: vmap(grad(scalar(f), BOTH), in_dims=(None, 0))(A, b),
        (POINT[0], TASKS[1]),
        (DIRECTION[0], TASKS[1]),
    )[1],
    "grad_vmap_grad": lambda f: grad(lambda A, b: total(vmap(grad(scalar(f), BOTH), in_dims=(None, 0))(A, b)), BOTH)(
        POINT[0], TASKS[1]
    ),
    "vmap_hessian": lambda f: vmap(hessian(scalar(f), BOTH))(*TASKS),
    "vmap_jvp_jvp": lambda f: vmap(lambda A, b: jvp(lambda b: jvp(lambda A: f(A, b), (A,), (A,))[1], (b,), (b,))[1])(
        *TASKS
    ),
    "vmap_vjp_vmap": lambda f: vmap(vjp(vmap(f), *TASKS)[1])(randn(4, 3, N)),
    "backward_of_vmap": backward_of_vmap,
    "backward_of_vmap_under_vmap": backward_of_vmap_under_vmap,
    "third": lambda f: jacrev(jacfwd(jacrev(lambda b: f(POINT[0] + torch.diag(b), b))))(POINT[1]),
    "third_forward": lambda f: jacfwd(jacfwd(jacfwd(lambda b: f(POINT[0] + torch.diag(b), b))))(POINT[1]),
}


@pytest.mark.parametrize("composition", COMPOSITIONS.values(), ids=list(COMPOSITIONS))
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_derivatives(case, composition):
    actual, expected = (pytree.tree_leaves(composition(f)) for f in (case.implicit, case.truth))
    assert len(actual) == len(expected)
    assert max(b.abs().max() for b in expected) > 1e-3  # the comparison is of something
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("case", [CASES["linear_solve"], CASES["fixed_point"]], ids=["linear_solve", "fixed_point"])
def test_finite_differences(case):
    leaves = [x.clone().requires_grad_() for x in POINT]
    assert torch.autograd.gradcheck(case.implicit, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(case.implicit, leaves, check_fwd_over_rev=True, fast_mode=True)


def test_second_order_root():
    """f x^3 - x - 2 = 0 at f = 2, and the derivatives of the implicit function in closed form."""

    def x(f: Tensor) -> Tensor:
        return root(lambda x, f: f * x**3 - x - 2, torch.ones((), dtype=torch.float64), f, tol=1e-13).value

    f = torch.tensor(2.0, dtype=torch.float64)
    assert abs(x(f).item() - 1.1653730430624147) < EXACT
    for first in (grad(x), jacfwd(x)):
        assert abs(first(f).item() + 0.22139916266115015) < EXACT
        for second in (grad(first), jacfwd(first)):
            assert abs(second(f).item() - 0.15647898646262268) < EXACT
            assert abs(vmap(second)(torch.stack([f, f + 1]))[0].item() - 0.15647898646262268) < EXACT
