"""The kernels of the cotangents' tangents, and the row statistics they read, against the closed formula in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.triton.calls import (
    DEVICE,
    MASKS,
    NEG_INF,
    SHAPES,
    Case,
    call,
    case,
    error,
    exact,
    exact_tangents,
    make,
    masks,
    random_call,
)
from theria.ops import blockwise, reference
from theria.ops.operands import Tangents, batch_shape
from theria.ops.triton import cotangents
from theria.ops.triton import hvp as module
from theria.ops.triton.forward import forward
from theria.ops.triton.hvp import hvp
from theria.ops.triton.jvp import jvp
from theria.ops.triton.launch import Frame
from theria.ops.triton.masks import TOGETHER
from theria.ops.triton.row_stats import row_stats
from theria.ops.triton.tiles import Tile, override

# Relative, in the norm. float32: rounding of a chain of four products. float16: 2⁻¹¹ of O, tO, tdS, dS and the results.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
# Error over that of plain PyTorch in float16, which rounds every intermediate array.
THREE_WAY = 1.0
# Scores up to s are rounded to s·2⁻²⁴, and with them P.
ROUNDING = 2.0**-24
LOW = 300.0
# Every row sees more than one key; see test_the_only_key_that_a_row_sees_moves_values_only.
MOVING = [(s, causal) for s in SHAPES for causal in (False, True) if s[1] > 1 and not (causal and s[0] == 1)]
SMALL = [
    Tile(16, 16, 1, 1),
    Tile(32, 16, 1, 1, split=True),
    Tile(16, 32, 1, 1, held=True),
    Tile(32, 16, 1, 1, anchored=True),
]
GUARD = 256  # elements; keeps the alignment

Rule = Callable[..., tuple[Any, ...]]

pytestmark = pytest.mark.usefixtures("poisoned", "_large_tiles_of_statistics")


@pytest.fixture
def _large_tiles_of_statistics():
    """Rows are padded to 256: in the interpreter, whose time goes by tiles, one tile a head instead of sixteen."""
    with ExitStack() as stack:
        if DEVICE == "cpu":
            stack.enter_context(override("row_stats", Tile(256, 16, 1, 1)))
        yield


@contextmanager
def tiled(tile: Tile):
    with override("hvp_dq", tile), override("hvp_dkv", tile):
        yield


def residuals(c: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, lse, to, tau of the reference."""
    ops64, t64 = exact(c.ops), exact_tangents(c.t)
    o, lse = reference.forward(ops64, c.spec)
    lse = lse.expand(*batch_shape(*c.ops, *c.t), -1)
    to, tau = reference.jvp(ops64, o, lse, t64, c.spec)
    return o, lse, to, tau


def truth_of(c: Case) -> tuple[Any, ...]:
    """The reference in float64."""
    o, lse, to, tau = residuals(c)
    tdo64 = None if c.tdo is None else c.tdo.double()
    return reference.hvp(exact(c.ops), o, lse, c.do.double(), exact_tangents(c.t), tdo64, to, tau, c.spec, c.shapes)


def run(c: Case, rule: Rule = hvp) -> tuple[Any, ...]:
    """What the rule says of tdq, tdk, tdv from the reference's residuals, rounded to what a kernel reads."""
    o, lse, to, tau = residuals(c)
    dtype = c.ops.q.dtype
    return rule(c.ops, o.to(dtype), lse.float(), c.do, c.t, c.tdo, to.to(dtype), tau.float(), c.spec, c.shapes)


def check(c: Case, tolerance=0.0, rule: Rule = hvp) -> tuple[Any, ...]:
    actual, truth = run(c, rule), truth_of(c)
    for x, x64 in zip(actual, truth, strict=True):
        assert (x is None) == (x64 is None)
        if x is not None:
            assert x.dtype == c.ops.q.dtype
            assert error(x, x64) <= TOLERANCE[x.dtype] + tolerance
    return actual


def zero(*xs: Tensor) -> bool:
    return all(torch.equal(x, torch.zeros_like(x)) for x in xs)


def size_of_scores(ops, spec) -> float:
    return reference.scores(exact(ops), spec).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "causal"), MOVING)
