"""The kernel of the output's tangent against the closed formula in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

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
from theria.ops import blockwise, reference
from theria.ops.operands import Tangents, batch_shape
from theria.ops.triton.forward import forward
from theria.ops.triton.jvp import jvp, jvp_before_hvp
from theria.ops.triton.launch import Frame
from theria.ops.triton.row_stats import row_stats
from theria.ops.triton.tiles import Tile, override
from theria.testing.kernels import make_problem

# Relative, in the norm. float32: rounding of a chain of three products. float16: 2⁻¹¹ of O, of P̃∘tS and of the result.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
# tau is float32 in both, from exact products.
TOLERANCE_TAU = 2e-6
# Error over that of plain PyTorch in float16, which rounds every intermediate array.
THREE_WAY = 1.0
# Scores up to s are rounded to s·2⁻²⁴, and with them P.
ROUNDING = 2.0**-24
LOW = 300.0
ALL = (True, True, True)
SUBSETS = list(itertools.product((False, True), repeat=3))
SMALL = [Tile(16, 16, 1, 1), Tile(32, 16, 1, 1), Tile(16, 32, 1, 1, held=True)]
GUARD = 256  # elements; keeps the alignment

pytestmark = pytest.mark.usefixtures("poisoned")


def direction(ops, present=ALL) -> Tangents:
    return Tangents(
        *(make(*x.shape, dtype=x.dtype) if given else None for x, given in zip(ops[:3], present, strict=True))
    )


def run(ops, spec, t=None, rule=jvp):
    """What the rule and the reference say of to and tau; the rule reads the reference's o and lse, rounded."""
    t = direction(ops) if t is None else t
    ops64, t64 = exact(ops), exact_tangents(t)
    o, lse = reference.forward(ops64, spec)
    lse = lse.expand(*batch_shape(*ops, *t), -1)
    truth = reference.jvp(ops64, o, lse, t64, spec)
    return rule(ops, o.to(ops.q.dtype), lse.float(), t, spec), truth


def plain_error(ops, spec, t, truth) -> float:
    """That of the closed formulas in plain PyTorch in the dtype of the operands."""
    o, lse = reference.forward(ops, spec)
    return error(reference.jvp(ops, o, lse.expand(*batch_shape(*ops, *t), -1), t, spec)[0], truth)


def check(ops, spec, t=None, tolerance=0.0):
    t = direction(ops) if t is None else t
    (to, tau), (to64, tau64) = run(ops, spec, t)
    assert (to.dtype, tau.dtype) == (ops.q.dtype, torch.float32)
    allowed = TOLERANCE[to.dtype] + tolerance
    if to.dtype == torch.float16 and error(to, to64) > allowed:  # a few keys with nearly all the weight of a row
        allowed = THREE_WAY * plain_error(ops, spec, t, to64)
    assert error(to, to64) <= allowed
    assert error(tau, tau64) <= TOLERANCE_TAU + tolerance
    return to, tau


def size_of_scores(ops, spec) -> float:
    return reference.scores(exact(ops), spec).abs().max().item()


def zero(*xs) -> bool:
    return all(torch.equal(x, torch.zeros_like(x)) for x in xs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_closed_formula(shape, causal, dtype):
    check(*random_call(*shape, dtype=dtype, is_causal=causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("tile", "dtype"), list(zip(SMALL, (torch.float32, torch.float32, torch.float16), strict=True))
)
def test_several_tiles(tile, dtype, causal):
    """The diagonal and both tails cross tiles; as many rows as keys, fewer, and more."""
    with override("jvp", tile):
        for N, M in ((40, 40), (19, 50)) if causal else ((37, 45),):
            check(*random_call(N, M, 8, 5, lead=(1,), dtype=dtype, is_causal=causal))


def test_causal_with_more_rows_than_keys_in_several_tiles():
    with override("jvp", SMALL[0]):
        check(*random_call(50, 19, 8, 5, lead=(1,), is_causal=True))


@pytest.mark.parametrize("present", SUBSETS)
def test_absent_tangents(present):
    ops, spec = random_call(3, 5, 4, 2, lead=(1,))
    to, tau = check(ops, spec, direction(ops, present))
    if not any(present[:2]):
        assert zero(tau)
    if not any(present):
        assert zero(to)


@pytest.mark.parametrize("present", SUBSETS[1:])
def test_a_direction_of_zeros_gives_zero(present):
    ops, spec = random_call(3, 5, 4, 2, lead=(1,), dtype=torch.float16, is_causal=True)
    zeros = Tangents(*(None if x is None else torch.zeros_like(x) for x in direction(ops, present)))
    assert zero(*run(ops, spec, zeros)[0])


@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind):
    check(*random_call(9, 21, 8, 8, lead=(2, 2), mask=masks(9, 21)[kind]))


@pytest.mark.parametrize("kind", ["boolean", "additive, keys"])
def test_masks_with_causality(kind):
    with override("jvp", SMALL[1]):
        check(*random_call(37, 21, 8, 8, lead=(1, 2), mask=masks(37, 21)[kind][:1], is_causal=True))


def test_a_mask_may_be_more_precise_than_the_operands():
    check(*random_call(9, 70, 8, 8, dtype=torch.float16, mask=make(1, 9, 70) / 7))


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_that_sees_nothing_does_not_move(dtype, additive):
    mask = torch.rand(1, 9, 21, device=DEVICE) > 0.3
    mask[0, 4] = False
    if additive:
        mask = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, NEG_INF)
    to, tau = check(*random_call(9, 21, 8, 8, dtype=dtype, mask=mask))
    assert zero(to[:, 4], tau[:, 4])


