"""`recompute` and the adjoints made of it or like it: every composition of grad and jvp, to third order, in float64.

PyTorch runs the `jvp` of a custom Function with forward mode off: what its plain operations do there is lost to the
levels outside, without an error.
"""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from theria.meta import SGD, FirstOrder, MixedMode, Truncated, Unrolled
from theria.meta.adjoint import Adjoint
from theria.meta.constant import constant
from theria.meta.recompute import recompute

EXACT = 1e-11
POINT = torch.tensor(0.7, dtype=torch.float64)
Scalar = Callable[[Tensor], Tensor]


def forward(f: Scalar) -> Scalar:
    return lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]


def mapped(f: Scalar) -> Scalar:
    return lambda x: vmap(f)(torch.stack([x, 2 * x])).sum()


OPERATORS: dict[str, Callable[[Scalar], Scalar]] = {"grad": grad, "jvp": forward}
COMPOSITIONS = [names for n in (1, 2, 3) for names in product(OPERATORS, repeat=n)]


def derivative(f: Scalar, names: tuple[str, ...]) -> Tensor:
    for name in names:
        f = OPERATORS[name](f)
    return f(POINT)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("names", COMPOSITIONS, ids="-".join)
def test_recompute(names: tuple[str, ...]) -> None:
    def f(x: Tensor) -> Tensor:
        return x.sin() * x.square()

    def again(x: Tensor) -> Tensor:
        return recompute(lambda x: (f(x),), x)[0]

    close(derivative(again, names), derivative(f, names))
    close(derivative(mapped(again), names), derivative(mapped(f), names))


def after_steps(adjoint: Adjoint) -> Scalar:
    def inner_loss(p: dict[str, Tensor], c: Tensor) -> Tensor:
        return p["z"] ** 4 / 4 + (p["z"] * c).sin()

    return lambda c: adjoint.solve(inner_loss, {"z": 2 * c}, c, SGD(0.1), {}, 3)["z"].square()


@pytest.mark.parametrize("names", COMPOSITIONS, ids="-".join)
def test_checkpoints_and_truncation_that_drop_nothing(names: tuple[str, ...]) -> None:
    expected = derivative(after_steps(Unrolled()), names)
    close(derivative(after_steps(Unrolled(checkpoint_every=2)), names), expected)
    close(derivative(after_steps(Truncated(3)), names), expected)


@pytest.mark.parametrize("names", COMPOSITIONS, ids="-".join)
def test_constants_are_constant_in_every_composition(names: tuple[str, ...]) -> None:
    """FirstOrder's steps too: theta_3 = 2 c - constants."""
    value = POINT.exp()
    close(derivative(lambda x: x.square() * constant(x.exp()), names), derivative(lambda x: x.square() * value, names))
    shift = after_steps(FirstOrder())(POINT).sqrt() - 2 * POINT
    close(derivative(after_steps(FirstOrder()), names), derivative(lambda c: (2 * c + shift).square(), names))


@pytest.mark.parametrize("names", [names for names in COMPOSITIONS if names != ("grad",)], ids="-".join)
def test_mixed_mode_refuses_what_it_cannot_do(names: tuple[str, ...]) -> None:
    with pytest.raises(NotImplementedError, match="MixedMode"):
        derivative(after_steps(MixedMode()), names)
