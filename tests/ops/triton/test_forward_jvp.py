"""Output and tangent by one kernel: against the closed formulas in float64, and where forward mode takes it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor

from tests.ops.triton.calls import (
    DEVICE,
    MASKS,
    NEG_INF,
    SHAPES,
    call,
    error,
    exact,
    exact_tangents,
    make,
    masks,
    random_call,
)
from theria.ops import autograd, reference, sdpa, sdpa_jvp
from theria.ops.operands import Operands, Tangents
from theria.ops.triton.forward_jvp import forward_jvp
from theria.ops.triton.tiles import Tile, override

# Relative, in the norm. float32: rounding of a chain of three products. float16: 2⁻¹¹ of P, of P̃∘tS and of the results.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
ROWS = 2e-6  # lse and tau are float32 in both, from exact products
SMALL = [Tile(16, 16, 1, 1), Tile(32, 16, 1, 1), Tile(16, 32, 1, 1, held=True)]
SUBSETS = list(itertools.product((False, True), repeat=3))
attend: Callable[..., Tensor] = partial(sdpa, backend="triton")
truth: Callable[..., Tensor] = partial(sdpa, backend="reference")

pytestmark = pytest.mark.usefixtures("poisoned")


def direction(ops: Operands, present: tuple[bool, ...] = (True, True, True)) -> Tangents:
    given = zip(ops[:3], present, strict=True)
    return Tangents(*(make(*x.shape, dtype=x.dtype) if here else None for x, here in given))


def check(ops: Operands, spec: Any, t: Tangents | None = None) -> tuple[Tensor, ...]:
    t = direction(ops) if t is None else t
    results = forward_jvp(ops, t, spec)
    t64 = exact_tangents(t)
    o, lse = reference.forward(exact(ops), spec)
    expected = (o, lse, *reference.jvp(exact(ops), o, lse, t64, spec))
    for x, y, tolerance in zip(results, expected, (TOLERANCE[ops.q.dtype], ROWS) * 2, strict=True):
        assert x.dtype == (torch.float32 if tolerance is ROWS else ops.q.dtype)
        assert error(x, y) <= tolerance
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_closed_formulas(shape: tuple[int, int, int, int], causal: bool, dtype: torch.dtype) -> None:
    check(*random_call(*shape, dtype=dtype, is_causal=causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("tile", "dtype"), list(zip(SMALL, (torch.float32, torch.float32, torch.float16), strict=True))
)
def test_several_tiles(tile: Tile, dtype: torch.dtype, causal: bool) -> None:
    """The diagonal and both tails cross tiles, and the maxima of rows move."""
    with override("forward_jvp", tile):
        for N, M in ((40, 40), (50, 19)) if causal else ((37, 45),):
            check(*random_call(N, M, 8, 5, lead=(1,), dtype=dtype, is_causal=causal))


def test_rising_scores() -> None:
    """Every tile raises the maximum, so that what came before shrinks."""
    q, k, v = make(1, 33, 8), make(1, 40, 8), make(1, 40, 5)
    k[0, :, 0] = torch.arange(40, device=DEVICE)
    q[0, :, 0] = 2.0
    with override("forward_jvp", SMALL[0]):
        check(*call(q, k, v))


@pytest.mark.parametrize("present", SUBSETS[1:])
def test_absent_tangents(present: tuple[bool, ...]) -> None:
    ops, spec = random_call(3, 5, 4, 2, lead=(1,))
    *_, tau = check(ops, spec, direction(ops, present))
    if not any(present[:2]):
        assert torch.equal(tau, torch.zeros_like(tau))


@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind: str) -> None:
    check(*random_call(9, 21, 8, 8, lead=(2, 2), mask=masks(9, 21)[kind]))


def test_a_row_that_sees_no_key() -> None:
    mask = torch.rand(1, 9, 40, device=DEVICE) > 0.3
    mask[0, 4] = False
    mask[0, 5, :20] = False  # the first tile of another
    with override("forward_jvp", SMALL[0]):
        o, lse, to, tau = check(*random_call(9, 40, 8, 8, lead=(1,), mask=mask))
    assert lse[0, 4] == NEG_INF
    assert tau[0, 4] == 0
    for x in (o, to):
        assert torch.equal(x[0, 4], torch.zeros_like(x[0, 4]))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive(scale: float) -> None:
    check(*random_call(9, 21, 8, 8, scale=scale))


def test_dropout() -> None:
    check(*random_call(13, 23, 8, 8, lead=(3, 2), p=0.4))


def test_grouped_and_strided_operands() -> None:
    q, k, v = (
        make(2, 13, 2, 3, 8).permute(0, 2, 3, 1, 4),
        make(2, 21, 2, 1, 8).permute(0, 2, 3, 1, 4),
        make(2, 1, 1, 21, 5),
    )
    o, _, to, _ = check(*call(q, k, v))
    assert o.stride() == to.stride()


# Where it is taken.


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the rules that are called."""
    names: list[str] = []
    original = autograd.call

    def call(name: str, *args: Any) -> Any:
        names.append(name)
        return original(name, *args)

    monkeypatch.setattr(autograd, "call", call)
    return names


