"""The jvp and tdQ in one walk over the keys, against the closed formula in float64; and which calls it is for."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from tests.ops.triton.calls import (
    DEVICE,
    MASKS,
    SHAPES,
    Case,
    by_reference,
    call,
    case,
    error,
    make,
    masks,
    random_call,
    truth_of,
)
from theria.ops import ArgumentError, sdpa, sdpa_hvp, sdpa_vjp
from theria.ops.operands import AttentionSpec, Operands, Tangents, batch_shape
from theria.ops.triton import jvp_dq as module
from theria.ops.triton import rules
from theria.ops.triton.forward import forward
from theria.ops.triton.tiles import Tile, override
from theria.ops.triton.vjp import vjp
from theria.testing import difference

HALF = torch.float16
# Relative, in the norm: 2⁻¹¹ of P, dS, W, O, dQ and the results.
TOLERANCE = 2e-3
MOVING = [(s, causal) for s in SHAPES for causal in (False, True) if s[1] > 1 and not (causal and s[0] == 1)]
# Error over that of plain PyTorch in float16, which rounds every intermediate array.
THREE_WAY = 1.0
SMALL = [Tile(16, 16, 1, 1), Tile(32, 16, 1, 1), Tile(16, 32, 1, 1, held=True)]
LONG = 300  # keys that do not fit the short kernels

pytestmark = pytest.mark.usefixtures("poisoned")


def run(c: Case) -> tuple[Any, ...]:
    """The same by the kernels, from what the kernels of lower order give."""
    o, lse = forward(c.ops, c.spec)
    dq = vjp(c.ops, o, lse, c.do, c.spec, c.shapes)[0]
    assert dq is not None
    assert module.takes(c.ops, o, c.do, dq, c.shapes[0])
    return module.jvp_hvp(c.ops, o, lse, c.do, dq, c.t, c.tdo, c.spec, c.shapes)[:5]


def check(c: Case) -> tuple[Any, ...]:
    actual = run(c)
    for x, x64 in zip(actual, truth_of(c), strict=True):
        assert error(x, x64) <= TOLERANCE
    return actual


def half(*shape: int, **options: Any) -> tuple[Operands, AttentionSpec]:
    N, M, D, E = shape
    return random_call(N, M, D, E, dtype=HALF, **options)


@pytest.mark.parametrize(("shape", "causal"), MOVING)
def test_it_is_the_closed_formula(shape: tuple[int, ...], causal: bool) -> None:
    check(case(*half(*shape, lead=(1,), is_causal=causal)))


@pytest.mark.parametrize(("N", "M", "causal"), [(37, 45, False), (40, 40, True), (19, 50, True), (50, 19, True)])
@pytest.mark.parametrize("tile", SMALL)
def test_several_tiles(tile: Tile, N: int, M: int, causal: bool) -> None:
    with override("jvp_dq", tile):
        check(case(*half(N, M, 8, 5, lead=(1,), is_causal=causal)))


@pytest.mark.parametrize("present", [p for p in itertools.product((False, True), repeat=4) if any(p[:3])])
def test_absent_tangents(present: tuple[bool, ...]) -> None:
    """What does not move is zero to the last bit."""
    _, tau, *_ = check(case(*half(9, 21, 8, 5, lead=(1,)), present))
    tq, tk, *_ = present
    assert tau.any() == (tq or tk)


@pytest.mark.parametrize("rows", [256, 40])
def test_row_statistics_by_the_kernel_and_by_a_pass_of_their_own(rows: int) -> None:
    """256 rows need no padding: tdK and tdV then read what this kernel has left."""
    with override("jvp_dq", Tile(64, 64, 1, 1)):
        check(case(*half(rows, 33, 8, 8, lead=(1,))))


@pytest.mark.parametrize("kind", [kind for kind in MASKS if "additive" not in kind])
def test_boolean_masks(kind: str) -> None:
    check(case(*half(9, 21, 8, 8, lead=(2, 2), mask=masks(9, 21)[kind])))


def test_a_row_that_sees_nothing() -> None:
    mask = torch.rand(1, 9, 21, device=DEVICE) > 0.3
    mask[0, 4] = False
    to, tau, tdq, *_ = check(case(*half(9, 21, 8, 8, lead=(1,), mask=mask)))
    assert not to[:, 4].any()
    assert not tau[:, 4].any()
    assert not tdq[:, 4].any()


@pytest.mark.parametrize("causal", [False, True])
def test_grouped_queries(causal: bool) -> None:
    q, k, v = (make(*shape, dtype=HALF) for shape in ((2, 2, 3, 9, 8), (2, 2, 1, 21, 8), (2, 2, 1, 21, 5)))
    check(case(*call(q, k, v, is_causal=causal)))


@pytest.mark.parametrize("magnitude", [2, 8, 16])
def test_large_scores(magnitude: int) -> None:
    """P of a row is all on one key, and what tau and tdelta take from the sums of the row is nearly all of them."""
    ops, spec = half(20, 70, 16, 16, lead=(8,))
    c = case(ops._replace(k=ops.k * magnitude), spec)
    for x, other, x64 in zip(run(c), by_reference(c), truth_of(c), strict=True):
        assert error(x, x64) <= THREE_WAY * error(other, x64)


def test_several_directions_at_one_point() -> None:
    """As ``vmap`` over cotangents gives them: operands, residuals and dQ are broadcast."""
    c = case(*half(9, 21, 8, 5, lead=(1,)))
    t = Tangents(*(make(3, *x.shape[1:], dtype=HALF) for x in c.ops[:3]))
    c = c._replace(t=t, tdo=None)
    ops, o, lse = c.ops, *forward(c.ops, c.spec)
    dq = vjp(ops, o, lse, c.do, c.spec, c.shapes)[0]
    assert dq is not None
    shapes = (*(x.shape for x in t[:3] if x is not None), None)
    many = module.jvp_hvp(ops, o, lse, c.do, dq, t, None, c.spec, shapes)  # type: ignore[arg-type]
    for i in range(3):
        one = truth_of(c._replace(t=Tangents(*(None if x is None else x[i : i + 1] for x in t))))
        for x, x64 in zip(many[:5], one, strict=True):
            assert x is not None
            assert error(x[i : i + 1], x64) <= TOLERANCE


def refused() -> dict[str, tuple[Operands, Any]]:
    """Calls that are not for this kernel, and the shape of dQ that they have."""
    plain = half(9, 21, 8, 5)[0]
    shared = plain._replace(q=plain.q[:1])
    return {
        "no dQ": (plain, None),
        "float32": (random_call(9, 21, 8, 5)[0], (2, 9, 8)),
        "dropout": (half(9, 21, 8, 5, p=0.3)[0], (2, 9, 8)),
        "an additive mask": (half(9, 21, 8, 5, mask=make(1, 9, 21, dtype=HALF))[0], (2, 9, 8)),
        "wide": (half(9, 21, 65, 5)[0], (2, 9, 65)),
        "wide values": (half(9, 21, 5, 65)[0], (2, 9, 5)),
        "dQ that is a sum": (shared, (1, 9, 8)),
    }


@pytest.mark.parametrize("name", list(refused()))
def test_calls_that_it_is_not_for(name: str) -> None:
    """The two kernels of one thing each take them: see the tests of the rules."""
    ops, shape = refused()[name]
    dtype = ops.q.dtype
    o = make(*batch_shape(*ops[:3]), 9, ops.v.shape[-1], dtype=dtype)
    dq = None if shape is None else make(*shape, dtype=dtype)
    assert not module.takes(ops, o, torch.ones_like(o), dq, ops.q.shape)


def long() -> tuple[Tensor, ...]:
    """q, k, v, do, and a direction of q, k, v, do of a call that the short kernels do not take."""
    shapes = ((2, 20, 8), (2, LONG, 8), (2, LONG, 5), (2, 20, 5))
    return tuple(make(*shape, dtype=HALF) for shape in (*shapes, *shapes))


def attend(backend: str, *x: Tensor) -> Tensor:
    return sdpa(*(a[None] for a in x), backend=backend)[0]  # type: ignore[arg-type]


def double_backward(backend: str, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors[:4]]
    first = torch.autograd.grad(attend(backend, *leaves[:3]), leaves[:3], leaves[3], create_graph=True)
    return list(torch.autograd.grad(first, leaves, tensors[4:7]))


def forward_over_reverse(backend: str, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    def gradients(*x: Tensor) -> tuple[Tensor, ...]:
        return grad(lambda q, k, v: (attend(backend, q, k, v) * x[3]).sum(), argnums=(0, 1, 2))(*x[:3])

    return list(jvp(gradients, tensors[:4], tensors[4:])[1])


def mapped(backend: str, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Two directions at one point."""
    directions = [torch.stack([x, 2 * x]) for x in tensors[4:7]]
    leaves = [x.detach().requires_grad_() for x in tensors[:4]]
    first = torch.autograd.grad(attend(backend, *leaves[:3]), leaves[:3], leaves[3], create_graph=True)

    def along(tq: Tensor, tk: Tensor, tv: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(first, leaves, (tq, tk, tv), retain_graph=True)

    return list(vmap(along)(*directions))


def explicit(backend: str, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    dq, *_ = sdpa_vjp(*tensors[:4], backend=backend)
    return list(sdpa_hvp(*tensors, dquery=dq, backend=backend))


@pytest.mark.parametrize("order", [double_backward, forward_over_reverse, mapped, explicit])
def test_who_has_dq_at_hand_uses_it(order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, taken = long(), []
    host = module.jvp_hvp
    monkeypatch.setattr(module, "jvp_hvp", lambda *args: (taken.append(args), host(*args))[1])
    results = order("triton", tensors)
    assert len(taken) == 1
    exact_results = order("reference", tuple(x.double() for x in tensors))
    assert difference(results, exact_results) <= TOLERANCE


def test_a_compiled_tangent_of_gradients_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, taken = long(), []
    expected = forward_over_reverse("triton", tensors)
    host = module.jvp_hvp
    monkeypatch.setattr(module, "jvp_hvp", lambda *args: (taken.append(args), host(*args))[1])
    compiled = torch.compile(partial(forward_over_reverse, "triton"), fullgraph=True, backend="aot_eager")
    results = compiled(tensors)
    assert len(taken) == 1
    assert all(x.equal(y) for x, y in zip(results, expected, strict=True))


def test_an_explicit_dq_looks_like_the_query() -> None:
    q, k, v, do, tq, *_ = long()
    with pytest.raises(ArgumentError, match=r"dquery has shape \(2, 19, 8\); \(2, 20, 8\) is needed"):
        sdpa_hvp(q, k, v, do, tq, dquery=q[:, 1:], backend="triton")


def test_dq_that_was_overwritten_is_refused() -> None:
    """As the saved output of any operation of PyTorch."""
    q, k, v, do, *t = long()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    first = torch.autograd.grad(attend("triton", *leaves), leaves, do, create_graph=True)
    first[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(first, leaves, t[:3])


@pytest.mark.parametrize(("backend", "keys"), [("custom", LONG), ("triton", 20)])
def test_dq_is_kept_only_where_it_is_used(backend: str, keys: int) -> None:
    """Elsewhere it may be overwritten, and its memory is free."""
    q, k, v, do, *t = long()
    leaves = [x.requires_grad_() for x in (q, k[:, :keys].detach(), v[:, :keys].detach())]
    t = [x[:, : like.shape[1]] for x, like in zip(t, leaves, strict=False)]
    results = []
    for factor in (1, 2):
        first = torch.autograd.grad(attend(backend, *leaves), leaves, do, create_graph=True)
        first[0].mul_(factor)
        results.append(torch.autograd.grad(first, leaves, (t[0] / factor, *t[1:])))
    assert difference(results[1], results[0]) <= TOLERANCE


def test_two_kernels_and_one_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case(*half(40, LONG, 8, 5))
    o, lse = rules.forward(c.ops, c.spec)
    dq = rules.vjp(c.ops, o, lse, c.do, c.spec, c.shapes)[0]
    one = rules.jvp_hvp(c.ops, o, lse, c.do, dq, c.t, c.tdo, c.spec, c.shapes)
    two = rules.jvp_hvp(c.ops, o, lse, c.do, None, c.t, c.tdo, c.spec, c.shapes)
    assert difference(one[:5], two[:5]) <= TOLERANCE