def test_it_is_the_closed_formula(shape, causal, dtype):
    check(case(*random_call(*shape, lead=(1,), dtype=dtype, is_causal=causal)))


@pytest.mark.parametrize(("shape", "causal"), [((9, 1, 4, 4), False), ((1, 70, 4, 4), True)])
def test_the_only_key_that_a_row_sees_moves_values_only(shape, causal):
    """tdq and tdk vanish: what is left is the rounding of o and to, of the size of tdv."""
    c = case(*random_call(*shape, is_causal=causal))
    tdq, tdk, tdv, _ = run(c)
    assert error(tdv, truth_of(c)[2]) <= TOLERANCE[tdv.dtype]
    assert max(tdq.abs().max(), tdk.abs().max()) <= TOLERANCE[tdv.dtype] * tdv.abs().max()


@pytest.mark.parametrize(("N", "M", "causal"), [(37, 45, False), (40, 40, True), (19, 50, True), (50, 19, True)])
@pytest.mark.parametrize("tile", SMALL)
def test_several_tiles(tile, N, M, causal):
    """The diagonal and both tails cross tiles; as many rows as keys, fewer, and more."""
    with tiled(tile):
        check(case(*random_call(N, M, 8, 5, lead=(1,), is_causal=causal)))


def test_causal_programs_are_dealt_out_by_several_heads():
    """Of so many heads at a time, with three blocks each, and of the one that is left; every block is computed once."""
    heads = TOGETHER.value + 1
    with tiled(Tile(16, 16, 1, 1)), override("jvp", Tile(16, 16, 1, 1)), override("forward", Tile(16, 16, 1, 1)):
        check(case(*random_call(40, 45, 8, 5, lead=(heads,), is_causal=True)))


@pytest.mark.parametrize("tile", SMALL)
def test_several_tiles_in_half_precision(tile):
    with tiled(tile):
        check(case(*random_call(37, 45, 8, 5, lead=(1,), dtype=torch.float16, is_causal=True)))


@pytest.mark.parametrize("present", list(itertools.product((False, True), repeat=4)))
def test_absent_tangents(present):
    """What does not move is zero to the last bit."""
    tdq, tdk, tdv, _ = check(case(*random_call(3, 5, 4, 2, lead=(1,)), present))
    tq, tk, tv, tdo = present
    if not (tq or tk or tdo):
        assert zero(tdv)
    if not (tq or tk or tv or tdo):
        assert zero(tdq, tdk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_direction_of_zeros_gives_zero(dtype):
    c = case(*random_call(5, 7, 4, 3, dtype=dtype, is_causal=True))
    assert c.tdo is not None
    zeros = c._replace(t=Tangents(*(torch.zeros_like(x) for x in c.ops[:3])), tdo=torch.zeros_like(c.tdo))
    assert zero(*run(zeros)[:3])


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)))
def test_what_is_not_wanted_is_not_computed(wanted, split, monkeypatch):
    launched = []
    launch = cotangents.launch
    monkeypatch.setattr(cotangents, "launch", lambda kernel, *args: (launched.append(kernel), launch(kernel, *args)))
    with tiled(Tile(16, 16, 1, 1, split=split)):
        check(case(*random_call(5, 7, 4, 3, lead=(1,)), wanted=wanted))
    dq, dk, dv = wanted
    pairs = dk + dv if split else dk or dv
    assert launched == [module.hvp_dq_kernel] * dq + [module.hvp_dkv_kernel] * pairs


@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind):
    check(case(*random_call(9, 21, 8, 8, lead=(2, 2), mask=masks(9, 21)[kind])))


@pytest.mark.parametrize("kind", ["boolean", "additive, keys"])
def test_masks_with_causality(kind):
    mask = masks(37, 21)[kind][:1, :1]
    with tiled(SMALL[0]):
        check(case(*random_call(37, 21, 8, 8, lead=(1, 1), mask=mask, is_causal=True)))


