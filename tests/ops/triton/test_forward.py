"""The forward kernel against the closed formula in float64."""

from __future__ import annotations

import pytest
import torch

from tests.ops.triton.calls import DEVICE, MASKS, NEG_INF, SHAPES, call, error, exact, make, masks, random_call
from theria.ops import blockwise, reference
from theria.ops.triton.forward import forward
from theria.ops.triton.tiles import Tile, override

# Relative, in the norm. float32: rounding of the products and of 2^x. float16: 2⁻¹¹ of P and of the result.
O_TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}
# lse is float32 from float32 sums of products that are exact in float16.
LSE_TOLERANCE = 1e-6
# Error over that of plain PyTorch in float16, which rounds S and P; the kernel rounds neither S nor the sum.
THREE_WAY = 1.0
# Scores up to s are rounded to s·2⁻²⁴, and with them P.
ROUNDING = 2.0**-24

pytestmark = pytest.mark.usefixtures("poisoned")


def check(ops, spec) -> tuple[torch.Tensor, torch.Tensor]:
    o, lse = forward(ops, spec)
    o64, lse64 = reference.forward(exact(ops), spec)
    assert (o.dtype, lse.dtype) == (ops.q.dtype, torch.float32)
    assert error(o, o64) <= O_TOLERANCE[o.dtype]
    assert error(lse, lse64) <= LSE_TOLERANCE
    return o, lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_closed_formula(shape, causal, dtype):
    check(*random_call(*shape, dtype=dtype, is_causal=causal))


def test_half_precision_is_no_worse_than_plain_pytorch():
    ops, spec = random_call(60, 130, 32, 32, dtype=torch.float16)
    truth, _ = reference.forward(exact(ops), spec)
    plain, _ = reference.forward(ops, spec)
    assert error(forward(ops, spec)[0], truth) <= THREE_WAY * error(plain, truth)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tile", [Tile(16, 64, 4, 2), Tile(64, 16, 4, 2), Tile(32, 32, 4, 2), Tile(128, 128, 8, 2)])
def test_tiles_of_other_shapes(tile, causal):
    with override("forward", tile):
        check(*random_call(70, 90, 8, 8, lead=(1,), is_causal=causal))


@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind):
    check(*random_call(9, 70, 8, 8, lead=(2, 2), mask=masks(9, 70)[kind]))


@pytest.mark.parametrize("kind", ["boolean", "additive, keys"])
def test_masks_with_causality(kind):
    check(*random_call(70, 9, 8, 8, lead=(2, 2), mask=masks(70, 9)[kind], is_causal=True))


def test_a_mask_may_be_more_precise_than_the_operands():
    mask = make(1, 9, 70) / 7
    check(*random_call(9, 70, 8, 8, dtype=torch.float16, mask=mask))


@pytest.mark.parametrize("additive", [False, True])
def test_a_row_that_sees_no_key_gives_zero(additive):
    mask = torch.rand(1, 9, 70, device=DEVICE) > 0.3
    mask[0, 4] = False
    mask[0, 5, :64] = False  # the first tile shows it none
    if additive:
        mask = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, NEG_INF)
    o, lse = check(*random_call(9, 70, 8, 8, mask=mask))
    assert torch.equal(o[:, 4], torch.zeros_like(o[:, 4]))
    assert (lse[:, 4] == NEG_INF).all()


def test_without_keys_it_is_zero():
    o, lse = forward(*random_call(5, 0, 8, 8))
    assert torch.equal(o, torch.zeros_like(o))
    assert (lse == NEG_INF).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [-0.7, 0.0, 1e-3, 3.0])
def test_any_scale(scale, causal):
    check(*random_call(20, 70, 8, 8, scale=scale, is_causal=causal))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shift", [0.0, 3e4, -3e4])
def test_large_scores(shift, dtype):
    """Scores of some thousands, then all of them moved far from zero by one more column."""
    q, k, v = make(1, 20, 8), make(1, 70, 8) * 100, make(1, 70, 8)
    q = torch.cat([q, torch.ones(1, 20, 1, device=DEVICE)], -1)
    k = torch.cat([k, torch.full((1, 70, 1), shift, device=DEVICE)], -1)
    ops, spec = call(*(x.to(dtype) for x in (q, k, v)), scale=1.0)
    o, lse = forward(ops, spec)
    o64, lse64 = reference.forward(exact(ops), spec)
    size = reference.scores(exact(ops), spec).abs().max().item()
    assert error(lse, lse64) <= LSE_TOLERANCE
    assert error(o, o64) <= O_TOLERANCE[dtype] + 4 * size * ROUNDING


def test_dropout_is_that_of_custom():
    ops, spec = random_call(9, 70, 8, 8, lead=(2, 2), p=0.3)
    o, lse = check(ops, spec)
    expected = blockwise.forward(ops, spec)
    assert error(o, expected[0].double()) <= O_TOLERANCE[o.dtype]
    assert error(lse, expected[1].double()) <= LSE_TOLERANCE


def test_dropout_repeats_over_dimensions_that_are_no_heads():
    """``vmap`` puts dimensions in front, over which the mask is the same."""
    ops, spec = random_call(9, 20, 8, 8, lead=(1, 3), p=0.3)
    mapped = ops._replace(q=ops.q.repeat(2, 1, 1, 1))
    o, _ = forward(mapped, spec)
    assert error(o, reference.forward(exact(ops), spec)[0].expand_as(o)) <= O_TOLERANCE[o.dtype]


@pytest.mark.parametrize("key_heads", [1, 2])
def test_grouped_queries(key_heads):
    check(*call(make(1, key_heads, 3, 9, 8), make(1, key_heads, 1, 70, 8), make(1, key_heads, 1, 70, 5)))


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
def test_leading_dimensions_broadcast(q, k, v):
    check(*call(make(*q, 5, 4), make(*k, 7, 4), make(*v, 7, 3)))


def test_strided_inputs_are_read_in_place(monkeypatch):
    q, k, v = (make(2, 20, 3, 8).transpose(1, 2) for _ in range(3))
    expected, _ = forward(*call(q.contiguous(), k.contiguous(), v.contiguous()))
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda _: pytest.fail("an input was copied"))
    o, _ = forward(*call(q, k, v))
    assert o.stride() == q.stride()
    assert torch.equal(o, expected)


def test_every_run_gives_the_same_bits():
    ops, spec = random_call(33, 70, 16, 16, is_causal=True)
    first = forward(ops, spec)
    assert all(torch.equal(x, y) for x, y in zip(first, forward(ops, spec), strict=True))
