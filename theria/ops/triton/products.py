"""Matrix products, accumulated in float32; those of float32 operands at the rate of half precision.

With S.SPLIT an operand x is not a tile but ``(hi, lo, factor)``, its rows split as

    x = (hi + lo) * factor,   hi = fp16(x / factor),   lo = fp16(x / factor - hi),   factor a power of two per row,

and a product is hi hi' + (hi lo' + lo hi'). Both roundings are to 11 bits and x / factor is of the size 2^EXPONENT, far
from overflow, so that hi + lo misses x by at most 2^-23 |x|, for elements below 2^(-11 - EXPONENT) of their row's
largest by 2^(-25 - EXPONENT) of that one; lo lo', which is left out, is at most 2^-22 |x x'|. All of this is relative
to the row, whatever the other rows are: there is nothing that a tensor's largest element could drown.

What a product adds to is added outside the matrix unit. Inside, every sum is cut off instead of rounded, always towards
zero, and an error that never changes its sign grows with the number of keys: after 4096 of them it is 1e-5.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from theria.ops.triton.tensors import at, constexpr, device, load

OPERAND = tl.constexpr(8)  # binary exponents of the largest element of a row: a product of 256 columns is below 2^26,
WEIGHTS = tl.constexpr(14)  # and what is made and used in one place can go to the end of fp16


@device
def split(x, EXPONENT: constexpr) -> Any:
    """(hi, lo, factor) of the rows of ``x``; zeros are zeros, what is not finite gives NaN or an infinity."""
    LAST: constexpr = len(x.shape) - 1
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, LAST) >> 23  # biased exponents; a NaN has the highest
    exponent = tl.cast(254 + EXPONENT, tl.int32) - largest  # that of 1 / factor, both normal numbers
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    y = x * tl.expand_dims((exponent << 23).to(tl.float32, bitcast=True), LAST)
    hi = y.to(tl.float16)
    lo = (y - hi.to(tl.float32)).to(tl.float16)
    return hi, lo, ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def transposed(x):
    """The matrix (of each head) transposed."""
    if len(x.shape) == 2:
        return tl.trans(x)
    else:
        return tl.permute(x, (0, 2, 1))


@triton.jit
def product(a, b, acc, S: constexpr):
    """acc + a b; ``acc`` may be None."""
    if acc is None:
        return tl.dot(a, b, input_precision=S.PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=S.PRECISION)


@triton.jit
def product_with_transposed(a, b, acc, S: constexpr):
    """acc + a bᵀ of two operands; ``acc`` where one is absent."""
    if a is None or b is None:
        if acc is None:
            return
        else:
            return acc
    elif S.SPLIT:
        hi, lo, factor = a
        hi_b, lo_b, factor_b = b
        LAST: constexpr = len(hi.shape) - 1
        x = tl.dot(lo, transposed(hi_b))
        x = tl.dot(hi, transposed(lo_b), x)
        x = tl.dot(hi, transposed(hi_b), x)
        x = x * tl.expand_dims(factor, LAST) * tl.expand_dims(factor_b, LAST - 1)
        if acc is None:
            return x
        else:
            return acc + x
    else:
        return product(a, transposed(b), acc, S)


@triton.jit
def score_product(rows, keys, acc, TRANSPOSED: constexpr, S: constexpr):
    """acc + rows keysᵀ, transposed with TRANSPOSED; ``acc`` where an operand is absent."""
    if TRANSPOSED:
        return product_with_transposed(keys, rows, acc, S)
    else:
        return product_with_transposed(rows, keys, acc, S)


@triton.jit
def weighted_sum(weights, x, acc, S: constexpr):
    """acc + weights x, where ``weights`` are a tile of the size of the scores, ``x`` is an operand; acc may be None."""
    if S.SPLIT:
        hi, lo, factor = x
        LAST: constexpr = len(hi.shape) - 1
        hi_w, lo_w, factor_w = split(weights * tl.expand_dims(factor, LAST - 1), WEIGHTS)
        y = tl.dot(lo_w, hi)
        y = tl.dot(hi_w, lo, y)
        y = tl.dot(hi_w, hi, y)
        y = y * tl.expand_dims(factor_w, LAST)
        if acc is None:
            return y
        else:
            return acc + y
    else:
        return product(weights.to(x.dtype), x, acc, S)


@triton.jit
def operand(x, S: constexpr):
    """A tile as an operand, where it was not split before; None for an absent one."""
    if x is None:
        return
    elif S.SPLIT:
        return split(x, OPERAND)
    else:
        return x


@triton.jit
def rounded(weights, x, S: constexpr):
    """Weights as :func:`weighted_sum` rounds them to the dtype of an operand: fewer registers until then."""
    if S.SPLIT:
        return weights
    else:
        return weights.to(x.dtype)


@triton.jit
def left_operand(x, S: constexpr):
    """``x``, a left operand of every product of a loop; with S.HELD in the registers of the matrix unit.

    Otherwise it is read from shared memory anew for each product, which is what bounds them at 64 rows a tile, and
    takes the place of a stage of loads. The compiler holds only what a product has left there, as 0 + x does here.
    """
    if x is None:
        return
    elif S.HELD and not S.SPLIT:
        nothing = tl.zeros((x.shape[0], 16), x.dtype)
        return tl.dot(nothing, tl.zeros((16, x.shape[1]), x.dtype), x.to(tl.float32)).to(x.dtype)
    else:
        return x


@triton.jit
def load_operand(
    base, strides, lead, start, count, BLOCK: constexpr, WIDTH: constexpr, EVEN: constexpr,
    factors, INDEX: constexpr, S: constexpr,
):  # fmt: skip
    """Rows [start, start + BLOCK) of one head as an operand of products; None for an absent tensor.

    Args:
        factors: with S.SPLIT, those of these rows (:func:`theria.ops.triton.parts.load_factors`), and which of them.
    """
    if base is None:
        return
    elif S.SPLIT:
        SIZE: constexpr = (S.D + 7) // 8 * 8 if WIDTH == "D" else (S.E + 7) // 8 * 8
        BLOCK_W: constexpr = S.BLOCK_D if WIDTH == "D" else S.BLOCK_E
        rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_W)[None, :]
        head = tl.multiple_of(at(base, strides, lead, S.VEC).to(tl.pointer_type(tl.float16)), 16)
        hi = head + tl.cast(start, tl.int64) * (2 * SIZE) + (rows * (2 * SIZE) + columns)
        if EVEN and SIZE == BLOCK_W:
            return tl.load(hi), tl.load(hi + SIZE), factors[INDEX]
        else:
            inside = (columns < SIZE) & (start + rows < count) if not EVEN else columns < SIZE
            return tl.load(hi, mask=inside, other=0.0), tl.load(hi + SIZE, mask=inside, other=0.0), factors[INDEX]
    else:
        return load(at(base, strides, lead, S.VEC), start, count, strides, BLOCK, WIDTH, EVEN, S)