def test_a_mask_may_be_more_precise_than_the_operands():
    check(case(*random_call(9, 70, 8, 8, dtype=torch.float16, mask=make(1, 9, 70) / 7)))


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_sees_nothing_and_what_is_not_seen_get_zero(dtype, additive):
    mask = torch.rand(1, 9, 21, device=DEVICE) > 0.3
    mask[0, 4] = False
    mask[0, :, 13] = False
    if additive:
        mask = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, NEG_INF)
    tdq, tdk, tdv, _ = check(case(*random_call(9, 21, 8, 8, dtype=dtype, mask=mask)))
    assert zero(tdq[:, 4], tdk[:, 13], tdv[:, 13])


@pytest.mark.parametrize("shape", [(5, 0, 8, 4), (0, 5, 8, 4)])
def test_without_keys_or_rows_it_is_zero(shape):
    c = case(*random_call(*shape))
    results = run(c)[:3]
    assert [x.shape for x in results] == [x.shape for x in c.ops[:3]]
    assert zero(*results)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_any_scale(scale):
    ops, spec = random_call(20, 70, 8, 8, lead=(1,), scale=scale)
    check(case(ops, spec), tolerance=4 * size_of_scores(ops, spec) * ROUNDING)


def test_large_scores():
    ops, spec = call(make(1, 20, 8), make(1, 70, 8) * 100, make(1, 70, 8), scale=1.0)
    size = size_of_scores(ops, spec)
    assert size > 500
    check(case(ops, spec), tolerance=4 * size * ROUNDING)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_past_the_end_have_no_weight_beside_low_scores(dtype):
    """Their score of 0 would be exp(LOW) = ∞ times the others, and ∞·0 is NaN.

    The kernel of keys and values may compute that, which NumPy warns about: such keys are rows that it does not store.
    """
    mask = torch.full((1, 1, 1), -LOW, device=DEVICE)
    check(case(*random_call(5, 7, 8, 8, dtype=dtype, mask=mask)), tolerance=4 * LOW * ROUNDING)


def test_dropout_is_that_of_custom():
    c = case(*random_call(9, 70, 8, 8, lead=(2, 2), p=0.3))
    for x, y in zip(check(c)[:3], run(c, blockwise.hvp)[:3], strict=True):
        assert error(x, y.double()) <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("tile", SMALL[:2])
def test_dropout_in_several_tiles(tile):
    with tiled(tile):
        check(case(*random_call(37, 45, 8, 8, lead=(1,), p=0.3, is_causal=True)))


@pytest.mark.parametrize("options", [{}, {"p": 0.3}, {"p": 0.3, "is_causal": True}])
@pytest.mark.parametrize("heads", [(1, 1, 3), (2, 2, 2)])
def test_grouped_queries(heads, options):
    """The group is summed in the kernel: what it writes has the shape of the keys."""
    B, key_heads, group = heads
    k, v = make(B, key_heads, 1, 21, 8), make(B, key_heads, 1, 21, 5)
    check(case(*call(make(B, key_heads, group, 9, 8), k, v, make(1, 1, group, 1, 21), **options)))


@pytest.mark.parametrize("tile", SMALL)
def test_grouped_queries_in_several_tiles(tile):
    k, v = make(1, 2, 1, 33, 8), make(1, 2, 1, 33, 5)
    with tiled(tile):
        check(case(*call(make(1, 2, 2, 20, 8), k, v, is_causal=True)))


@pytest.mark.parametrize("wanted", [(False, True, False), (False, False, True)])
def test_grouped_queries_with_one_cotangent(wanted):
    check(case(*call(make(1, 2, 3, 9, 8), make(1, 2, 1, 21, 8), make(1, 2, 1, 21, 8)), wanted=wanted))


def test_groups_that_share_keys_and_not_values():
    check(case(*call(make(1, 2, 3, 9, 8), make(1, 2, 1, 21, 8), make(1, 2, 3, 21, 8))))


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((2, 3), (1, 3), (1, 1)),
        ((1, 1), (2, 1), (1, 3)),
        ((1, 1), (1, 1), (4, 1)),
        ((), (), ()),
        ((2, 1, 1, 1, 2),) * 3,
    ],
)
def test_leading_dimensions_broadcast(q, k, v):
    check(case(*call(make(*q, 5, 4), make(*k, 7, 4), make(*v, 7, 3))))


