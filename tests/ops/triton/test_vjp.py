"""The kernels of the cotangents against the closed formula in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.ops.triton.calls import DEVICE, MASKS, NEG_INF, SHAPES, call, error, exact, make, masks, random_call
from theria.ops import blockwise, reference
from theria.ops.operands import Tangents
from theria.ops.triton import cotangents
from theria.ops.triton import vjp as module
from theria.ops.triton.forward import forward
from theria.ops.triton.launch import Frame
from theria.ops.triton.row_stats import row_stats
from theria.ops.triton.tiles import Tile, override
from theria.ops.triton.vjp import vjp

# Relative, in the norm. float32: rounding of a chain of three products. float16: 2⁻¹¹ of O, P, dS and of the results.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
# Error over that of plain PyTorch in float16, which rounds every intermediate array.
THREE_WAY = 1.0
# Scores up to s are rounded to s·2⁻²⁴, and with them P.
ROUNDING = 2.0**-24
ALL = (True, True, True)
# Every row sees more than one key; see test_the_only_key_that_a_row_sees_moves_nothing.
MOVING = [(s, causal) for s in SHAPES for causal in (False, True) if s[1] > 1 and not (causal and s[0] == 1)]

pytestmark = pytest.mark.usefixtures("poisoned")


def run(ops, spec, wanted=ALL, do=None, rule=vjp) -> Any:
    """What the rule and the reference say of dq, dk, dv, from the kernel's own o and lse."""
    o, lse = forward(ops, spec)
    do = make(*o.shape, dtype=o.dtype) if do is None else do
    q, k, v = (x.shape if want else None for x, want in zip(ops[:3], wanted, strict=True))
    shapes = (q, k, v, None)
    truth = reference.vjp(exact(ops), o, lse, do.double(), spec, shapes)
    return rule(ops, o, lse, do, spec, shapes), truth


def check(ops, spec, wanted=ALL, do=None, tolerance=0.0) -> Any:
    actual, truth = run(ops, spec, wanted, do)
    for x, x64 in zip(actual, truth, strict=True):
        assert (x is None) == (x64 is None)
        if x is not None:
            assert x.dtype == ops.q.dtype
            assert error(x, x64) <= TOLERANCE[x.dtype] + tolerance
    return actual


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "causal"), MOVING)
def test_it_is_the_closed_formula(shape, causal, dtype):
    check(*random_call(*shape, dtype=dtype, is_causal=causal))


@pytest.mark.parametrize(("shape", "causal"), [((9, 1, 4, 4), False), ((1, 70, 4, 4), True)])
def test_the_only_key_that_a_row_sees_moves_nothing(shape, causal):
    """dq and dk vanish: what is left is the rounding of o, of the size of dv."""
    (dq, dk, dv, _), truth = run(*random_call(*shape, is_causal=causal))
    assert error(dv, truth[2]) <= TOLERANCE[dv.dtype]
    assert max(dq.abs().max(), dk.abs().max()) <= TOLERANCE[dv.dtype] * dv.abs().max()


def test_half_precision_is_no_worse_than_plain_pytorch():
    ops, spec = random_call(60, 130, 32, 32, dtype=torch.float16)
    do = make(2, 60, 32, dtype=torch.float16)
    actual, truth = run(ops, spec, do=do)
    inputs = [x.clone().requires_grad_() for x in ops[:3]]
    plain = torch.autograd.grad(
        reference.forward(ops._replace(q=inputs[0], k=inputs[1], v=inputs[2]), spec)[0], inputs, do
    )
    for x, x16, x64 in zip(actual[:3], plain, truth[:3], strict=True):
        assert error(x, x64) <= THREE_WAY * error(x16, x64)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "tile", [Tile(16, 64, 4, 2), Tile(64, 16, 4, 2, anchored=True), Tile(32, 32, 4, 2, True), Tile(64, 16, 4, 2)]
)
def test_tiles_of_other_shapes(tile, causal):
    with override("vjp_dq", tile), override("vjp_dkv", tile), override("row_stats", tile):
        check(*random_call(70, 90, 8, 8, lead=(1,), is_causal=causal))


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)))
def test_what_is_not_wanted_is_not_computed(wanted, monkeypatch):
    launched = []
    launch = cotangents.launch
    monkeypatch.setattr(cotangents, "launch", lambda kernel, *args: (launched.append(kernel), launch(kernel, *args)))
    check(*random_call(5, 7, 4, 3), wanted)
    dq, dk, dv = wanted
    expected = [module.vjp_dq_kernel] * dq + [module.vjp_dkv_kernel] * (dk or dv)
    assert launched == expected


@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind):
    check(*random_call(9, 70, 8, 8, lead=(2, 2), mask=masks(9, 70)[kind]))


@pytest.mark.parametrize("kind", ["boolean", "additive, keys"])
def test_masks_with_causality(kind):
    check(*random_call(70, 9, 8, 8, lead=(2, 2), mask=masks(70, 9)[kind], is_causal=True))


def test_a_mask_may_be_more_precise_than_the_operands():
    check(*random_call(9, 70, 8, 8, dtype=torch.float16, mask=make(1, 9, 70) / 7))


@pytest.mark.parametrize("additive", [False, True])
def test_what_sees_nothing_and_what_is_not_seen_get_zero(additive):
    mask = torch.rand(1, 9, 70, device=DEVICE) > 0.3
    mask[0, 4] = False
    mask[0, :, 13] = False
    if additive:
        mask = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, NEG_INF)
    dq, dk, dv, _ = check(*random_call(9, 70, 8, 8, mask=mask))
    for x in (dq[:, 4], dk[:, 13], dv[:, 13]):
        assert torch.equal(x, torch.zeros_like(x))


