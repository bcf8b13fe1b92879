"""Solves and determinants: PyTorch's values and errors, and second derivatives that are right where PyTorch's are not.

The truth of a second derivative is reverse over reverse of PyTorch's own, which its double backward has right.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

from theria.curvature import hvp
from theria.curvature.second_order import second_order
from theria.meta import R2D2, SGD, Implicit, root

EXACT = 1e-9  # float64, condition numbers below 100
N = 4


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(actual: object, expected: object, tol: float = EXACT) -> None:
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def matrix(seed: int = 0) -> Tensor:
    return randn(N, N, seed=seed) + 3 * torch.eye(N, dtype=torch.float64)


B = randn(N, 2, seed=1)

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "solve": lambda A: torch.linalg.solve(A, A.sin() @ B).square().sum(),
    "solve, constant matrix's tangent": lambda A: torch.linalg.solve(A, B).sin().sum(),
    "solve, vector": lambda A: torch.linalg.solve(A, A[0]).square().sum(),
    "solve, right": lambda A: torch.linalg.solve(A, B.mT @ A, left=False).sin().sum(),
    "det": lambda A: torch.linalg.det(A).square(),
    "Tensor.det": lambda A: A.det().sin(),
    "slogdet": lambda A: torch.linalg.slogdet(A)[1].square(),
    "Tensor.slogdet": lambda A: A.slogdet().logabsdet.exp(),
    "logdet": lambda A: torch.logdet(A @ A.mT).square(),
}


def compositions(f: Callable[[Tensor], Tensor], A: Tensor, t: Tensor, u: Tensor) -> dict[str, Tensor]:
    """u'H t four ways."""

    def along_grad(A: Tensor) -> Tensor:
        return (grad(f)(A) * t).sum()

    def along_jvp(A: Tensor) -> Tensor:
        return jvp(f, (A,), (t,))[1]

    return {
        "grad(grad)": (grad(along_grad)(A) * u).sum(),
        "jvp(grad)": jvp(along_grad, (A,), (u,))[1],
        "grad(jvp)": (grad(along_jvp)(A) * u).sum(),
        "jvp(jvp)": jvp(along_jvp, (A,), (u,))[1],
    }


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("mapped", [False, True])
def test_second_derivatives_in_every_composition(name: str, mapped: bool) -> None:
    def f(A: Tensor) -> Tensor:
        return vmap(FUNCTIONS[name])(torch.stack([A, A + B @ B.mT])).sum() if mapped else FUNCTIONS[name](A)

    A, t, u = matrix(), randn(N, N, seed=2), randn(N, N, seed=3)
    truth = compositions(f, A, t, u)["grad(grad)"]
    for composition, value in compositions(second_order(f), A, t, u).items():
        torch.testing.assert_close(value, truth, rtol=EXACT, atol=EXACT, msg=lambda m, c=composition: f"{c}: {m}")


def test_values_are_those_of_torch() -> None:
    A, batch, b = matrix(), torch.stack([matrix(1), matrix(2), -matrix(3)]), randn(3, N, seed=4)
    swapped = A[[1, 0, 2, 3]]
    for function in (
        torch.linalg.solve,
        torch.linalg.det,
        torch.det,
        torch.linalg.slogdet,
        torch.slogdet,
        torch.logdet,
    ):
        given = ((A, B), (batch, B), (batch, b), (A, B[:, 0])) if function is torch.linalg.solve else ((A,), (batch,))
        for arguments in (*given, *(() if len(given) == 4 else ((swapped,), (A.float(),)))):
            expected = function(*arguments)
            actual = second_order(function)(*arguments)
            tol = EXACT if arguments[0].dtype == torch.float64 else 1e-5
            actual, expected = ((v,) if isinstance(v, Tensor) else tuple(v) for v in (actual, expected))
            torch.testing.assert_close(actual, expected, rtol=tol, atol=tol, equal_nan=True)


def test_what_does_not_fit_is_left_to_torch() -> None:
    for wrong in (lambda: torch.linalg.solve(B, B), lambda: torch.linalg.det(B), lambda: torch.logdet(B)):
        with pytest.raises(RuntimeError, match="square"):
            second_order(wrong)()
    with pytest.raises(RuntimeError, match=r"singular|is zero"):
        second_order(torch.linalg.solve)(torch.zeros(2, 2), torch.ones(2))
    assert second_order(torch.linalg.det)(torch.zeros(2, 2)) == 0
    z = torch.eye(2, dtype=torch.complex128)
    assert second_order(torch.linalg.slogdet)(z)[0].is_complex()


