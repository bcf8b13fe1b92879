"""A number added to all scores of a row changes nothing; what rounding makes of that, and how it is kept.

So the rows of dS (6) and tdS (16) add up to 0, and tS may be less any number of its row in (11) and (16). In half
precision delta = rowsum(dO∘O) and tau O take O as it was rounded, and both are off by some 2^-9 |O| (2^-12 in float16).
Where values have a large part in common, O has it too, and is large beside the spread of the values, on which alone
derivatives of the scores depend; where keys have one besides, what a row of dS adds up to, times that part, is in dQ.

With a vector c of the size of a key, any vector,

    dS K = dS (K − 1 c') + rowsum(dS) c',          in which the last term is 0 and is left out,
    tS = tQ (K − 1 c')' + Q (tK − 1 tc')' + (tQ c + Q tc) 1',    in which the last term may be left out.

c is the mean of the first keys of the head, tc that of their tangents: as far as these tell, what all have in common.
"""

from __future__ import annotations

import triton
import triton.language as tl

from theria.ops.triton.tensors import at, constexpr, load

FEW = tl.constexpr(16)  # keys, where the registers are scarce
HIDDEN = tl.constexpr(-64.0)  # of an additive mask: with so little added a key has no weight beside another


@triton.jit
def common_part(keys, key_strides, where, KEYS: constexpr, S: constexpr):
    """c of one head, (BLOCK_D,) in float32; None for an absent tensor and in float32, where O is not rounded.

    The mean of those of the first KEYS keys that all rows of a block see, 0 without any: what a row does not see may be
    anything, and changes none of its bits.

    Args:
        where: (mask, its strides, lead, row, call) of the block.
    """
    mask, strides, lead, row, call = where
    if keys is None or keys.dtype.element_ty == tl.float32:
        return
    else:
        first = load(at(keys, key_strides, lead, S.VEC), 0, call.M, key_strides, KEYS, "D", S.EVEN_M, S).to(tl.float32)
        count = tl.minimum(call.M, KEYS)
        if S.CAUSAL:
            count = tl.minimum(count, row + 1)
        if S.CAUSAL or mask is not None:
            seen = tl.arange(0, KEYS) < count
            if mask is not None:
                seen = seen & _shown_to_all(mask, strides, lead, row, call, KEYS, S)
                count = tl.maximum(tl.sum(seen.to(tl.int32), 0), 1)
            first = tl.where(seen[:, None], first, 0.0)
        return tl.sum(first, 0) / count.to(tl.float32)


@triton.jit
def _shown_to_all(mask, strides, lead, row, call, KEYS: constexpr, S: constexpr):
    """Which of the first KEYS keys the mask shows to every row of a block, (KEYS,)."""
    rows, cols = row + tl.arange(0, S.BLOCK_M)[:, None], tl.arange(0, KEYS)[None, :]
    entries = at(mask, strides, lead, 1) + rows.to(tl.int64) * strides[4] + cols.to(tl.int64) * strides[5]
    exists = (rows < call.N) & (cols < call.M)
    if mask.dtype.element_ty.is_floating():
        shown = tl.load(entries, mask=exists, other=0.0).to(tl.float32) > HIDDEN
    else:
        shown = tl.load(entries, mask=exists, other=1) != 0
    return tl.min(shown.to(tl.int32), 0) > 0


@triton.jit
def with_row_sums(sums, x, keys):
    """``sums`` plus those of the rows of a tile; as they are where :func:`common_part` of these keys is None."""
    if keys is None or keys.dtype.element_ty == tl.float32:
        return sums
    else:
        return sums + tl.sum(x, 1)


@triton.jit
def without(acc, sums, common):
    """acc − sums c'; ``acc`` where there is no c."""
    if common is None:
        return acc
    else:
        return acc - sums[:, None] * common[None, :]


@triton.jit
def _dot(rows, common):
    """The product of each row with c."""
    return tl.sum(rows.to(tl.float32) * common[None, :], 1)


@triton.jit
def row_shift(q, tq, k, tk, k_strides, tk_strides, where, S: constexpr):
    """scale (tQ c + Q tc) of a block of rows, (BLOCK_M,), where ``k`` and ``tk`` are all keys; None where that is 0.

    Of few keys: their mean takes registers of the whole kernel, and what it misses is a part of the spread.
    """
    call = where[4]
    common = None if tq is None else common_part(k, k_strides, where, FEW, S)
    tcommon = None if q is None else common_part(tk, tk_strides, where, FEW, S)
    if common is None and tcommon is None:
        return
    elif tcommon is None:
        return _dot(tq, common) * call.scale
    elif common is None:
        return _dot(q, tcommon) * call.scale
    else:
        return (_dot(tq, common) + _dot(q, tcommon)) * call.scale


@triton.jit
def tangent_shift(q, tq, k, tk, strides, lse, where, S: constexpr):
    """:func:`row_shift` along one direction, 0 where a row of a block, with its ``lse``, sees no key: its tau is 0."""
    shift = row_shift(q, tq, k, tk, strides.k, strides.tk, where, S)
    if where[0] is None or shift is None:
        return shift
    else:
        return tl.where(lse == float("-inf"), 0.0, shift)


@triton.jit
def shifted(ts, shift, call):
    """scale tS less the shift of each row."""
    if shift is None:
        return ts * call.scale
    else:
        return ts * call.scale - shift[:, None]


@triton.jit
def total(sums, shift):
    """``sums``, with the shift that was left out: of P∘tS, since P adds up to 1, or of another shift."""
    if shift is None:
        return sums
    else:
        return sums + shift