def test_sums_over_leading_dimensions_are_rounded_once():
    """In half precision: a float32 sum over heads, then the dtype of the operand."""
    half = {"dtype": torch.float16}
    check(case(*call(make(4, 5, 4, **half), make(1, 7, 4, **half), make(1, 7, 3, **half))))


@pytest.mark.parametrize("moved", range(4))
def test_several_directions_at_one_point(moved):
    """As ``vmap`` over one of tq, tk, tv, tdo alone gives them: operands and their residuals are broadcast."""
    c = case(*random_call(5, 7, 4, 3, lead=(1,)))
    directions = [*c.t[:3], c.tdo]
    directions = [make(3, *x.shape[1:]) if i == moved else x for i, x in enumerate(directions) if x is not None]
    shapes = (*(torch.Size((3, *x.shape[1:])) for x in c.ops[:3]), None)
    check(c._replace(t=Tangents(*directions[:3]), tdo=directions[3], shapes=shapes))


def test_strided_inputs_are_read_in_place(monkeypatch):
    q, k, v, tq, tk, tv, do, tdo = (make(2, 20, 3, 8).transpose(1, 2) for _ in range(8))
    ops, spec = call(q, k, v)
    c = Case(ops, spec, do, Tangents(tq, tk, tv), tdo, (q.shape, k.shape, v.shape, None))
    o, lse, to, tau = residuals(c)
    o, to = (torch.randn_like(q).copy_(x) for x in (o, to))
    lse, tau, truth = lse.float(), tau.float(), truth_of(c)
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda x: contiguous(x) if x.is_contiguous() else pytest.fail("an input was copied")
    )
    results: tuple[Any, ...] = hvp(ops, o, lse, do, c.t, tdo, to, tau, spec, c.shapes)
    for x, x64, like in zip(results[:3], truth[:3], (q, k, v), strict=True):
        assert x.stride() == like.stride()
        assert error(x, x64) <= TOLERANCE[x.dtype]


def test_cotangents_and_tangents_without_strides():
    """What ``o.sum().backward()`` gives, and a direction of ones."""
    c = case(*random_call(20, 21, 8, 8))
    one = torch.ones((), device=DEVICE)
    t = Tangents(c.t.q, one.expand(2, 21, 8), one.expand(2, 21, 8))
    check(c._replace(do=one.expand(2, 20, 8), tdo=one.expand(2, 20, 8), t=t))


@pytest.mark.parametrize("shape", [(17, 21, 8, 5), (32, 16, 8, 5)])
def test_nothing_is_written_outside(shape, monkeypatch):
    """What the kernels write lies between guards of NaN; also where whole tiles are wider than the operands."""
    buffers, empty = [], torch.empty

    def guarded(*size, **options):
        x = empty(*size, **options)
        buffers.append(x.new_full((x.numel() + 2 * GUARD,), float("nan")))
        return buffers[-1][GUARD:-GUARD].view(x.shape)

    c = case(*random_call(*shape))
    o, lse, to, tau = (x.float() for x in residuals(c))
    monkeypatch.setattr(torch, "empty", guarded)
    hvp(c.ops, o, lse, c.do, c.t, c.tdo, to, tau, c.spec, c.shapes)
    assert len(buffers) == 14  # the statistics, three cotangents, the parts of eight operands, two tensors of factors
    for x in buffers:
        assert not x[GUARD:-GUARD].isnan().any()
        assert x[:GUARD].isnan().all()
        assert x[-GUARD:].isnan().all()