@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_reverse", "reverse_over_forward"])
@pytest.mark.parametrize(
    "f",
    [
        lambda K, y: y @ torch.cholesky_inverse(torch.linalg.cholesky(K)) @ y,
        lambda K, y: y @ torch.linalg.solve_ex(K, y)[0],
        lambda K, y: y @ torch.linalg.tensorsolve(K, y),
    ],
    ids=["cholesky_inverse", "solve_ex", "tensorsolve"],
)
def test_relatives_of_solve_have_the_second_derivative_of_the_inverse(f: Any, mode: str) -> None:
    torch.manual_seed(0)
    B, y, p, v = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 4), (4,), (2,), (2,)))

    def kernel(p: Tensor) -> Tensor:
        return B @ B.T * p[0].exp() + torch.eye(4, dtype=torch.float64) * p[1].exp()

    truth: Any = torch.autograd.functional.hvp(lambda p: y @ torch.linalg.inv(kernel(p)) @ y, p, v)[1]
    product = hvp(lambda p: f(kernel(p), y), p, v, mode=mode)  # type: ignore[arg-type]
    assert torch.allclose(product, truth, rtol=1e-9)


def test_an_equation_with_a_solve_in_it() -> None:
    """x = A(c)^-1 b as a root, whose second derivative differentiates the products of its Jacobian in reverse."""
    A, b, c = matrix(), B[:, 0], torch.tensor(0.4, dtype=torch.float64)

    def F(x: Tensor, c: Tensor) -> Tensor:
        return torch.linalg.solve(A + torch.diag(x.sin() * c), x) - b

    def by_inverse(x: Tensor, c: Tensor) -> Tensor:
        return torch.linalg.inv(A + torch.diag(x.sin() * c)) @ x - b

    found, truth = (
        hessian(lambda c, g=g: root(g, torch.zeros_like(b), c, tol=1e-12).value.square().sum())(c)
        for g in (F, by_inverse)
    )
    close(found, truth, 1e-7)


def test_an_inner_loss_with_a_log_determinant() -> None:
    """Implicit to second order: a Gaussian's precision, whose minimum is the inverse of the sample covariance."""
    S = randn(N, 9, seed=5)
    S = S @ S.mT / 9 + torch.eye(N, dtype=torch.float64)

    def loss(p: dict[str, Tensor], scale: Tensor) -> Tensor:
        return (p["P"] * S * scale).sum() - torch.logdet(p["P"])

    def h(scale: Tensor) -> Tensor:
        start = {"P": torch.linalg.inv(S)}
        return Implicit().solve(loss, start, scale, SGD(0.1), {}, 0)["P"].diagonal().sum()

    trace, one = torch.linalg.inv(S).diagonal().sum(), torch.ones((), dtype=torch.float64)
    close(grad(h)(one), -trace, 1e-5)  # P = S^-1 / scale; CG to 1e-6
    close(hessian(h)(one), 2 * trace, 1e-4)


@pytest.mark.parametrize("shots", [1, 6], ids=["S < d", "S >= d"])
def test_r2d2_in_every_composition(shots: int) -> None:
    """The outer loss with respect to the embedding's weights: reverse over reverse is the truth."""
    ways, d = 2, 4
    embed = torch.nn.Linear(3, d).double()
    learner = R2D2(embed, torch.nn.functional.cross_entropy, ways=ways)
    x, q = randn(2, ways * shots, 3, seed=6), randn(2, ways, 3, seed=7)
    y, label = torch.arange(ways).repeat(2, shots), torch.arange(ways).repeat(2, 1)
    meta = {k: p.detach() for k, p in learner.named_parameters()}

    def f(weight: Tensor) -> Tensor:
        return learner.outer_loss({**meta, "model.weight": weight}, (x, y, q, label))

    found = compositions(f, meta["model.weight"], randn(d, 3, seed=8), randn(d, 3, seed=9))
    for value in found.values():
        close(value, found["grad(grad)"])
    close(hessian(f)(meta["model.weight"]), torch.func.jacrev(grad(f))(meta["model.weight"]))
