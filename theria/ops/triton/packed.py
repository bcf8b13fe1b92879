"""Tiles for calls whose keys fit one tile: of one head (rows, width), or of several whole heads (heads, rows, width).

``PACK`` is the number of heads of a program. Where it is 1, everything here is what the long kernels use. Where it is
more, tiles have three dimensions and products are batched, so that no head meets another one's numbers: a NaN in one
task of a mapped batch stays there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from theria.ops.triton import tensors
from theria.ops.triton.products import operand, product_with_transposed
from theria.ops.triton.softmax import LOG2E
from theria.ops.triton.tensors import at, at_row, constexpr


@triton.jit
def heads_from(first, total, PACK: constexpr):
    """Leading indices [first, first + PACK): a scalar, or (PACK, 1, 1) where the last head fills up the last pack."""
    if PACK == 1:
        return first
    else:
        heads = tl.expand_dims(tl.expand_dims(first + tl.arange(0, PACK), 1), 2)
        return tl.minimum(heads, total - 1)


@triton.jit
def coordinates(head, call, FLAT: constexpr):
    """The four coordinates of leading indices, without a division where one dimension holds them all (FLAT)."""
    if FLAT:
        zero = tl.zeros_like(head).to(tl.int64)
        return zero, zero, zero, head.to(tl.int64)
    else:
        return tensors.coordinates(head, call)


@triton.jit
def _rows(start, BLOCK: constexpr):
    return tl.expand_dims(start + tl.arange(0, BLOCK), 1)[None, :, :]


@triton.jit
def _cols(BLOCK: constexpr):
    return tl.arange(0, BLOCK)[None, None, :]


@triton.jit
def _inside(start, count, BLOCK: constexpr, WIDTH: constexpr, BLOCK_W: constexpr):
    if WIDTH == BLOCK_W:
        return (_rows(start, BLOCK) < count) & (_cols(BLOCK_W) >= 0)
    else:
        return (_rows(start, BLOCK) < count) & (_cols(BLOCK_W) < WIDTH)


@triton.jit
def load(
    base, start, count, strides, BLOCK: constexpr, WIDTH: constexpr, EVEN: constexpr, PACK: constexpr,
    S: constexpr,
):  # fmt: skip
    """Rows [start, start + BLOCK) of each head, zero outside; None for an absent tensor (as ``tensors.load``)."""
    if base is None:
        return
    elif PACK == 1:
        return tensors.load(base, start, count, strides, BLOCK, WIDTH, EVEN, S)
    else:
        SIZE: constexpr = S.D if WIDTH == "D" else S.E
        BLOCK_W: constexpr = S.BLOCK_D if WIDTH == "D" else S.BLOCK_E
        ROW: constexpr = S.ROW_D if WIDTH == "D" else S.ROW_E
        row = ROW if ROW > 0 else strides[4] * S.VEC
        addresses = base + (_rows(start, BLOCK) * row + _cols(BLOCK_W))
        if EVEN and SIZE == BLOCK_W:
            return tl.load(addresses)
        else:
            return tl.load(addresses, mask=_inside(start, count, BLOCK, SIZE, BLOCK_W), other=0.0)


@triton.jit
def load_operand(
    base, start, count, strides, BLOCK: constexpr, WIDTH: constexpr, EVEN: constexpr, PACK: constexpr,
    S: constexpr,
):  # fmt: skip
    """The same as an operand of products."""
    return operand(load(base, start, count, strides, BLOCK, WIDTH, EVEN, PACK, S), S)


@triton.jit
def store(
    base, x, start, count, strides, BLOCK: constexpr, WIDTH: constexpr, EVEN: constexpr, PACK: constexpr,
    S: constexpr,
):  # fmt: skip
    """Write ``x`` to the rows that exist, in the tensor's dtype (as ``tensors.store``).

    The last head, which fills up a pack, is written more than once, with the same bits.
    """
    if PACK == 1:
        tensors.store(base, x, start, count, strides, BLOCK, WIDTH, EVEN, S)
    else:
        SIZE: constexpr = S.D if WIDTH == "D" else S.E
        BLOCK_W: constexpr = S.BLOCK_D if WIDTH == "D" else S.BLOCK_E
        ROW: constexpr = S.ROW_D if WIDTH == "D" else S.ROW_E
        row = ROW if ROW > 0 else strides[4] * S.VEC
        addresses = base + (_rows(start, BLOCK) * row + _cols(BLOCK_W))
        x = x.to(base.dtype.element_ty)
        if EVEN and SIZE == BLOCK_W:
            tl.store(addresses, x)
        else:
            tl.store(addresses, x, mask=_inside(start, count, BLOCK, SIZE, BLOCK_W))


@triton.jit
def _each_row(row, PACK: constexpr, S: constexpr):
    """Rows along the last dimension of a tile of scores."""
    rows = (row + tl.arange(0, S.BLOCK_M))[None, :]
    if PACK == 1:
        return rows
    else:
        return rows[None, :, :]


@triton.jit
def _each_key(PACK: constexpr, S: constexpr):
    """Keys along the dimension before it."""
    cols = tl.arange(0, S.BLOCK_N)[:, None]
    if PACK == 1:
        return cols
    else:
        return cols[None, :, :]


@triton.jit
def load_row(pointer, head, row, other, call, PACK: constexpr, S: constexpr):
    """A row statistic as (1, rows) or (heads, 1, rows); ``other`` where there is no row."""
    rows = _each_row(row, PACK, S)
    if S.EVEN_N:
        return tl.load(at_row(pointer, head, call) + rows)
    else:
        return tl.load(at_row(pointer, head, call) + rows, mask=(rows < call.N) & (head >= 0), other=other)


@triton.jit
def store_row(pointer, x, head, row, call, PACK: constexpr, S: constexpr):
    """Write a row statistic, given as :func:`load_row` gives it."""
    rows = _each_row(row, PACK, S)
    if S.EVEN_N:
        tl.store(at_row(pointer, head, call) + rows, x)
    else:
        tl.store(at_row(pointer, head, call) + rows, x, mask=(rows < call.N) & (head >= 0))


@triton.jit
def row_sum(x):
    """Sum over the keys, as :func:`load_row` gives a row statistic."""
    return tl.expand_dims(tl.sum(x, len(x.shape) - 2), len(x.shape) - 2)


@triton.jit
def scaled_scores(q, k, mask, strides, lead, row, call, PACK: constexpr, S: constexpr):
    """Sᵀ (1) in the unit of ``softmax.pivot``, masked: (keys, rows) or (heads, keys, rows), all keys of a head."""
    UNIT: constexpr = 1.0 if S.NATURAL else LOG2E
    x = product_with_transposed(k, q, None, S) * (call.scale * UNIT)
    rows, cols = _each_row(row, PACK, S), _each_key(PACK, S)
    if mask is not None:
        entries = at(mask, strides.mask, lead, 1)
        entries += rows.to(tl.int64) * strides.mask[4] + cols.to(tl.int64) * strides.mask[5]
        exists = (rows < call.N) & (cols < call.M) & (lead[3] >= 0)  # with the shape of ``entries``
        if mask.dtype.element_ty.is_floating():
            x += tl.load(entries, mask=exists, other=float("-inf")).to(tl.float32) * UNIT
        else:
            x = tl.where(tl.load(entries, mask=exists, other=0) != 0, x, float("-inf"))
    if not S.EVEN_M:
        x = tl.where(cols < call.M, x, float("-inf"))
    if S.CAUSAL:
        x = tl.where(rows >= cols, x, float("-inf"))
    return x


@triton.jit
def keep_factor(seed, head, row, call, PACK: constexpr, S: constexpr):
    """Rᵀ (3) of the rows from ``row`` against all keys; None without dropout (as ``dropout.keep_factor``).

    Every entry computes its group of four words and takes its own. Where the words of a group are joined instead,
    Triton 3.6 makes a wrong program of 16 keys with a mask: the tile of scores reaches the matrix unit out of order.
    """
    if seed is None:
        return
    else:
        rows, cols = _each_row(row, PACK, S), _each_key(PACK, S)
        zero = rows * 0 + cols * 0 + head * 0
        position = tl.cast(head, tl.int64) % call.heads + zero
        group, rows = (cols // 4 + zero).to(tl.uint32), (rows + zero).to(tl.uint32)
        low, high = (position & 0xFFFFFFFF).to(tl.uint32), (position >> 32).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, group, rows, low, high)
        i = cols % 4 + zero
        words = tl.where(i == 0, w0, tl.where(i == 1, w1, tl.where(i == 2, w2, w3)))
        return tl.where(words.to(tl.int64) >= call.threshold, call.keep_scale, 0.0)