def test_half_precision_is_no_worse_than_plain_pytorch():
    c = case(*random_call(60, 130, 32, 32, dtype=torch.float16))

    def vjp(q, k, v, do):
        return torch.func.vjp(lambda q, k, v: reference.forward(c.ops._replace(q=q, k=k, v=v), c.spec)[0], q, k, v)[1](
            do
        )

    plain = torch.func.jvp(vjp, (*c.ops[:3], c.do), (*c.t[:3], c.tdo))[1]
    for x, x16, x64 in zip(run(c)[:3], plain, truth_of(c)[:3], strict=True):
        assert error(x, x64) <= THREE_WAY * error(x16, x64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_continues_the_kernels_before_it(dtype):
    """With o, lse, to and tau of the kernels."""

    def chain(ops, _o, _lse, do, t, tdo, _to, _tau, spec, shapes):
        o, lse = forward(ops, spec)
        to, tau = jvp(ops, o, lse, t, spec)
        return hvp(ops, o, lse, do, t, tdo, to, tau, spec, shapes)

    check(case(*random_call(33, 70, 40, 24, dtype=dtype, is_causal=True)), rule=chain)


def test_it_is_symmetric():
    """⟨a, H b⟩ = ⟨b, H a⟩ for the Hessian H of ⟨do, o⟩."""
    a = case(*random_call(20, 33, 8, 5, is_causal=True), (True, True, True, False))
    b = a._replace(t=Tangents(*(make(*x.shape) for x in a.ops[:3])))
    sides = []
    for x, y in ((a, b), (b, a)):
        parts = [(u.double() * w.double()).sum() for u, w in zip(x.t[:3], run(y)[:3], strict=True) if u is not None]
        sides.append((sum(parts), sum(abs(part) for part in parts)))
    (left, size), (right, _) = sides
    assert abs(left - right) <= TOLERANCE[torch.float32] * size


def test_every_run_gives_the_same_bits():
    c = case(*random_call(33, 70, 16, 16, is_causal=True))
    first, second = run(c), run(c)
    assert all(torch.equal(x, y) for x, y in zip(first[:3], second[:3], strict=True))


@pytest.mark.parametrize("flag", ["held", "split", "anchored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_how_a_tile_is_computed_changes_no_bit(dtype, flag):
    c = case(*random_call(33, 40, 24, 16, lead=(1,), dtype=dtype, is_causal=True))
    results = []
    for value in (False, True):
        with tiled(Tile(32, 16, 1, 1)._replace(**{flag: value})):
            results.append(run(c)[:3])
    for x, y in zip(*results, strict=True):
        # on a device another program may order its additions differently
        assert torch.equal(x, y) if DEVICE == "cpu" else error(x, y.double()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [64, 256])
@pytest.mark.parametrize("tangents", ["", "to", "to, tdo"])
def test_row_stats(tangents, rows, dtype):
    """lse in the unit of the exponents, delta, tau and tdelta; rows that fill up a block of 256 have P = 0."""
    N, E = 300, 20
    ops, spec = random_call(N, 5, 4, E, lead=(1,), dtype=dtype)
    o, do, tdo, to = (make(1, N, E, dtype=dtype) for _ in range(4))
    lse, tau = make(1, N), make(1, N)
    lse[0, 7] = NEG_INF
    tensors = (
        {"o": o, "do": do} | ({"to": to} if "to" in tangents else {}) | ({"tdo": tdo} if "tdo" in tangents else {})
    )
    with override("row_stats", Tile(rows, 16, 1, 1)):
        stats = row_stats(Frame(ops, spec, **tensors), lse, tau if tangents else None)
    assert stats.shape == (1, 512, 4 if tangents else 2)
    unit = 1.0 if dtype == torch.float32 else torch.tensor(2.0).log().reciprocal().item()
    assert error(stats[:, :N, 0], lse.double().masked_fill(lse == NEG_INF, 0.0) * unit) <= 2 * ROUNDING
    assert (stats[:, N:, 0] == float("inf")).all()
    o64, do64, tdo64, to64 = (x.double() for x in (o, do, tdo, to))
    assert error(stats[:, :N, 1], (do64 * o64).sum(-1)) <= TOLERANCE[torch.float32]
    if tangents:
        tdelta = (do64 * to64).sum(-1) + ((tdo64 * o64).sum(-1) if "tdo" in tangents else 0)
        assert torch.equal(stats[:, :N, 2], tau)
        assert error(stats[:, :N, 3], tdelta) <= TOLERANCE[torch.float32]
    assert zero(stats[:, N:, 1:])