@pytest.mark.parametrize("shape", [(5, 0, 8, 4), (0, 5, 8, 4)])
def test_without_keys_or_rows_it_is_zero(shape):
    to, tau = run(*random_call(*shape))[0]
    assert (to.shape, tau.shape) == ((2, shape[0], 4), (2, shape[0]))
    assert zero(to, tau)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_scale(scale, dtype):
    ops, spec = random_call(20, 70, 8, 8, lead=(1,), dtype=dtype, scale=scale)
    check(ops, spec, tolerance=4 * size_of_scores(ops, spec) * ROUNDING)


def test_large_scores():
    ops, spec = call(make(1, 20, 8), make(1, 70, 8) * 100, make(1, 70, 8), scale=1.0)
    size = size_of_scores(ops, spec)
    assert size > 500
    check(ops, spec, tolerance=4 * size * ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_past_the_end_have_no_weight_beside_low_scores(dtype):
    """Their score of 0 would be exp(LOW) = ∞ times the others, and ∞·0 is NaN."""
    mask = torch.full((1, 1, 1), -LOW, device=DEVICE)
    check(*random_call(5, 7, 8, 8, dtype=dtype, mask=mask), tolerance=4 * LOW * ROUNDING)


def test_dropout_is_that_of_custom():
    ops, spec = random_call(9, 70, 8, 8, lead=(2, 2), p=0.3)
    t = direction(ops)
    actual = check(ops, spec, t)
    for x, y in zip(actual, run(ops, spec, t, blockwise.jvp)[0], strict=True):
        assert error(x, y.double()) <= TOLERANCE[torch.float32]


def test_dropout_in_several_tiles():
    with override("jvp", SMALL[1]):
        check(*random_call(37, 45, 8, 8, lead=(1,), p=0.3, is_causal=True))


@pytest.mark.parametrize("options", [{}, {"p": 0.3, "is_causal": True}])
@pytest.mark.parametrize("heads", [(1, 1, 3), (2, 2, 2)])
def test_grouped_queries(heads, options):
    B, key_heads, group = heads
    k, v = make(B, key_heads, 1, 21, 8), make(B, key_heads, 1, 21, 5)
    check(*call(make(B, key_heads, group, 9, 8), k, v, make(1, 1, group, 1, 21), **options))


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
    check(*call(make(*q, 5, 4), make(*k, 7, 4), make(*v, 7, 3)))


@pytest.mark.parametrize("present", [(True, False, False), (False, True, False), (False, False, True)])
def test_several_directions_at_one_point(present):
    """As ``vmap`` over tangents alone gives them: operands, o and lse are broadcast."""
    ops, spec = random_call(5, 7, 4, 3, lead=(1,))
    t = Tangents(*(make(3, *x.shape[1:]) if given else None for x, given in zip(ops[:3], present, strict=True)))
    to, _ = check(ops, spec, t)
    assert to.shape == (3, 5, 3)


def test_strided_inputs_are_read_in_place(monkeypatch):
    q, k, v, tq, tk, tv = (make(2, 20, 3, 8).transpose(1, 2) for _ in range(6))
    ops, spec = call(q, k, v)
    o, lse = reference.forward(exact(ops), spec)
    o, lse = torch.randn_like(q).copy_(o), lse.float()
    assert o.stride() == q.stride()
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda x: contiguous(x) if x.is_contiguous() else pytest.fail("an input was copied")
    )
    to, tau = jvp(ops, o, lse, Tangents(tq, tk, tv), spec)
    truth = reference.jvp(exact(ops), o, lse, Tangents(tq.double(), tk.double(), tv.double()), spec)
    assert to.stride() == q.stride()
    assert error(to, truth[0]) <= TOLERANCE[to.dtype]
    assert error(tau, truth[1]) <= TOLERANCE_TAU