def sample() -> tuple[Any, Any]:
    x = make(2, 9, 8), make(2, 7, 8), make(2, 7, 5)
    return x, tuple(make(*a.shape) for a in x)


def assert_close(results: Any, expected: Any, tolerance: float = 5e-6) -> None:
    for x, y in zip(results, expected, strict=True):
        assert error(x, y) <= tolerance


def wide(xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() for x in xs)


def test_forward_mode_takes_it(called: list[str]) -> None:
    x, t = sample()
    expected = torch.func.jvp(truth, wide(x), wide(t))
    called.clear()
    assert_close(torch.func.jvp(attend, x, t), expected)
    with fwad.dual_level():
        assert_close(fwad.unpack_dual(attend(*map(fwad.make_dual, x, t))), expected)
    assert_close((sdpa_jvp(*x, *t, backend="triton")[0],), expected[1:])
    assert called == ["forward_jvp"] * 3


def test_between_other_functions(called: list[str]) -> None:
    """A tangent that comes from elsewhere and goes on; operands without one, two that are one tensor."""
    (q, k, v), (t, *_) = sample()

    def through(attend: Any, k: Tensor, v: Tensor) -> Any:
        return lambda q: attend(torch.tanh(2 * q), k, v).square().sum(-1) + attend(q, q, q).sum(-1)

    expected = torch.func.jvp(through(truth, k.double(), v.double()), (q.double(),), (t.double(),))
    called.clear()
    assert_close(torch.func.jvp(through(attend, k, v), (q,), (t,)), expected)
    assert called == ["forward_jvp"] * 2


def test_not_where_more_is_differentiated(called: list[str]) -> None:
    x, t = sample()
    required = [a.clone().requires_grad_() for a in x]
    tangent = torch.func.jvp(attend, tuple(required), t)[1]
    grads = torch.autograd.grad(tangent.square().sum(), required)
    exact = [a.double().requires_grad_() for a in x]
    truth_tangent = torch.func.jvp(truth, tuple(exact), wide(t))[1]
    assert_close(grads, torch.autograd.grad(truth_tangent.square().sum(), exact))

    def nested(attend: Any, x: tuple[Tensor, ...], t: tuple[Tensor, ...]) -> Any:
        return torch.func.jvp(lambda *y: torch.func.jvp(attend, y, t)[1], x, t)

    assert_close(nested(attend, x, t), nested(truth, wide(x), wide(t)))
    assert "forward_jvp" not in called


def test_without_grad_mode_what_requires_grad_is_a_constant(called: list[str]) -> None:
    x, t = sample()
    required = tuple(a.clone().requires_grad_() for a in x)
    with torch.no_grad():
        results = torch.func.jvp(attend, required, t)
    assert_close(results, torch.func.jvp(truth, wide(x), wide(t)))
    assert called[0] == "forward_jvp"


def test_no_tangent_and_zero_tangents(called: list[str]) -> None:
    x, t = sample()
    with fwad.dual_level():
        assert fwad.unpack_dual(attend(*x)).tangent is None
    assert called == ["forward"]
    zero = torch._C._VariableFunctions._efficientzerotensor(t[0].shape, device=DEVICE)  # type: ignore[attr-defined]
    with fwad.dual_level():
        dual = attend(fwad.make_dual(x[0], zero), fwad.make_dual(x[1], t[1]), x[2])
        results = fwad.unpack_dual(dual)
    q, k, v = wide(x)
    assert_close(results, torch.func.jvp(lambda k: truth(q, k, v), (k,), (t[1].double(),)))


def test_many_tangents_of_one_call() -> None:
    x, t = sample()
    many = torch.stack([t[0], 2 * t[0]])

    def push(attend: Any, x: tuple[Tensor, ...]) -> Any:
        return lambda t: torch.func.jvp(lambda q: attend(q, *x[1:]), x[:1], (t,))[1]

    results = torch.func.vmap(push(attend, x))(many)
    assert_close(results, torch.func.vmap(push(truth, wide(x)))(many.double()))


def test_explicit_tangents_stay_differentiable() -> None:
    x, t = sample()
    required = [a.clone().requires_grad_() for a in x]
    to, _ = sdpa_jvp(*required, *t, backend="triton")
    exact = [a.double().requires_grad_() for a in x]
    to64, _ = sdpa_jvp(*exact, *wide(t), backend="reference")
    grads = torch.autograd.grad(to.square().sum(), required)
    assert_close(grads, torch.autograd.grad(to64.square().sum(), exact))
