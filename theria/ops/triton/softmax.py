"""Scores and probabilities: one recompute of P for every order, the same way to the last bit.

Exponents are of base 2. In half precision the scale and log₂e are one factor, so that an exponent is one fused
multiply-add of a score. In float32 the difference S − lse is rounded before that factor: lse·log₂e on its own would
cost the accuracy at large scores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from theria.ops.triton.masks import mask_scores
from theria.ops.triton.products import score_product
from theria.ops.triton.tensors import constexpr

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def scaled_scores(q, k, mask, strides, lead, row, col, call, edge, TRANSPOSED: constexpr, S: constexpr):
    """S (1) of the tile at (row, col) in the unit of :func:`pivot`, masked (:func:`theria.ops.triton.masks`)."""
    UNIT: constexpr = LOG2E if S.PRECISION == "ieee" else 1.0
    x = score_product(q, k, None, TRANSPOSED, S) * (call.scale * UNIT)
    return mask_scores(x, mask, strides, lead, row, col, call, edge, UNIT, TRANSPOSED, S)


@triton.jit
def pivot(lse, S: constexpr):
    """lse in the unit of :func:`scaled_scores`; 0 for a row that sees no key, whose scores are all −inf."""
    UNIT: constexpr = LOG2E if S.PRECISION == "ieee" else 1.0
    return tl.where(lse == float("-inf"), 0.0, lse * UNIT)


@triton.jit
def probabilities(x, pivots, S: constexpr):
    """P (2) from :func:`scaled_scores` and :func:`pivot`, which the caller broadcasts along the rows."""
    if S.PRECISION == "ieee":
        return tl.exp2(x - pivots)
    else:
        return tl.exp2((x - pivots) * LOG2E)