def test_without_keys_it_is_zero():
    dq, dk, dv, _ = run(*random_call(5, 0, 8, 4))[0]
    assert torch.equal(dq, torch.zeros_like(dq))
    assert (dk.shape, dv.shape) == ((2, 0, 8), (2, 0, 4))


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_any_scale(scale):
    check(*random_call(20, 70, 8, 8, scale=scale))


def test_large_scores():
    ops, spec = call(make(1, 20, 8), make(1, 70, 8) * 30, make(1, 70, 8), scale=1.0)
    size = reference.scores(exact(ops), spec).abs().max().item()
    check(ops, spec, tolerance=4 * size * ROUNDING)


def test_dropout_is_that_of_custom():
    ops, spec = random_call(9, 70, 8, 8, lead=(2, 2), p=0.3)
    do = make(2, 2, 9, 8)
    actual = check(ops, spec, do=do)
    expected, _ = run(ops, spec, do=do, rule=blockwise.vjp)
    for x, y in zip(actual[:3], expected[:3], strict=True):
        assert error(x, y.double()) <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"p": 0.3}])
@pytest.mark.parametrize("key_heads", [1, 2])
def test_grouped_queries(key_heads, options):
    """The group is summed in the kernel: what it writes has the shape of the keys."""
    q, k, v = make(1, key_heads, 2, 33, 8), make(1, key_heads, 1, 70, 8), make(1, key_heads, 1, 70, 5)
    check(*call(q, k, v, make(1, 1, 2, 1, 70), **options))


@pytest.mark.parametrize("wanted", [(False, True, False), (False, False, True)])
def test_grouped_queries_with_one_cotangent(wanted):
    check(*call(make(1, 2, 3, 9, 8), make(1, 2, 1, 21, 8), make(1, 2, 1, 21, 8)), wanted)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((2, 3), (1, 3), (1, 1)),
        ((1, 1), (2, 1), (1, 3)),
        ((1, 1), (1, 1), (4, 1)),
        ((), (), ()),
        ((2, 1, 2, 1, 3),) * 3,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_leading_dimensions_broadcast(q, k, v, dtype):
    check(*call(make(*q, 5, 4, dtype=dtype), make(*k, 7, 4, dtype=dtype), make(*v, 7, 3, dtype=dtype)))


def test_strided_inputs_are_read_in_place(monkeypatch):
    q, k, v, do = (make(2, 20, 3, 8).transpose(1, 2) for _ in range(4))
    ops, spec = call(q, k, v)
    o, lse = forward(ops, spec)
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda x: contiguous(x) if x.is_contiguous() else pytest.fail("an input was copied")
    )
    grads = vjp(ops, o, lse, do, spec, (q.shape, k.shape, v.shape, None))
    truth = reference.vjp(exact(ops), o, lse, do.double(), spec, (q.shape, k.shape, v.shape, None))
    for x, x64, like in zip(grads[:3], truth[:3], (q, k, v), strict=True):
        assert x is not None
        assert x64 is not None
        assert x.stride() == like.stride()
        assert error(x, x64) <= TOLERANCE[x.dtype]


def test_a_cotangent_without_strides():
    """What ``o.sum().backward()`` gives."""
    check(*random_call(20, 70, 8, 8), do=torch.ones((), device=DEVICE).expand(2, 20, 8))


def test_row_stats():
    """delta and tdelta of the rows that exist; those that fill up a block have lse = ∞."""
    ops, spec = random_call(37, 5, 4, 24)
    o, do, tdo, to = (make(2, 37, 24) for _ in range(4))
    lse, tau = make(2, 37), make(2, 37)
    o64, do64, tdo64, to64 = (x.double() for x in (o, do, tdo, to))
    delta, tdelta = (do64 * o64).sum(-1), (do64 * to64).sum(-1)
    first = row_stats(Frame(ops, spec, o=o, do=do), lse)
    second = row_stats(Frame(ops, spec, o=o, do=do, to=to), lse, tau)
    whole = row_stats(Frame(ops, spec, o=o, do=do, to=to, tdo=tdo), lse, tau)
    for stats, tangent in ((first, None), (second, tdelta), (whole, tdelta + (tdo64 * o64).sum(-1))):
        assert torch.equal(stats[:, :37, 0], lse)
        assert error(stats[:, :37, 1], delta) <= TOLERANCE[torch.float32]
        assert (stats[:, 37:, 0] == float("inf")).all()
        if tangent is not None:
            assert torch.equal(stats[:, :37, 2], tau)
            assert error(stats[:, :37, 3], tangent) <= TOLERANCE[torch.float32]


def test_it_is_the_adjoint_of_the_jvp():
    """⟨w, J t⟩ = ⟨Jᵀ w, t⟩ with the exact jvp of the float64 reference."""
    ops, spec = random_call(20, 70, 8, 5, is_causal=True)
    w, t = make(2, 20, 5), [make(*x.shape) for x in ops[:3]]
    o, lse = forward(ops, spec)
    grads = vjp(ops, o, lse, w, spec, (ops.q.shape, ops.k.shape, ops.v.shape, None))
    to, _ = reference.jvp(exact(ops), o, lse, Tangents(*(x.double() for x in t)), spec)
    left = (w.double() * to).sum()
    parts = []
    for g, x in zip(grads[:3], t, strict=True):
        assert g is not None
        parts.append((g.double() * x.double()).sum())
    assert abs(left - sum(parts)) <= TOLERANCE[torch.float32] * sum(abs(x) for x in parts)


def test_every_run_gives_the_same_bits():
    ops, spec = random_call(33, 70, 16, 16, is_causal=True)
    do = make(2, 33, 16)
    first, second = (run(ops, spec, do=do)[0] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first[:3], second[:3], strict=True))