def test_a_tangent_without_strides():
    ops, spec = random_call(20, 21, 8, 8)
    one = torch.ones((), device=DEVICE)
    check(ops, spec, Tangents(one.expand(2, 20, 8), one.expand(2, 21, 8), one.expand(2, 21, 8)))


@pytest.mark.parametrize("shape", [(17, 21, 8, 5), (32, 16, 8, 5)])
def test_nothing_is_written_outside(shape, monkeypatch):
    """What the kernel writes lies between guards of NaN; also where whole tiles are wider than the operands."""
    buffers, empty = [], torch.empty

    def guarded(*size, **options):
        x = empty(*size, **options)
        buffers.append(x.new_full((x.numel() + 2 * GUARD,), float("nan")))
        return buffers[-1][GUARD:-GUARD].view(x.shape)

    ops, spec = random_call(*shape)
    o, lse = reference.forward(ops, spec)
    t = direction(ops)
    monkeypatch.setattr(torch, "empty", guarded)
    jvp(ops, o, lse, t, spec)
    assert len(buffers) == 10  # tO and tau, the parts of six operands, two tensors of factors
    for x in buffers:
        assert x[GUARD:-GUARD].isfinite().all()
        assert x[:GUARD].isnan().all()
        assert x[-GUARD:].isnan().all()


def test_half_precision_is_no_worse_than_plain_pytorch():
    ops, spec = random_call(60, 130, 32, 32, dtype=torch.float16)
    t = direction(ops)
    (to, _), (truth, _) = run(ops, spec, t)
    plain = torch.func.jvp(
        lambda q, k, v: reference.forward(ops._replace(q=q, k=k, v=v), spec)[0], tuple(ops[:3]), tuple(t[:3])
    )[1]
    assert error(to, truth) <= THREE_WAY * error(plain, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_continues_the_forward_kernel(dtype):
    """With the kernel's own o and lse."""
    ops, spec = random_call(33, 70, 40, 24, dtype=dtype, is_causal=True)
    o, lse = forward(ops, spec)
    (to, tau), truth = run(ops, spec, rule=lambda _ops, _o, _lse, t, _spec: jvp(ops, o, lse, t, spec))
    assert error(to, truth[0]) <= TOLERANCE[dtype]
    assert error(tau, truth[1]) <= TOLERANCE_TAU


def test_every_run_gives_the_same_bits():
    ops, spec = random_call(33, 70, 16, 16, is_causal=True)
    t = direction(ops)
    first, second = (run(ops, spec, t)[0] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_held_operands_change_no_bit(dtype):
    ops, spec = random_call(33, 40, 24, 16, lead=(1,), dtype=dtype, is_causal=True)
    t, results = direction(ops), []
    for held in (False, True):
        with override("jvp", Tile(32, 16, 1, 1, held=held)):
            results.append(run(ops, spec, t)[0])
    for x, y in zip(*results, strict=True):
        # on a device another program may order its additions differently
        assert torch.equal(x, y) if DEVICE == "cpu" else error(x, y.double()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("given", ["do", "do tdo"])
@pytest.mark.parametrize("tile", [Tile(64, 32, 4, 1), Tile(256, 32, 4, 1)], ids=str)
def test_row_statistics_of_the_hvp_are_those_of_their_own_kernel(given: str, tile: Tile) -> None:
    problem = make_problem((2, 3, 256, 20, 8, 12), torch.float32, True, DEVICE)
    ops, o, lse, do, t, tdo = problem.ops, problem.o, problem.lse, problem.do, problem.t, problem.tdo
    tdo = tdo if "tdo" in given else None
    with override("jvp", tile):
        to, tau, left = jvp_before_hvp(ops, o, lse, do, t, tdo, problem.spec)
    assert left is not None
    assert (stats := left.stats) is not None
    own = row_stats(Frame(ops, problem.spec, o=o, do=do, to=to, tdo=tdo), lse, tau)
    # on a device another program may order its additions differently
    assert stats.equal(own) if DEVICE == "cpu" else error(stats, own.double()) <= TOLERANCE[torch.float32]


def test_row_statistics_are_left_to_their_own_kernel_where_rows_are_padded() -> None:
    problem = make_problem((1, 1, 255, 20, 8, 12), torch.float32, False, DEVICE)
    *_, left = jvp_before_hvp(problem.ops, problem.o, problem.lse, problem.do, problem.t, None, problem.spec)
    assert left is not None
    assert left.stats is None
