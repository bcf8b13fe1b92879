"""Scores and probabilities: one recompute of P for every order, the same way to the last bit.

Exponents are of base 2. In half precision the scale and log₂e are one factor, so that an exponent is one fused
multiply-add of a score. In float32, and with an additive mask, the difference S − lse is rounded before that factor
(S.NATURAL): lse·log₂e on its own would cost the accuracy at large scores, and a mask of -1e9 makes large ones.
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
    UNIT: constexpr = 1.0 if S.NATURAL else LOG2E
    x = score_product(q, k, None, TRANSPOSED, S) * (call.scale * UNIT)
    return mask_scores(x, mask, strides, lead, row, col, call, edge, UNIT, TRANSPOSED, S)


@triton.jit
def exponents(q, k, pivots, mask, strides, lead, row, col, call, edge, TRANSPOSED: constexpr, S: constexpr):
    """log P of the tile at (row, col) in the unit of :func:`pivot`, −inf where a row does not see a key.

    Causality, the end of the keys and a boolean mask come last: a branch between a product and its pivot keeps the two
    from being one multiply-add. What an additive mask adds belongs to the scores.

    Args:
        pivots: of the rows, which the caller broadcasts along them.
    """
    UNIT: constexpr = 1.0 if S.NATURAL else LOG2E
    ADDITIVE: constexpr = mask is not None and mask.dtype.element_ty.is_floating()
    if ADDITIVE:
        return scaled_scores(q, k, mask, strides, lead, row, col, call, edge, TRANSPOSED, S) - pivots
    else:
        x = score_product(q, k, None, TRANSPOSED, S) * (call.scale * UNIT) - pivots
        return mask_scores(x, mask, strides, lead, row, col, call, edge, UNIT, TRANSPOSED, S)


@triton.jit
def online_weights(top, q, k, mask, strides, lead, row, col, call, edge, S: constexpr):
    """exp S (1) of a tile relative to the maxima of its rows so far, in the unit of :func:`scaled_scores`.

    Args:
        top: the maxima of the tiles before, −∞ for a row that has seen no key yet. ``call.scale`` is positive.

    Returns:
        The weights, what the sums of the tiles before shrink by, and the maxima with this tile.
    """
    UNIT: constexpr = 1.0 if S.NATURAL else LOG2E
    ADDITIVE: constexpr = mask is not None and mask.dtype.element_ty.is_floating()
    if ADDITIVE:
        x = scaled_scores(q, k, mask, strides, lead, row, col, call, edge, False, S)
        higher = tl.maximum(top, tl.max(x, 1))
    else:  # the maximum before the (positive) scale: an exponent is then one multiply-add of a product
        x = score_product(q, k, None, False, S)
        x = mask_scores(x, mask, strides, lead, row, col, call, edge, UNIT, False, S)
        higher = tl.maximum(top, tl.max(x, 1) * (call.scale * UNIT))
        x = x * (call.scale * UNIT)
    pivots = tl.where(higher == float("-inf"), 0.0, higher)
    return probabilities(x, pivots[:, None], S), probabilities(top, pivots, S), higher


@triton.jit
def logarithm(top, total, S: constexpr):
    """lse (2) of rows from their maxima and the sums of their weights, 1 for a row that sees no key."""
    if S.NATURAL:
        return top + tl.log(total)
    else:
        return (top + tl.log2(total)) * LN2


@triton.jit
def pivot(lse, S: constexpr):
    """lse in the unit of :func:`scaled_scores`; 0 for a row that sees no key, whose scores are all −inf."""
    UNIT: constexpr = 1.0 if S.NATURAL else LOG2E
    return tl.where(lse == float("-inf"), 0.0, lse * UNIT)


@triton.jit
def probabilities(x, pivots, S: constexpr):
    """P (2) from :func:`scaled_scores` and :func:`pivot`, which the caller broadcasts along the rows."""
    return exponential(x - pivots, S)


@triton.jit
def exponential(x, S: constexpr):
    """P (2) from :func:`exponents`."""
    if S.NATURAL:
        return tl.exp2(x * LOG2E)
    else:
        return tl.exp2(x)
