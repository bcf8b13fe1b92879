"""Scores and probabilities: one recompute of P for every order, the same way to the last bit.

Exponents are of base 2. In half precision the scale and log₂e are one factor, so that an exponent is one fused
multiply-add of a score. In float32 the difference S − lse is rounded before that factor: lse·log₂e on its own would
cost the accuracy at large scores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from theria.ops.triton.masks import mask_scores
from theria.ops.triton.tensors import constexpr

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def product(a, b, acc, S: constexpr):
    """acc + a b, accumulated in float32; ``acc`` may be None."""
    if acc is None:
        return tl.dot(a, b, input_precision=S.PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=S.PRECISION)


@triton.jit
def left_operand(x, S: constexpr):
    """``x``, a left operand of every product of a loop; with S.HELD in the registers of the matrix unit.

    Otherwise it is read from shared memory anew for each product, which is what bounds them at 64 rows a tile, and
    takes the place of a stage of loads. The compiler holds only what a product has left there, as 0 + x does here.
    """
    if x is None:
        return
    elif S.HELD:
        nothing = tl.zeros((x.shape[0], 16), x.dtype)
        return tl.dot(nothing, tl.zeros((16, x.shape[1]), x.dtype), x.to(tl.float32)).to(x.dtype)
    else:
        return x


@triton.jit
def score_product(rows, keys, acc, TRANSPOSED: constexpr, S: constexpr):
    """acc + rows keysᵀ, transposed with TRANSPOSED; ``acc`` where an operand is absent."""
    if rows is None or keys is None:
        if acc is None:
            return
        else:
            return acc
    elif TRANSPOSED:
        return product(keys, tl.trans(rows), acc, S)
    else:
        return product(rows, tl.trans(keys), acc, S)


@triton.jit
def scaled_scores(q, k, mask, strides, lead, row, col, call, edge, TRANSPOSED: constexpr, S: constexpr):
    """S (1) of the tile at (row, col) in the unit of :func:`pivot`, masked (:func:`theria.ops.triton.masks`)."""
    UNIT: constexpr = 1.0 if q.dtype == tl.float32 else LOG2E
    x = score_product(q, k, None, TRANSPOSED, S) * (call.scale * UNIT)
    return mask_scores(x, mask, strides, lead, row, col, call, edge, UNIT, TRANSPOSED, S)


@triton.jit
def pivot(lse, dtype: constexpr):
    """lse in the unit of :func:`scaled_scores`; 0 for a row that sees no key, whose scores are all −inf."""
    UNIT: constexpr = 1.0 if dtype == tl.float32 else LOG2E
    return tl.where(lse == float("-inf"), 0.0, lse * UNIT)


@triton.jit
def probabilities(x, pivots, dtype: constexpr):
    """P (2) from :func:`scaled_scores` and :func:`pivot`, which the caller broadcasts along the rows."""
    if dtype == tl.float32:
        return tl.exp2((x - pivots) * LOG2E)
    else:
        return tl.exp2(x - pivots)
